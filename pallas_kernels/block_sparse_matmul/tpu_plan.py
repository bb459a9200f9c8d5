"""Sizes of the TPU kernels' tiles, what is summed in one product, and what they refuse."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.settings import Settings
from pallas_kernels.tpu_chip import chip

DTYPES = (jnp.bfloat16, jnp.float32)
LANES = 128
# Inputs and outputs of one pass of the widest matrix unit, a v6e's; others have 128.
WIDTH = 256
# Of the memory on chip: beside the arrays the compiler holds up to a tenth of it.
PLANNED = 57 / 64
# Rows of a tile times live blocks of 128 x 128: the kernels are straight code, 0.23 bundles each
# with matrix units of 128. A v6e's do four times as much in a bundle: n 8192, density 1/8, rank 128
# backward 481 us with 256 rows and 466 with the 512 that it then has.
CODE = 2**17
TILES = (512, 256, 128)


class Shared(NamedTuple):
    """Columns (one or two neighbours) that are stored together, of live (row, number) blocks.

    both: the first column's blocks in rows that both read in one product.
    rest: what else each reads.
    """

    first: int
    both: tuple[tuple[tuple[int, int], ...], ...]
    rest: tuple[tuple[tuple[int, int], ...], ...]


def groups(columns, bi: int, bo: int) -> list[Shared]:
    """Pairs of columns, which share the rows that make the fewest passes of the matrix unit.

    Where a block is narrower than the unit, rows that two columns read are multiplied by the blocks
    of both at once. Two passes more for a rest each can cost more than that saves: so counted.
    """
    found = []
    for c in range(0, len(columns), 2):
        pair = columns[c : c + 2]
        common = set()
        if len(pair) == 2 and bo < WIDTH:
            common = {row for row, _ in pair[0]} & {row for row, _ in pair[1]}
            common = set(sorted(common)[: _to_share(len(common), *map(len, pair), bi)])
        both = tuple(tuple(b for b in column if b[0] in common) for column in pair)
        rest = tuple(tuple(b for b in column if b[0] not in common) for column in pair)
        found.append(Shared(c, both, rest))
    return found


def _to_share(most: int, one: int, other: int, bi: int) -> int:
    def passes(rows):
        return -(-rows * bi // WIDTH)

    return min(range(most + 1), key=lambda n: (passes(n) + passes(one - n) + passes(other - n), n))


def padded_rank(u) -> int:
    """Columns of U in whole registers; 0 without U."""
    return 0 if u is None else -(-u.shape[1] // LANES) * LANES


def tile(x, blocks, u, settings: Settings, outputs: int) -> int:
    """Rows of a tile of the forward kernel (and that of dx); 0 where none fits.

    Args:
      outputs: arrays [M, O] that it writes.
    """
    (nnz, bi, bo), size = blocks.shape, x.dtype.itemsize
    rows, columns = settings.mask.shape
    rank = padded_rank(u)
    held = size * (nnz * bi * bo + rank * (rows * bi + columns * bo))

    def used(t):
        return held + 2 * size * t * (rows * bi + outputs * columns * bo + rank) + 4 * t * rank

    return _largest(x.shape[0], nnz, bi, bo, used)


def gradient_tile(x, blocks, u, settings: Settings) -> int:
    """Rows of a tile of the kernel of weights' gradients; 0 where none fits."""
    (nnz, bi, bo), size = blocks.shape, x.dtype.itemsize
    rows, columns = settings.mask.shape
    rank = padded_rank(u)
    held = 4 * (nnz * bi * bo + rank * (rows * bi + columns * bo))

    def used(t):
        return held + 2 * size * t * (rows * bi + columns * bo + 2 * rank)

    return _largest(x.shape[0], nnz, bi, bo, used)


def _largest(M, nnz, bi, bo, used) -> int:
    code = CODE * (chip().mxu // LANES) ** 2 // max(1, nnz * bi * bo // LANES**2)
    fits = [t for t in TILES if t <= code and used(t) <= PLANNED * chip().vmem]
    # A tile beyond the rows that there are would be padding alone.
    return min((t for t in fits if t >= M), default=fits[0] if fits else 0)


def unsupported_forward(x, blocks, u, settings: Settings, save: bool) -> str | None:
    """Why the forward kernel cannot do this, in words; None where it can."""
    outputs = 2 if save and settings.activation else 1
    return _shapes(x, blocks, settings) or _too_large(tile(x, blocks, u, settings, outputs), blocks)


def unsupported_backward(x, blocks, u, settings: Settings) -> str | None:
    """Why the backward kernels cannot do this, in words; None where they can."""
    fits = min(tile(x, blocks, u, settings, 1), gradient_tile(x, blocks, u, settings))
    return _shapes(x, blocks, settings) or _too_large(fits, blocks)


def _shapes(x, blocks, settings) -> str | None:
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}; accepted: bfloat16, float32"
    nnz, bi, bo = blocks.shape
    if bi % LANES or bo % LANES:
        return f"blocks of {bi} x {bo}; accepted: multiples of {LANES}"
    return None if nnz else "no live block"


def _too_large(fits: int, blocks) -> str | None:
    if fits:
        return None
    nnz, bi, bo = blocks.shape
    return f"{nnz} blocks of {bi} x {bo} and the tiles beside them, too many for a core's memory"
