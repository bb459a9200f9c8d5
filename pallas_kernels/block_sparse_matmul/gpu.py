"""block_sparse_matmul on Hopper GPUs: arrays in and out, around `gpu_product` and `hopper_weights`.

They need compute capability 9.0. On an H200, n 4096, M 8192, blocks of 128, density 1/8: 60 us
forward and 115 backward, where a dense product takes 344 and 688 (of the kernels, by CUPTI).

x U, and dy V^T in the backward pass, are products by XLA, rounded with the factor 1 - gamma in
them; the kernel sums what follows in the same registers as the live blocks. gamma itself is applied
to the sum over live blocks in float32, between the two.

Tiles, computed, not measured, for n 4096, M 8192, blocks of 128, density 1/8 on an H200: products
34 GFLOP, 43 us at 790 TFLOP/s; HBM 138 MB, 32 us at 4.3 TB/s. Out of L2, for which 5.5 TB/s are
assumed, tiles of 128 x 128 read 268 MB of x, for each column its own, and 268 MB of blocks, 110 us
with y; tiles of 256 x 128, which are used, half the blocks, 85 us: more than the 60 measured. A
tile of 256 x 256 would need two neighbouring columns to read the same rows, of which a flat
butterfly's have two of four in common. Of shared memory, 128 bytes a cycle, a stage takes 1,152
cycles where its products take 1,024.
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper, hopper_weights
from pallas_kernels.block_sparse_matmul import gpu_product
from pallas_kernels.block_sparse_matmul.settings import Settings, padded
from pallas_kernels.hopper import Machine

RANK = 128  # what ranks are padded to: a tile of U's and V's gradients


def unsupported(x, blocks) -> str | None:
    """Why the kernels cannot do this, in words; None where they can."""
    nnz, bi, bo = blocks.shape
    if bi % gpu_product.WIDE or bo % gpu_product.WIDE:
        return f"blocks of {bi} x {bo}; accepted: multiples of {gpu_product.WIDE}"
    return hopper.unsupported(x.dtype) or (None if nnz else "no live block")


def forward(
    x, blocks, u, v, gamma, bias, settings: Settings, *, save: bool, machine: Machine = Machine()
):
    """(y, before, z) as `blockwise.forward`."""
    rows = padded(x, 0, gpu_product.TALL)
    z, low, gamma = _low(rows, u, gamma)
    y, before = gpu_product.multiply(
        "block_sparse_forward",
        rows,
        blocks,
        settings.mask.columns,
        low,
        None if v is None else padded(v, 0, RANK),
        gamma,
        None if bias is None else bias.astype(jnp.float32),
        settings,
        machine,
        save=save,
    )
    M = x.shape[0]
    kept = z[:M, : u.shape[1]] if save and u is not None else None
    return y[:M], None if before is None else before[:M], kept


def backward(
    x, dy, z, blocks, u, v, gamma, has_bias, settings: Settings, *, machine: Machine = Machine()
):
    """(dx, d_blocks, du, dv, d_bias) as `blockwise.backward`."""
    M, (_, bi, bo) = x.shape[0], blocks.shape
    x, dy = (padded(a, 0, gpu_product.TALL) for a in (x, dy))
    dz, low, gamma = _low(dy, None if v is None else v.T, gamma)
    dx, _ = gpu_product.multiply(
        "block_sparse_dx",
        dy,
        blocks,
        settings.mask.rows,
        low,
        None if u is None else padded(u, 1, RANK),
        gamma,
        None,
        settings._replace(activation=None),
        machine,
        transposed=True,
    )
    gradients = functools.partial(hopper_weights.gradients, machine=machine)
    starts = np.argwhere(settings.mask.live) * np.array([bi, bo])
    d_blocks = gradients("block_sparse_dblocks", x, dy, starts, bi, bo)
    du = dv = None
    if u is not None:
        z = padded(padded(z, 0, gpu_product.TALL), 1, RANK)
        one = np.zeros((1, 2), int)
        du = gradients("block_sparse_du", x, dz, one, x.shape[1], dz.shape[1])[0, :, : u.shape[1]]
        dv = gradients("block_sparse_dv", z, dy, one, z.shape[1], dy.shape[1])[0, : u.shape[1]]
    d_bias = jnp.sum(dy, 0, dtype=jnp.float32) if has_bias else None
    return dx[:M], d_blocks, du, dv, d_bias


def _low(x, u, gamma):
    """x U, (1 - gamma) x U, each rounded once, with columns of zeros; and gamma as an array."""
    if u is None:
        return None, None, None
    z = jnp.dot(x, padded(u, 1, RANK), preferred_element_type=jnp.float32)
    if gamma is None:
        return z.astype(x.dtype), z.astype(x.dtype), None
    gamma = gamma.astype(jnp.float32)
    return z.astype(x.dtype), ((1 - gamma) * z).astype(x.dtype), gamma.reshape(1)
