"""Exchanges of lanes between tiles for TPU kernels: stride permutations at the cost of selects.

A stride permutation reads a vector of L q features as [q, L] and transposes it: feature r of block
k goes to block r % L. On a TPU features lie along lanes, and moving a lane costs a pass through the
cross-lane unit, but choosing, lane by lane, between two registers costs one select and moves
nothing. So no lane moves here. The features of a block may stand in any order, as long as the
weights that make and take them stand in the same: tile i of L tiles has its feature m in lane
m ^ i, hence what is for tile l stands, in all of them, in lanes of which the source can be read off
the lane's number. L tiles are then exchanged by log2(L) selects a register (`exchange`).

Only where features leave in their true order, as the output of a kernel does, must lanes move: by
one rotation a register (`spread`, and `collect` for its inverse).

All of it happens within groups of L neighbouring tiles of 128 lanes, so the weights are permuted by
matrices of 128 x 128, whatever the sizes of the blocks. L is a power of two, at most 128.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Rows of words of one exchange: a register of each of its L tiles.
WORDS = 8


def exchange(tiles: Sequence[jax.Array]) -> list[jax.Array]:
    """Tile l of the result has in lane m what tile (m % L) ^ l has there; its own inverse.

    Args:
      tiles: L arrays [rows, 128] of 32-bit words.
    """
    tiles, lane, step = list(tiles), _lane(len(tiles[0])), 1
    while step < len(tiles):
        other = (lane & step) != 0
        tiles = [jnp.where(other, tiles[i ^ step], tile) for i, tile in enumerate(tiles)]
        step *= 2
    return tiles


def spread(tiles: Sequence[jax.Array]) -> list[jax.Array]:
    """Tiles of L blocks to L tiles of their interleaved features.

    Feature f = t * (128 / L) + j of tile l, in lane (j * L + l + t) % 128, comes to lane j * L + l
    of tile t, which is place f * L + l of them all.

    Args:
      tiles: L arrays [rows, 128] of 32-bit words.
    """
    turned = _turn(tiles)
    return [_rotate(turned[-t % len(tiles)], -t) for t in range(len(tiles))]


def collect(tiles: Sequence[jax.Array]) -> list[jax.Array]:
    """The inverse of `spread`."""
    turned = _turn([_rotate(tile, t) for t, tile in enumerate(tiles)])
    return [turned[-block % len(tiles)] for block in range(len(tiles))]


def exchange_order(i: jax.Array) -> jax.Array:
    """int32 [1, 128]: the feature of tile i of a group that `exchange` takes in each lane."""
    return _lane() ^ i


def exchanged_rows(block: jax.Array, blocks: int) -> jax.Array:
    """bfloat16 [128, 128]; it @ w brings 128 rows of a block to the order after `exchange`.

    Row i * (128 / L) + j of a group of 128 is for what tile i had in lane j * L + (i ^ block).
    """
    place, row = _square()
    source = (_rem(place, blocks) ^ block) * (LANES // blocks) + _div(place, blocks)
    return (row == source).astype(jnp.bfloat16)


def spread_order(block: jax.Array, blocks: int) -> jax.Array:
    """int32 [1, 128]: the feature of a tile of a block that `spread` takes in each lane."""
    place = _rem(_lane() - block + LANES, LANES)
    return _rem(place, blocks) * (LANES // blocks) + _div(place, blocks)


def spread_lane(block: jax.Array, blocks: int) -> jax.Array:
    """int32 [1, 128]: the lane in which `spread` takes each feature of a tile of a block."""
    each = LANES // blocks
    return _rem(_rem(_lane(), each) * blocks + block + _div(_lane(), each), LANES)


def take_lanes(a: jax.Array, lanes: jax.Array) -> jax.Array:
    """Lane m of the result has what `a` has in lane lanes[0, m].

    One pass through the cross-lane unit a register, exact: weights of Monarch products come in
    order in up to half the time that products with permutation matrices take. Where every register
    wants another order, as in `spread`, rotations are faster: Monarch forward v5p 2048 by 16 takes
    24 us with them, 27 so.

    Args:
      a: [rows, 128], float32, bfloat16 (an even number of rows) or int32.
      lanes: int32 [1, 128].
    """
    words = pack(a)
    at = jnp.broadcast_to(lanes, words.shape)[:, :, None]
    numbers = lax.GatherDimensionNumbers((), (1,), (1,), (0,), (0,))
    taken = lax.gather(words, at, numbers, (1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return unpack(taken, a.dtype)


def _turn(tiles):
    """Tile j of the result has in lane m what tile (j + m) % L has there."""
    tiles, lane, step = list(tiles), _lane(len(tiles[0])), 1
    count = len(tiles)
    while step < count:
        other = (lane & step) != 0
        tiles = [jnp.where(other, tiles[(j + step) % count], tiles[j]) for j in range(count)]
        step *= 2
    return tiles


def _rotate(tile, by):
    return pltpu.roll(tile, by % LANES, 1) if by % LANES else tile


def _lane(rows: int = 1):
    return lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)


def _square():
    shape = (LANES, LANES)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


# `//` and `%` of traced integers ask for the sign, which Pallas lowers on TPUs alone.
def _div(x, by):
    return lax.div(x, jnp.int32(by))


def _rem(x, by):
    return lax.rem(x, jnp.int32(by))


def tile(i):
    """The lanes of a tile."""
    return pl.ds(aligned(i * LANES), LANES)


def pack(values):
    """Words of 32 bits of bfloat16 [2 n, ...]; float32 as it is."""
    return pltpu.bitcast(values, jnp.int32) if values.dtype == jnp.bfloat16 else values


def unpack(words, dtype):
    """The inverse of `pack`."""
    return pltpu.bitcast(words, dtype) if words.dtype == jnp.int32 else words


def aligned(lane):
    """For the compiler, where the lane is not known."""
    return lane if isinstance(lane, int) else pl.multiple_of(lane, LANES)
