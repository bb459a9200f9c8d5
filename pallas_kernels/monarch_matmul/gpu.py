"""`monarch_matmul` on Hopper GPUs: arrays in and out, around `gpu_product` and `hopper_weights`.

The kernels are compiled for sm_90a and checked in JAX's interpreter of them, of which
`pallas_kernels.hopper` says what it leaves out. They have not run on a GPU, and their speed has not
been measured, so they run only where implementation="gpu" asks for them. They need compute
capability 9.0.

Why so. Computed, not measured, for n 4096, 16 blocks, M 8192 on an H200: products 34 GFLOP, 43 us
at 790 TFLOP/s; x, y and both factors once over HBM 138 MB, 32 us at 4.3 TB/s. z [M, n] takes 64
MiB, and 64 rows of it 512 KiB, more than the 227 KiB of a streaming multiprocessor. Bytes out of or
into L2, for which 5.5 TB/s are assumed:

    thread block                                  x      factors    z         y      sum, time
    64 rows, 4 of 16 blocks of left              268 MB   537 MB    none     67 MB   872 MB, 159 us
    the same, 4 x 2 of them sharing copies        67      268       none     67      403 MB,  73 us
    128 rows in a cluster of 8, z exchanged       67      268       on chip  67      403 MB,  73 us
    two kernels, z in HBM (63 us there)           67      268       134      67      537 MB,  98 us

The second row is what is done: a block of left needs q / L features of each block of right, so a
thread block that has 4 blocks of left makes 4 q / L columns for each block of x, 64 here, and keeps
z [64, 4, 256] in 128 KiB. The four that together have all of left read the same rows of x, and two
such sets the same factors: TMA copies to all of them. The third row moves as little, but all eight
wait for each other twice a tile. What is paid is shared memory: in the first product a panel of
64 x 64 is written once and read once by wgmma. A row tile and group move 3.6 MiB, 29,700 cycles at
128 bytes each, where the products take 16,400. So 78 us is the least for this kernel, by shared
memory, against 348 us for a dense product at 790 TFLOP/s.

y leaves the kernel by blocks of left, [M, L, s]. Their columns are interleaved one by one, 2 bytes
at a stride of 2 L, which TMA cannot write, so a pass of XLA puts them in order: 134 MB, 31 us, in
which bias, activation and what follows are fused. The backward pass takes dy the same way.

Backward: z again, dx with dz from the same kernel (with the factors' places exchanged), and the
factors' gradients from z, dy, x and dz.
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper, hopper_weights
from pallas_kernels.epilogue import finish
from pallas_kernels.hopper import Machine
from pallas_kernels.monarch_matmul import gpu_product

TILE = 2 * hopper.ROWS  # two warpgroups' turns of z, and of a gradient


def unsupported(x, right, left, backward):
    """Why the kernels cannot do this; None where they can."""
    if (reason := hopper.unsupported(x.dtype)) is not None:
        return reason
    (_, p, q), (L, r, s) = right.shape, left.shape
    for name, size in zip("pqrs", (p, q, r, s), strict=True):
        if size % TILE:
            return f"{name} = {size} of the blocks is no multiple of {TILE}"
    if q % (8 * L):
        return f"q = {q} of right's blocks is no multiple of 8 times left's {L} blocks"
    for plan in _plans(x, right, left)[: 1 + backward]:
        if plan is None:
            return f"blocks of {p} x {q} and {r} x {s} are too large for shared memory"
    return None


def forward(x, right, left, bias, activation, precision, machine=Machine()):
    """y [..., L s] in x's dtype. Products of bfloat16 and float16 are exact at any precision."""
    plan, _ = _plans(x, right, left)
    L, _, s = left.shape
    second = left.swapaxes(1, 2)
    y, _ = gpu_product.product("monarch_forward", _rows(x), _first(right, L), second, plan, machine)
    y = y.reshape(-1, L, s).swapaxes(1, 2).reshape(-1, s * L)
    y = y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], s * L)
    return finish(y.astype(jnp.float32), bias, activation).astype(x.dtype)


def backward(x, right, left, dy, precision, machine=Machine()):
    """dx in x's dtype, dright and dleft in float32."""
    (K, p, q), (L, r, s) = right.shape, left.shape
    c = q // L
    plan, plan_back = _plans(x, right, left)
    rows, dy = _rows(x), _rows(dy)
    dy = dy.reshape(-1, s, L).swapaxes(1, 2).reshape(-1, L * s)
    _, z = gpu_product.product("monarch_z", rows, _first(right, L), None, plan, machine, keep=True)
    dx, dz = gpu_product.product(
        "monarch_dx",
        dy,
        left.reshape(L, K, c, s).transpose(0, 3, 1, 2),
        right.reshape(K, p, c, L).swapaxes(2, 3).reshape(K, p, q),
        plan_back,
        machine,
        keep=True,
    )
    gradients = functools.partial(hopper_weights.gradients, machine=machine)
    dleft = gradients("monarch_dleft", z, dy, _starts(L, r, s), r, s)
    dright = gradients("monarch_dright", rows, dz, _starts(K, p, q), p, q)
    dright = dright.reshape(K, p, L, c).swapaxes(2, 3).reshape(K, p, q)
    return dx[: x.size // x.shape[-1]].reshape(x.shape), dright, dleft


def _plans(x, right, left):
    """Of y and of dx; None in place of one that cannot be."""
    (K, p, q), (L, _, s) = right.shape, left.shape
    M = -(-x.size // x.shape[-1] // hopper.ROWS) * hopper.ROWS
    sizes = (K, p, L, s), (L, s, K, p)
    return tuple(gpu_product.plan(M, *size, q // L) for size in sizes)


def _first(right, L: int):
    """right as [K, p, L, q / L]: its features by the block of left to which they go."""
    K, p, q = right.shape
    return right.reshape(K, p, q // L, L).swapaxes(2, 3)


def _rows(x):
    """[M, I], M in whole tiles."""
    flat = x.reshape(-1, x.shape[-1])
    more = -flat.shape[0] % hopper.ROWS
    return jnp.pad(flat, ((0, more), (0, 0))) if more else flat


def _starts(n: int, P: int, Q: int) -> np.ndarray:
    """Where block i of n begins in the columns of both sides."""
    return np.arange(n)[:, None] * np.array([P, Q])
