"""`block_diagonal_matmul` on Hopper GPUs: arrays in and out, around `hopper_blocks`.

One kernel forward and two back, for dx and for the gradients of blocks, each with its operands read
once; permutations, bias and activation are passes of XLA. They need compute capability 9.0.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import hopper, hopper_blocks, hopper_weights
from pallas_kernels.block_diagonal_matmul.permutation import Inverse, permuted
from pallas_kernels.epilogue import finish
from pallas_kernels.hopper import Machine
from pallas_kernels.hopper_blocks import TALL


def unsupported(x, blocks, inputs, outputs, activation, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    del inputs, outputs, activation
    if (reason := hopper.unsupported(x.dtype)) is not None:
        return reason
    _, p, q = blocks.shape
    for name, size in (("p", p), ("q", q)):
        if size % TALL:
            return f"{name} = {size} of the blocks is no multiple of {TALL}"
    for rows, columns in ((p, q), (q, p)) if backward else ((p, q),):
        if hopper_blocks.plan(TALL, 1, rows, columns, 1) is None:
            return f"a block of {rows} x {columns} is too large for shared memory"
    return None


def forward(x, blocks, bias, inputs, outputs, activation, precision, machine=Machine()):
    """y [M, K q] of x [M, K p]. Products of bfloat16 and float16 are exact at any precision."""
    y = _product("block_diagonal_y", permuted(x, inputs), blocks, machine)
    return finish(permuted(y, outputs).astype(jnp.float32), bias, activation).astype(x.dtype)


def backward(x, blocks, bias, dy, inputs, outputs, activation, precision, machine=Machine()):
    """dx in x's dtype, gradients of blocks and bias (None without one) in float32."""
    (K, p, q), x = blocks.shape, permuted(x, inputs)
    if activation is not None:
        y = permuted(_product("block_diagonal_y", x, blocks, machine), outputs)
        y = finish(y.astype(jnp.float32), bias, None)
        _, pull = jax.vjp(lambda y: finish(y, None, activation), y)
        dy = pull(dy.astype(y.dtype))[0].astype(x.dtype)
    dbias = None if bias is None else jnp.sum(dy, 0, dtype=jnp.float32)
    dy = permuted(dy, outputs and Inverse(outputs))
    dx = _product("block_diagonal_dx", dy, blocks.swapaxes(1, 2), machine)
    dblocks = hopper_weights.gradients(
        "block_diagonal_dblocks",
        hopper_blocks.whole_tiles(x),
        hopper_blocks.whole_tiles(dy),
        hopper_weights.diagonal(K, p, q),
        p,
        q,
        machine=machine,
    )
    return permuted(dx, inputs and Inverse(inputs)), dblocks, dbias


def _product(name, x, blocks, machine):
    """[M, K q], by blocks."""
    rows = hopper_blocks.whole_tiles(x)
    at = hopper_blocks.plan(len(rows), *blocks.shape, machine.cores)
    return hopper_blocks.to_rows(name, rows, blocks, at, machine)[: len(x)]
