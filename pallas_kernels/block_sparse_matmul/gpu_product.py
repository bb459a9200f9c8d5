"""x by a matrix of which few blocks are live, in one kernel for Hopper; transposed for dx.

A thread block makes 256 rows of 128 columns at a time, in registers: it runs along a list of the
live blocks of that column, 64 deep a stage, and then along the low-rank term, so that what is empty
costs nothing and sums are rounded once. Tiles are taken from a list, those of most blocks first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.settings import Settings
from pallas_kernels.epilogue import finish
from pallas_kernels.hopper import COMPUTE, DEPTH, ROWS, TILE, Machine, Operand, Ring, shared

WIDE = 128  # columns of a tile, and what the sizes of blocks are multiples of
PARTS = 2  # of a warpgroup: twice the rows of one wgmma, so that it reads the weights less often
TALL = COMPUTE * PARTS * ROWS  # rows of a tile
STAGES = 4

OF_COLUMNS = TILE.reduce(0)


class Inputs(NamedTuple):
    x: Any  # [M, I]
    blocks: Any  # [nnz, bi, bo]
    low: Any  # [M, r] times `other`, or None
    other: Any  # [r, O]; transposed [O, r]
    gamma: Any  # float32[1], or None
    bias: Any  # float32[O], or None
    tiles: Any  # int32[T, 3]: first column, first entry of `live`, entries
    live: Any  # int32[n, 2]: first column of x, and number of a block


class Plan(NamedTuple):
    """transposed: whether a column of tiles is a row of blocks. tall: tiles of rows.

    pieces: tiles of a block, next to each other. depth, low: stages of a block and of the low rank.
    """

    transposed: bool
    tall: int
    pieces: int
    depth: int
    low: int
    activation: str | None


class Scratch(NamedTuple):
    ring: Ring
    own: Any  # [COMPUTE, ROWS, WIDE]
    bias: Any  # float32[COMPUTE, WIDE], or None
    arrived: Any


def lists(columns, inner: int, outer: int):
    """(tiles, live) of `columns`, each of live (row, number), of blocks [inner, outer]."""
    live = np.array([at for column in columns for at in column], np.int32).reshape(-1, 2)
    live = live * np.array([inner, 1], np.int32)
    counts = np.array([len(column) for column in columns])
    starts = np.cumsum(counts) - counts
    tiles = [
        (c * outer + piece, starts[c], counts[c])
        for c in np.argsort(-counts, kind="stable")
        for piece in range(0, outer, WIDE)
    ]
    return np.array(tiles, np.int32), live


def multiply(
    name: str,
    x,
    blocks,
    columns,
    low,
    other,
    gamma,
    bias,
    settings: Settings,
    machine: Machine,
    *,
    save: bool = False,
    transposed: bool = False,
):
    """activation(gamma x B + low other + bias) [M, O], and what the activation was given or None.

    Args:
      name: of the kernel.
      x, low: of M rows, a multiple of 256; low [M, r] and other [r, O] or None, r a multiple of 64.
      columns: as `BlockMask.columns`.
      save: whether the second result is wanted, where there is an activation.
      transposed: B^T in place of B; `columns` are then `BlockMask.rows`, other is [O, r].
    """
    inner, outer = blocks.shape[1:][:: -1 if transposed else 1]
    tiles, live = lists(columns, inner, outer)
    at = Plan(
        transposed, x.shape[0] // TALL, outer // WIDE, inner // DEPTH,
        0 if low is None else low.shape[1] // DEPTH, settings.activation,
    )  # fmt: skip
    # An empty list would be an array without elements.
    live = live if len(live) else np.zeros((1, 2), np.int32)
    inputs = Inputs(x, blocks, low, other, gamma, bias, jnp.asarray(tiles), jnp.asarray(live))

    def body(mine, inputs, outputs, scratch):
        machine.roles(
            (scratch.ring,),
            lambda group: _compute(machine, at, mine, inputs, outputs, scratch, group),
            lambda: _copy(at, mine, inputs, scratch.ring),
        )  # fmt: skip

    body.__name__ = name
    panel = (WIDE, DEPTH) if transposed else (DEPTH, WIDE)
    panels = (TALL, DEPTH), panel
    scratch = Scratch(
        Ring.scratch(*(shared(STAGES, *size, dtype=x.dtype) for size in panels), copies=2),
        shared(COMPUTE, ROWS, WIDE, dtype=x.dtype),
        None if bias is None else plgpu.SMEM((COMPUTE, WIDE), jnp.float32),
        None if bias is None else plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE),
    )
    y = jax.ShapeDtypeStruct((x.shape[0], len(columns) * outer), x.dtype)
    both = save and settings.activation is not None
    found = machine.launch(body, inputs, (y, y) if both else (y,), scratch, len(tiles) * at.tall)
    return found[0], found[1] if both else None


class _Tile(NamedTuple):
    row: Any
    column: Any
    start: Any
    count: Any  # live blocks


def _tile(at: Plan, inputs: Inputs, item) -> _Tile:
    """Of neighbouring items the columns are the same."""
    row, i = jax.lax.rem(item, jnp.int32(at.tall)), jax.lax.div(item, jnp.int32(at.tall))
    return _Tile(row * TALL, *(inputs.tiles[i, j] for j in range(3)))


def _copy(at: Plan, mine, inputs: Inputs, ring: Ring):
    def fill(step, left, right):
        ring.fill(
            step,
            (left, lambda stage: ring.buffers[0].at[stage]),
            (right, lambda stage: ring.buffers[1].at[stage]),
        )

    def piece(first, depth):
        """Index of a panel of weights."""
        deep, wide = pl.ds(depth, DEPTH), pl.ds(first, WIDE)
        return (wide, deep) if at.transposed else (deep, wide)

    def item(i, step):
        tile = _tile(at, inputs, mine(i))
        rows = pl.ds(tile.row, TALL)
        within = jax.lax.rem(tile.column, jnp.int32(at.pieces * WIDE))

        @pl.loop(jnp.int32(0), tile.count * at.depth)
        def _(j):
            entry = tile.start + jax.lax.div(j, jnp.int32(at.depth))
            column, number = (inputs.live[entry, k] for k in range(2))
            depth = jax.lax.rem(j, jnp.int32(at.depth)) * DEPTH
            panel = inputs.blocks.at[number, *piece(within, depth)]
            fill(step + j, inputs.x.at[rows, pl.ds(column + depth, DEPTH)], panel)

        step += tile.count * at.depth
        if at.low:

            @pl.loop(jnp.int32(0), jnp.int32(at.low))
            def _(j):
                panel = inputs.other.at[piece(tile.column, j * DEPTH)]
                fill(step + j, inputs.low.at[rows, pl.ds(j * DEPTH, DEPTH)], panel)

        return step + at.low

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))


def _compute(machine: Machine, at: Plan, mine, inputs: Inputs, outputs, scratch: Scratch, group):
    x, weights = scratch.ring.buffers

    def operands(stage, _):
        first = group * PARTS * ROWS
        parts = [x.at[stage, pl.ds(first + i * ROWS, ROWS)] for i in range(PARTS)]
        return [Operand(part) for part in parts], Operand(weights.at[stage], at.transposed)

    def item(i, step):
        tile = _tile(at, inputs, mine(i))
        bias = None if inputs.bias is None else _bias(machine, inputs, scratch, tile, group)
        totals = [machine.full((ROWS, WIDE), 0) for _ in range(PARTS)]
        steps = tile.count * at.depth
        totals = machine.products(scratch.ring, step, steps, operands, WIDE, totals=totals)
        if inputs.gamma is not None:
            gamma = inputs.gamma[0]
            totals = [total * gamma for total in totals]
        step += steps
        if at.low:
            totals = machine.products(scratch.ring, step, at.low, operands, WIDE, totals=totals)
        for part, total in enumerate(totals):
            if bias is not None:
                total = total + jax.lax.broadcast_in_dim(bias, total.shape, (1,))
            row = tile.row + (group * PARTS + part) * ROWS
            for output in outputs[1:]:
                _store(scratch.own.at[group], total, output, row, tile.column)
            total = finish(total, None, at.activation)
            _store(scratch.own.at[group], total, outputs[0], row, tile.column)
        return step + at.low

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))


def _bias(machine, inputs, scratch, tile, group):
    """Of the tile's columns, in registers."""
    own, arrived = scratch.bias.at[group], scratch.arrived.at[group]
    plgpu.copy_gmem_to_smem(inputs.bias.at[pl.ds(tile.column, WIDE)], own, arrived)
    plgpu.barrier_wait(arrived)
    bias = own[...]
    if machine.chip:
        bias = plgpu.layout_cast(bias, OF_COLUMNS)
    plgpu.commit_smem()  # the threads have read it before it is written again
    return bias


def _store(own, values, output, row, column):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own[...] = values.astype(own.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, output.at[pl.ds(row, ROWS), pl.ds(column, WIDE)])
