"""Both factors of a Monarch product in one kernel for Hopper, z in shared memory between them.

A thread block has 64 rows and the blocks `beta` of one group of the second factor, so that the z
which these need, and no more, is made and kept: [group, 64, r]. First product: a warpgroup takes
turns of 64 columns of every z of the group. Features that go to one block of the second factor are
neighbours by the order of the first one's columns, which `_arranged` makes; pieces narrower than 64
are put beside each other in registers. Second product: a warpgroup takes turns of some columns of a
block.

The two warpgroups take turns of the ring as well: even stages are the first one's, so the number of
stages is even.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import (
    COMPUTE,
    DEPTH,
    ROWS,
    SHARED,
    Machine,
    Operand,
    Ring,
    shared,
)

MOST_COLUMNS = 128  # of a first product: 64 registers of a thread
MOST_REGISTERS = 128  # of first products that are put beside each other
MOST_BLOCKS = 8  # of a cluster
AXES = ("group", "row")  # of a cluster, along which groups and rows differ


class Plan(NamedTuple):
    """Sizes; see `product` for A, a, B, b, c. z of a block of the second factor has A c columns.

    group: blocks of the second factor that a thread block has.
    width: columns of a piece of z, of one block of the first factor.
    columns: of a turn of the second product.
    stages: of the ring.
    shared: thread blocks of a cluster that have other groups of the same rows, and other rows of
      the same group. What they have in common is copied once, to all.
    """

    A: int
    a: int
    B: int
    b: int
    c: int
    group: int
    width: int
    columns: int
    stages: int
    shared: tuple[int, int] = (1, 1)

    @property
    def cluster(self) -> tuple[tuple[str, int], ...]:
        """Its axes and their sizes."""
        return tuple(zip(AXES, self.shared, strict=True)) if self.shared != (1, 1) else ()

    def across(self, axis: str) -> str | None:
        """The axis where it has more than one thread block."""
        return axis if dict(zip(AXES, self.shared, strict=True))[axis] > 1 else None

    @property
    def depth(self) -> int:
        return self.A * self.c

    @property
    def pieces(self) -> int:
        """Of 64 columns of z."""
        return DEPTH // self.width

    @property
    def panel(self) -> int:
        """Rows of a stage: x and the first factor, or the second factor."""
        return max(ROWS + self.group * self.width, self.columns)


class Inputs(NamedTuple):
    x: Any  # [M, A a]
    first: Any  # [B / group, A c / width, group width, a]
    second: Any  # [B, b, A c], or None


class Scratch(NamedTuple):
    ring: Ring
    z: Any  # [group, ROWS, A c]
    y: Any  # [COMPUTE, ROWS, columns], or None
    turn: Any


def plan(M: int, A: int, a: int, B: int, b: int, c: int) -> Plan | None:
    """The sizes of `product`, or None where shared memory is too small.

    M and a are multiples of 64, b and A c of 128, c of 8.
    """
    width = next(w for w in (64, 32, 16, 8) if c % w == 0)
    for group in (4, 2, 1):
        columns = MOST_COLUMNS if group * b % (2 * MOST_COLUMNS) == 0 else ROWS
        at = Plan(A, a, B, b, c, group, width, columns, 0)
        left = SHARED - 2 * ROWS * (group * A * c + COMPUTE * columns)
        stages = left // (2 * DEPTH * at.panel) // 2 * 2
        registers = at.pieces * group * width // 2
        fits = group * width <= MOST_COLUMNS and registers <= MOST_REGISTERS
        if B % group == 0 and fits and stages >= 4:
            return at._replace(stages=min(stages, 8), shared=_cluster(M // ROWS, B // group))
    return None


def _cluster(tiles: int, groups: int) -> tuple[int, int]:
    """Thread blocks that share rows, and that share a group."""
    of_groups = next(n for n in (4, 2, 1) if groups % n == 0)
    return of_groups, next(n for n in (4, 2, 1) if tiles % n == 0 and n * of_groups <= MOST_BLOCKS)


def _arranged(first, at: Plan):
    """The first factor [A, a, B, c] in the order in which the kernel reads it."""
    parts = at.c // at.width
    first = first.reshape(at.A, at.a, at.B // at.group, at.group, parts, at.width)
    return first.transpose(2, 0, 4, 3, 5, 1).reshape(
        at.B // at.group, at.A * parts, at.group * at.width, at.a
    )


def product(name, x, first, second, at: Plan, machine: Machine, keep: bool = False):
    """y[m, beta] = sum over alpha, c of z[m, beta, alpha, c] second[beta, :, (alpha, c)], and z.

        z[m, beta, alpha, c] = x[m, alpha] first[alpha, :, beta, c]

    Args:
      name: of the kernel.
      x: [M, A a], M a multiple of 64.
      first: [A, a, B, c].
      second: [B, b, A c], or None: z alone.
      keep: give z too.

    Returns:
      y [M, B b] and z [M, B A c] in x's dtype; None for what is not wanted.
    """
    M, dtype = x.shape[0], x.dtype

    def monarch(mine, inputs, outputs, scratch):
        y = None if second is None else outputs[0]
        z = outputs[-1] if keep else None
        machine.roles(
            scratch.ring, 1,
            lambda group: _compute(machine, at, mine, y, z, scratch, group),
            lambda: _copy(at, mine, inputs, scratch.ring),
        )  # fmt: skip

    outputs = [] if second is None else [jax.ShapeDtypeStruct((M, at.B * at.b), dtype)]
    if keep:
        outputs.append(jax.ShapeDtypeStruct((M, at.B * at.depth), dtype))
    panels = shared(at.stages, at.panel, DEPTH, dtype=dtype)
    cluster = tuple(name for name, _ in at.cluster) if machine.chip else ()
    ring = Ring.scratch(panels, copies=2, arrivals=1, cluster=cluster)
    scratch = Scratch(
        ring,
        shared(at.group, ROWS, at.depth, dtype=dtype),
        None if second is None else shared(COMPUTE, ROWS, at.columns, dtype=dtype),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=1),
    )
    items = M // ROWS * (at.B // at.group) // math.prod(at.shared)
    monarch.__name__ = name
    inputs = Inputs(x, _arranged(first, at), second)
    found = machine.launch(monarch, inputs, outputs, scratch, items, at.cluster)
    return None if second is None else found[0], found[-1] if keep else None


def _turns(at: Plan, second: bool):
    """((turns of a warpgroup, steps of a turn) of the first product, those of the second)."""
    one = at.depth // DEPTH // COMPUTE, at.pieces * at.a // DEPTH
    two = at.group * at.b // at.columns // COMPUTE, at.depth // DEPTH
    return one, two if second else (0, 0)


def _place(at: Plan, item):
    """First row, and which group."""
    groups = jnp.int32(at.B // at.group // at.shared[0])
    row, group = jax.lax.div(item, groups), jax.lax.rem(item, groups)
    if at.cluster:
        group = group * at.shared[0] + jax.lax.axis_index("group")
        row = row * at.shared[1] + jax.lax.axis_index("row")
    return row * ROWS, group


def _copy(at: Plan, mine, inputs: Inputs, ring: Ring):
    (panel,), chunks = ring.buffers, jnp.int32(at.a // DEPTH)
    one, two = _turns(at, inputs.second is not None)

    def first(row, group, turn, t, step):
        piece = turn * at.pieces + jax.lax.div(t, chunks)
        column = jax.lax.rem(t, chunks) * DEPTH
        alpha = jax.lax.div(piece, jnp.int32(at.c // at.width))
        rows = at.group * at.width
        ring.fill(
            step,
            (
                inputs.x.at[pl.ds(row, ROWS), pl.ds(alpha * at.a + column, DEPTH)],
                lambda stage: panel.at[stage, 0:ROWS],
                at.across("group"),
            ),
            (
                inputs.first.at[group, piece, :, pl.ds(column, DEPTH)],
                lambda stage: panel.at[stage, ROWS : ROWS + rows],
                at.across("row"),
            ),
        )

    def second(row, group, turn, t, step):
        block, column = _second(at, turn)
        half = at.columns // 2
        ring.fill(step, *(
            (
                inputs.second.at[
                    group * at.group + block, pl.ds(column + i, half), pl.ds(t * DEPTH, DEPTH)
                ],
                lambda stage, i=i: panel.at[stage, i : i + half],
                at.across("row"),
            )
            for i in (0, half)
        ))  # fmt: skip

    def run(fill, turns, steps, row, group, step):
        count = turns * steps * COMPUTE

        @pl.loop(jnp.int32(0), jnp.int32(count))
        def _(i):
            # The warpgroups by turns: steps of a turn of one are COMPUTE apart.
            turn, t = jax.lax.div(i, jnp.int32(steps * COMPUTE)), jax.lax.div(i, jnp.int32(COMPUTE))
            turn = turn * COMPUTE + jax.lax.rem(i, jnp.int32(COMPUTE))
            fill(row, group, turn, jax.lax.rem(t, jnp.int32(steps)), step + i)

        return step + count

    def item(i, step):
        row, group = _place(at, mine(i))
        step = run(first, *one, row, group, step)
        return run(second, *two, row, group, step) if two[0] else step

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, jnp.int32(0))


def _second(at: Plan, turn):
    """Which block of the group, and which of its columns."""
    turns = jnp.int32(at.b // at.columns)
    return jax.lax.div(turn, turns), jax.lax.rem(turn, turns) * at.columns


def _compute(machine: Machine, at: Plan, mine, y, z, scratch: Scratch, warpgroup):
    one, two = _turns(at, y is not None)

    def item(i, step):
        row, group = _place(at, mine(i))

        def first(turn, step):
            _first_turn(machine, at, scratch, turn * COMPUTE + warpgroup, step)
            return step + one[1] * COMPUTE

        step = jax.lax.fori_loop(jnp.int32(0), jnp.int32(one[0]), first, step)
        plgpu.commit_smem()
        _meet(scratch.turn)
        if z is not None:
            pl.when(warpgroup == 0)(lambda: _store_z(at, scratch.z, z, row, group))
        if y is not None:

            def second(turn, step):
                _second_turn(
                    machine, at, scratch, y, row, group, turn * COMPUTE + warpgroup, step, warpgroup
                )
                return step + two[1] * COMPUTE

            step = jax.lax.fori_loop(jnp.int32(0), jnp.int32(two[0]), second, step)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _meet(scratch.turn)  # z is free
        return step

    jax.lax.fori_loop(jnp.int32(0), mine.count, item, warpgroup)


def _meet(turn):
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _first_turn(machine, at: Plan, scratch: Scratch, turn, step):
    """64 columns of each z of the group."""
    (panel,), chunks, columns = scratch.ring.buffers, at.a // DEPTH, at.group * at.width

    def operands(stage, _):
        b = panel.at[stage, ROWS : ROWS + columns]
        return [Operand(panel.at[stage, 0:ROWS])], Operand(b, True)

    pieces = []
    for i in range(at.pieces):
        (total,) = machine.products(
            scratch.ring, step + i * chunks * COMPUTE, chunks, operands, columns, every=COMPUTE
        )
        pieces.append(total.astype(scratch.z.dtype))
    for block in range(at.group):
        at_block = slice(block * at.width, (block + 1) * at.width)
        tile = machine.beside([piece[:, at_block] for piece in pieces])
        scratch.z[block, :, pl.ds(turn * DEPTH, DEPTH)] = tile


def _second_turn(machine, at: Plan, scratch, y, row, group, turn, step, warpgroup):
    """Some columns of a block of y."""
    (panel,) = scratch.ring.buffers
    block, column = _second(at, turn)

    def operands(stage, i):
        a = scratch.z.at[block, :, pl.ds(i * DEPTH, DEPTH)]
        return [Operand(a)], Operand(panel.at[stage, 0 : at.columns], True)

    (total,) = machine.products(
        scratch.ring, step, at.depth // DEPTH, operands, at.columns, every=COMPUTE
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own = scratch.y.at[warpgroup]
    own[...] = total.astype(own.dtype)
    plgpu.commit_smem()
    first = (group * at.group + block) * at.b + column
    plgpu.copy_smem_to_gmem(own, y.at[pl.ds(row, ROWS), pl.ds(first, at.columns)])


def _store_z(at: Plan, own, z, row, group):
    for block in range(at.group):
        columns = pl.ds((group * at.group + block) * at.depth, at.depth)
        plgpu.copy_smem_to_gmem(own.at[block], z.at[pl.ds(row, ROWS), columns])
