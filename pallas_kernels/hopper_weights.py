"""Gradients of blocks of weights on Hopper: sums over rows of products of two pieces of each row.

Out n is a[:, i_n : i_n + P]^T b[:, j_n : j_n + Q]. Either side may also lie features by features,
as `hopper_blocks` leaves it; its block n is then the side of out n. A thread block makes a tile of
an out in registers, in the order of the rows, and where there are fewer tiles than streaming
multiprocessors they are split by rows into sums of their own, which XLA adds: nothing is atomic,
and the result is the same each time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import COMPUTE, DEPTH, ROWS, SHARED, Machine, Operand, Ring, shared

TALL = COMPUTE * ROWS  # of a tile
MOST_SPLITS = 8


class Inputs(NamedTuple):
    a: Any  # [M, I], or [n, M / 128, P, 128]
    b: Any  # [M, J], or [n, M / 128, Q, 128]
    starts: Any  # int32[n, 2], of columns of a and b


class Scratch(NamedTuple):
    ring: Ring
    own: Any  # float32[COMPUTE, ROWS, DEPTH]


class Plan(NamedTuple):
    """tall, wide: tiles of an out. columns: of a tile. splits: of the rows, `steps` stages each."""

    n: int
    tall: int
    wide: int
    columns: int
    splits: int
    steps: int


def diagonal(n: int, P: int, Q: int) -> np.ndarray:
    """`starts` of block-diagonal weights: out i begins at column i P of a and i Q of b."""
    return np.arange(n)[:, None] * np.array([P, Q])


def gradients(name, a, b, starts: np.ndarray, P: int, Q: int, *, machine: Machine):
    """float32[n, P, Q] of a [M, I] and b [M, J], see above; M and Q multiples of 64, P of 128.

    Args:
      name: of the kernel.
      a, b: or [n, M / 128, features, 128], M a multiple of 128.
      starts: int[n, 2], the first columns of a and b of each out; not read of features.
    """
    steps = (a.shape[1] * a.shape[3] if a.ndim == 4 else a.shape[0]) // DEPTH
    at = _plan(len(starts), P, Q, steps, machine.cores)

    def weight_gradients(mine, inputs, outputs, scratch):
        machine.roles(
            (scratch.ring,),
            lambda group: _compute(machine, at, mine, steps, inputs, outputs[0], scratch, group),
            lambda: _copy(at, mine, steps, inputs, scratch.ring),
        )  # fmt: skip

    stage = 2 * DEPTH * (TALL + at.columns)
    own = shared(COMPUTE, ROWS, DEPTH, dtype=jnp.float32)
    stages = min(6, (SHARED - 4 * COMPUTE * ROWS * DEPTH) // stage)
    panels = [
        shared(stages, *((width, DEPTH) if side.ndim == 4 else (DEPTH, width)), dtype=a.dtype)
        for side, width in ((a, TALL), (b, at.columns))
    ]
    scratch = Scratch(Ring.scratch(*panels, copies=2), own)
    out = jax.ShapeDtypeStruct((at.splits, at.n, P, Q), jnp.float32)
    inputs = Inputs(a, b, jnp.asarray(starts, jnp.int32))
    items = at.splits * at.n * at.tall * at.wide
    weight_gradients.__name__ = name
    (found,) = machine.launch(weight_gradients, inputs, (out,), scratch, items)
    return found[0] if at.splits == 1 else found.sum(0)


def _plan(n, P, Q, steps, cores) -> Plan:
    columns = next(c for c in (256, 192, 128, 64) if Q % c == 0)
    tiles = n * (P // TALL) * (Q // columns)

    def time(splits):
        return -(-tiles * splits // cores) * -(-steps // splits)

    most = min(MOST_SPLITS, steps)
    # The fewest splits that are within a tenth of the fastest: each is another sum to store.
    best = min(map(time, range(1, most + 1)))
    splits = next(s for s in range(1, most + 1) if time(s) <= 1.1 * best)
    return Plan(n, P // TALL, Q // columns, columns, splits, -(-steps // splits))


class _Tile(NamedTuple):
    split: Any
    n: Any
    row: Any
    column: Any
    first: Any  # stage of the rows
    count: Any  # stages


def _tile(at: Plan, item, steps: int) -> _Tile:
    places = []
    for size in (at.wide, at.tall, at.n):
        places.append(jax.lax.rem(item, jnp.int32(size)))
        item = jax.lax.div(item, jnp.int32(size))
    column, row, n = places
    first = item * at.steps
    count = jnp.clip(steps - first, 0, at.steps)
    return _Tile(item, n, row * TALL, column * at.columns, first, count)


def _stage(side, n, step, start, within, width: int):
    """64 rows of some features: from `start` on, or `within` block n of features by features."""
    if side.ndim == 2:
        return side.at[pl.ds(step * DEPTH, DEPTH), pl.ds(start, width)]
    per = side.shape[3] // DEPTH
    tile, part = jax.lax.div(step, jnp.int32(per)), jax.lax.rem(step, jnp.int32(per))
    return side.at[n, tile, pl.ds(within, width), pl.ds(part * DEPTH, DEPTH)]


def _copy(at: Plan, mine, steps, inputs: Inputs, ring: Ring):
    def item(i, step):
        tile = _tile(at, mine(i), steps)
        of_a = inputs.starts[tile.n, 0] + tile.row
        of_b = inputs.starts[tile.n, 1] + tile.column

        @pl.loop(jnp.int32(0), tile.count)
        def _(j):
            a = _stage(inputs.a, tile.n, tile.first + j, of_a, tile.row, TALL)
            b = _stage(inputs.b, tile.n, tile.first + j, of_b, tile.column, at.columns)
            ring.fill(
                step + j,
                (a, lambda s: ring.buffers[0].at[s]),
                (b, lambda s: ring.buffers[1].at[s]),
            )

        return step + tile.count

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))


def _compute(machine: Machine, at: Plan, mine, steps, inputs, out, scratch: Scratch, group):
    a, b = scratch.ring.buffers
    own = pl.ds(group * ROWS, ROWS)

    def operands(stage, _):
        if inputs.a.ndim == 4:
            left = Operand(a.at[stage, own])
        else:
            left = Operand(a.at[stage, :, own], True)
        return [left], Operand(b.at[stage], inputs.b.ndim == 4)

    def item(i, step):
        tile = _tile(at, mine(i), steps)
        (total,) = machine.products(scratch.ring, step, tile.count, operands, at.columns)
        for j in range(0, at.columns, DEPTH):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own = scratch.own.at[group]
            own[...] = total[:, j : j + DEPTH]
            plgpu.commit_smem()
            rows, columns = pl.ds(tile.row + group * ROWS, ROWS), pl.ds(tile.column + j, DEPTH)
            plgpu.copy_smem_to_gmem(own, out.at[tile.split, tile.n, rows, columns])
        return step + tile.count

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))
