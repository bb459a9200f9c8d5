"""`monarch_matmul` on Hopper GPUs: arrays in and out, around `hopper_blocks` and `hopper_weights`.

Two kernels with z between them in memory, features by features, and a pass of XLA that puts y in
order: it leaves the second kernel by blocks of left, [M, L, s], whose columns are interleaved one
by one, 2 bytes at a stride of 2 L, which TMA cannot write. Bias, activation and what follows are
fused into that pass. The backward pass takes dy the same way, makes z again, dz, dx, and the
factors' gradients from z, dy, x and dz. They need compute capability 9.0.

Measured on an H200 for n 4096, 16 blocks, M 8192, microseconds of each kernel (CUPTI):

    forward   weights 3, z 41, y 40, order 35                              sum 119, dense 344
    backward  order 41, z 41, dz 40, dx 36, dleft 42, dright 43, rest 11   sum 256, dense 685

A kernel moves 138 MB, 32 us at the 4.3 TB/s of a copy; products are 17 GFLOP each, 22 us at 790
TFLOP/s. One kernel for both factors, z [64, 4, 256] in shared memory and rows and factors copied
to clusters of eight thread blocks, took 382 us in place of z, y and order: its products of
64 x 64 x 64 are too short for what a step waits for the other thread blocks. In `hopper_blocks`,
rows copied to a cluster of four took 112 us where four thread blocks that read them out of L2 take
58 (n 4096, 8 blocks). Weights of blocks larger than 512 do not fit on chip.
"""

import jax.numpy as jnp

from pallas_kernels import hopper, hopper_blocks, hopper_weights
from pallas_kernels.epilogue import finish
from pallas_kernels.hopper import Machine
from pallas_kernels.hopper_blocks import TALL


def unsupported(x, right, left, backward, transposed=False):
    """Why the kernels cannot do this; None where they can."""
    if (reason := hopper.unsupported(x.dtype)) is not None:
        return reason
    (_, p, q), (L, r, s) = right.shape, left.shape
    for name, size in zip("pqrs", (p, q, r, s), strict=True):
        if size % TALL:
            return f"{name} = {size} of the blocks is no multiple of {TALL}"
    c = q // L
    if q % L or (c not in (8, 16, 32) and c % hopper.ROWS):
        return (
            f"q = {q} of right's blocks over left's {L} blocks is not 8, 16, 32 or a multiple of 64"
        )
    plans = _plans(x, right, left, Machine())
    for (rows, columns), plan in zip(((p, q), (r, s), (s, r), (q, p)), plans, strict=True):
        if plan is None:
            return f"a block of {rows} x {columns} is too large for shared memory"
        if not backward and not transposed and (rows, columns) == (r, s):
            return None
    return None


def forward(x, right, left, bias, activation, precision, machine=Machine()):
    """y [..., L s] in x's dtype. Products of bfloat16 and float16 are exact at any precision."""
    of = _Products(x, right, left, machine)
    y = of.joined(of.y(of.z(_rows(x))))
    y = y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], y.shape[1])
    return finish(y.astype(jnp.float32), bias, activation).astype(x.dtype)


def backward(x, right, left, dy, precision, machine=Machine(), transposed=False):
    """dx in x's dtype, dright and dleft in float32."""
    of, rows, dy = _Products(x, right, left, machine), _rows(x), _rows(dy)
    if transposed:  # M is applied to dy, and its factors' gradients are those at dy for x
        rows, dy = dy, rows
    dy = of.separate(dy)
    z, dz = of.z(rows), of.dz(dy)
    dx = of.joined(of.y(z)) if transposed else of.dx(dz)
    return dx[: x.size // x.shape[-1]].reshape(x.shape), of.dright(rows, dz), of.dleft(z, dy)


def transposed(x, right, left, precision, machine=Machine()):
    """x [..., L s] times the transposed matrix, [..., K p]; `backward` is its derivative too."""
    of = _Products(x, right, left, machine)
    y = of.dx(of.dz(of.separate(_rows(x))))
    return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], y.shape[1])


class _Products:
    """The kernels and passes on rows in whole tiles; z and dz are features by features."""

    def __init__(self, x, right, left, machine):
        self.right, self.left, self.machine = right, left, machine
        self.plans = _plans(x, right, left, machine)

    @property
    def by_left(self):
        """right as [K, q, p], its features by the block of left to which they go."""
        (K, p, q), L = self.right.shape, len(self.left)
        return self.right.reshape(K, p, q // L, L).transpose(0, 3, 2, 1).reshape(K, q, p)

    def separate(self, y):
        """[M, L s] of y [M, s L]: blocks that interleave one behind the other."""
        L, _, s = self.left.shape
        return y.reshape(-1, s, L).swapaxes(1, 2).reshape(y.shape)

    def joined(self, y):
        """The inverse of `separate`."""
        L, _, s = self.left.shape
        return y.reshape(-1, L, s).swapaxes(1, 2).reshape(y.shape)

    def z(self, x):
        L, at = len(self.left), self.plans[0]
        return hopper_blocks.to_features("monarch_z", x, self.by_left, L, at, self.machine)

    def y(self, z):
        return hopper_blocks.to_rows("monarch_y", z, self.left, self.plans[1], self.machine)

    def dz(self, dy):
        K, at = len(self.right), self.plans[2]
        return hopper_blocks.to_features("monarch_dz", dy, self.left, K, at, self.machine)

    def dx(self, dz):
        return hopper_blocks.to_rows("monarch_dx", dz, self.by_left, self.plans[3], self.machine)

    def dleft(self, z, dy):
        return self._gradients("monarch_dleft", z, dy, *self.left.shape)

    def dright(self, x, dz):
        (K, p, q), L = self.right.shape, len(self.left)
        found = self._gradients("monarch_dright", x, dz, K, p, q)
        return found.reshape(K, p, L, q // L).swapaxes(2, 3).reshape(K, p, q)

    def _gradients(self, name, a, b, n, P, Q):
        starts = hopper_weights.diagonal(n, P, Q)
        return hopper_weights.gradients(name, a, b, starts, P, Q, machine=self.machine)


def _plans(x, right, left, machine):
    """Of z, y, dz and dx; None in place of one that cannot be."""
    (K, p, q), (L, r, s) = right.shape, left.shape
    M = -(-x.size // x.shape[-1] // TALL) * TALL
    sizes = (K, p, q), (L, r, s), (L, s, r), (K, q, p)
    return tuple(hopper_blocks.plan(M, *size, machine.cores) for size in sizes)


def _rows(x):
    """[M, I], M in whole tiles."""
    return hopper_blocks.whole_tiles(x.reshape(-1, x.shape[-1]))
