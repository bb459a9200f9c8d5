"""Products of blocks of features with blocks of weights on Hopper, the weights kept on chip.

A thread block loads weights of one block of features once and stays with them: rows stream past in
tiles of 128. So weights cost next to no bandwidth, and what a product moves is its rows, once in
and once out. Blocks whose weights are too large for shared memory are cut into panels of columns,
each with thread blocks of its own, which read the same rows at about the same time, out of L2.

    to_features     x [M, N P], rows by rows        ->  z, features by features
    to_rows         x, or z, features by features   ->  y [M, N Q]

z is [D, M / 128, F, 128]: of one of D blocks, and of 128 rows, the features one after another, each
of the 128 rows. There a permutation of features moves whole rows of 256 bytes, which TMA does while
it stores, and the block that the second product reads next is one contiguous piece of memory. As
an operand of wgmma it is the transposed one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import COMPUTE, DEPTH, ROWS, SHARED, Machine, Operand, Ring, shared

TALL = COMPUTE * ROWS  # rows of a tile
FEWEST_STAGES = 3


class Plan(NamedTuple):
    """N blocks of P features in and Q out, of `tiles` tiles of rows.

    columns: of a panel. stages: of the ring. groups: thread blocks that share a panel's rows out.
    """

    tiles: int
    N: int
    P: int
    Q: int
    columns: int
    stages: int
    groups: int

    @property
    def panels(self) -> int:
        return self.Q // self.columns

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.P // DEPTH


class Scratch(NamedTuple):
    weights: Ring  # of one stage: a panel
    ring: Ring
    own: Any  # [COMPUTE, ROWS, ROWS], through which results leave


def plan(M: int, N: int, P: int, Q: int, cores: int) -> Plan | None:
    """The sizes, M rows in whole tiles of 128; None where shared memory is too small.

    P is a multiple of 64, Q of 128.
    """
    left = SHARED - 2 * COMPUTE * ROWS**2
    for columns in (256, 128):
        stages = (left - 2 * P * columns) // (2 * TALL * DEPTH)
        if Q % columns == 0 and stages >= FEWEST_STAGES:
            groups = max(1, min(M // TALL, cores // (N * Q // columns)))
            return Plan(M // TALL, N, P, Q, columns, min(stages, 8), groups)
    return None


def whole_tiles(x):
    """x [M, F] with rows of zeros behind, to whole tiles."""
    more = -x.shape[0] % TALL
    return jnp.pad(x, ((0, more), (0, 0))) if more else x


def to_features(name, x, weights, D: int, at: Plan, machine: Machine):
    """z[d, t, n C + c, m] = sum over p of x[128 t + m, n P + p] weights[n, d C + c, p], C = Q / D.

    Args:
      name: of the kernel.
      x: [M, N P], M in whole tiles.
      weights: [N, Q, P].
      D: blocks of z; C is 8, 16, 32 or a multiple of 64.

    Returns:
      z [D, M / 128, N C, 128] in x's dtype.
    """
    C = at.Q // D
    piece = min(C, ROWS)
    out = jax.ShapeDtypeStruct((D, at.tiles, at.N * C, TALL), x.dtype)

    def panel(weights, n, column, step):
        return weights.at[n, pl.ds(column, at.columns), pl.ds(step * DEPTH, DEPTH)]

    def stage(x, n, tile, step):
        return x.at[pl.ds(tile * TALL, TALL), pl.ds(n * at.P + step * DEPTH, DEPTH)]

    def compute(scratch: Scratch, z, n, column, tile, step, group):
        (held,), (rows,) = scratch.weights.buffers, scratch.ring.buffers
        chunks = at.columns // TALL  # of 64 features, of a warpgroup
        first = group * chunks * ROWS

        def operands(stage, i):
            a = [held.at[0, i, pl.ds(first + j * ROWS, ROWS)] for j in range(chunks)]
            return [Operand(part) for part in a], Operand(rows.at[stage], True)

        totals = [machine.full((ROWS, TALL), 0) for _ in range(chunks)]
        totals = machine.products(scratch.ring, step, at.steps, operands, TALL, totals=totals)
        for j, total in enumerate(totals):
            feature = column + first + j * ROWS
            of_first = jax.lax.div(feature, jnp.int32(C))
            row = n * C + feature - of_first * C  # n C where a block has less than 64 of them
            for half in range(0, TALL, ROWS):
                own = _own(scratch, group, total[:, half : half + ROWS])
                for k in range(0, ROWS, piece):
                    block = of_first + k // C
                    target = z.at[block, tile, pl.ds(row, piece), pl.ds(half, ROWS)]
                    plgpu.copy_smem_to_gmem(
                        own.at[pl.ds(k, piece)], target, commit_group=k + piece == ROWS
                    )

    sizes = (at.columns, DEPTH), (TALL, DEPTH)
    return _launch(name, x, weights, out, sizes, at, machine, panel, stage, compute)


def to_rows(name, x, weights, at: Plan, machine: Machine, stride: int | None = None):
    """y[m, n Q + q] = sum over p of x[m, n P + p] weights[n, p, q].

    Args:
      name: of the kernel.
      x: [M, N P], M in whole tiles; or features by features, [N, M / 128, P, 128].
      weights: [N, P, Q].
      stride: of a butterfly factor: the halves of block n of x [M, N P], and of y, are halves
        2 d stride + t and stride further, n = d stride + t. P / 2 and Q / 2 are multiples of 64.

    Returns:
      y [M, N Q] in x's dtype.
    """
    out = jax.ShapeDtypeStruct((at.tiles * TALL, at.N * at.Q), x.dtype)
    by_features = x.ndim == 4

    def panel(weights, n, column, step):
        return weights.at[n, pl.ds(step * DEPTH, DEPTH), pl.ds(column, at.columns)]

    def stage(x, n, tile, step):
        if by_features:
            return x.at[n, tile, pl.ds(step * DEPTH, DEPTH)]
        column = _column(n, step * DEPTH, at.P, stride)
        return x.at[pl.ds(tile * TALL, TALL), pl.ds(column, DEPTH)]

    def compute(scratch: Scratch, y, n, column, tile, step, group):
        (held,), (rows,) = scratch.weights.buffers, scratch.ring.buffers
        mine = pl.ds(group * ROWS, ROWS)

        def operands(stage, i):
            a = rows.at[stage, :, mine] if by_features else rows.at[stage, mine]
            return [Operand(a, by_features)], Operand(held.at[0, i])

        (total,) = machine.products(scratch.ring, step, at.steps, operands, at.columns)
        row = pl.ds(tile * TALL + group * ROWS, ROWS)
        for j in range(at.columns // ROWS):
            own = _own(scratch, group, total[:, j * ROWS : (j + 1) * ROWS])
            first = _column(n, column + j * ROWS, at.Q, stride)
            plgpu.copy_smem_to_gmem(own, y.at[row, pl.ds(first, ROWS)])

    of_rows = (DEPTH, TALL) if by_features else (TALL, DEPTH)
    sizes = (DEPTH, at.columns), of_rows
    return _launch(name, x, weights, out, sizes, at, machine, panel, stage, compute)


def _column(n, feature, width: int, stride: int | None):
    """Of the first of 64 features of block n, all in one half of it."""
    if stride is None:
        return n * width + feature
    half = jnp.int32(width // 2)
    d, h = jax.lax.div(n, jnp.int32(stride)), jax.lax.div(feature, half)
    return ((2 * d + h) * stride + n - d * stride) * half + feature - h * half


def _own(scratch: Scratch, group, values):
    """A warpgroup's buffer with `values`, ready to be copied, when its last copy has left it."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own = scratch.own.at[group]
    own[...] = values.astype(own.dtype)
    plgpu.commit_smem()
    return own


def _launch(name, rows, weights, out, sizes, at: Plan, machine: Machine, panel, stage, compute):
    """Runs `compute` on every tile, with what `panel` and `stage` take copied into rings.

    Args:
      sizes: of what is copied of weights and of rows for one step.
    """

    def body(mine, inputs, outputs, scratch: Scratch):
        rows, weights = inputs

        def each(panel_of):
            """panel_of(i-th item, block, column, count of tiles, tile, step of the ring)."""

            def item(i, step):
                at_panel, first = (
                    f(mine(i), jnp.int32(at.N * at.panels)) for f in (jax.lax.rem, jax.lax.div)
                )
                n = jax.lax.div(at_panel, jnp.int32(at.panels))
                column = (at_panel - n * at.panels) * at.columns
                count = jax.lax.div(at.tiles - first + at.groups - 1, jnp.int32(at.groups))
                panel_of(i, n, column, count, lambda j: first + j * at.groups, step)
                return step + count * at.steps

            jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))

        def copying():
            def fill(i, n, column, count, tile, step):
                held = scratch.weights.buffers[0]
                scratch.weights.fill(i, *(
                    (panel(weights, n, column, j), lambda s, j=j: held.at[s, j])
                    for j in range(at.steps)
                ))  # fmt: skip

                @pl.loop(jnp.int32(0), count * at.steps)
                def _(j):
                    at_tile = tile(jax.lax.div(j, jnp.int32(at.steps)))
                    source = stage(rows, n, at_tile, jax.lax.rem(j, jnp.int32(at.steps)))
                    target = scratch.ring.buffers[0]
                    scratch.ring.fill(step + j, (source, lambda s: target.at[s]))

            each(fill)

        def computing(group):
            def use(i, n, column, count, tile, step):
                plgpu.barrier_wait(scratch.weights.filled.at[0])

                @pl.loop(jnp.int32(0), count)
                def _(j):
                    at_step = step + j * at.steps
                    compute(scratch, outputs[0], n, column, tile(j), at_step, group)

                scratch.weights.free(0)

            each(use)

        machine.roles((scratch.weights, scratch.ring), computing, copying)

    of_weights, of_rows = sizes
    dtype = rows.dtype
    scratch = Scratch(
        Ring.scratch(shared(1, at.steps, *of_weights, dtype=dtype), copies=at.steps),
        Ring.scratch(shared(at.stages, *of_rows, dtype=dtype), copies=1),
        shared(COMPUTE, ROWS, ROWS, dtype=dtype),
    )
    body.__name__ = name
    items = at.N * at.panels * at.groups
    (found,) = machine.launch(body, (rows, weights), (out,), scratch, items)
    return found
