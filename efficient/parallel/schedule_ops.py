"""What a pipeline schedule is, and whether it can run: ops, their order, what they wait for."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

from efficient.errors import UserError


@dataclasses.dataclass(frozen=True)
class Op:
    """One pass of one micro-batch through one chunk of a stage.

    Attributes:
      kind: `F` for forward, `B` for backward.
      microbatch: which micro-batch.
      chunk: which of the stage's own chunks.
    """

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.microbatch}, chunk {self.chunk}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every stage does, in which order.

    Attributes:
      name: one of `schedules.BUILDERS`, or any other for a schedule of one's own.
      stages: p, the ranks of the pipeline.
      microbatches: m, the parts of a batch.
      chunks: v, the chunks of layers on a stage.
      ops: for each stage its ops in their order.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    ops: tuple[tuple[Op, ...], ...]


def needs(op: Op, stage: int, stages: int, chunks: int) -> tuple[tuple[int, Op], ...]:
    """The ops whose results `op` on `stage` reads, as (stage, op)."""

    def at(place: int) -> tuple[int, Op]:
        return place % stages, Op(op.kind, op.microbatch, place // stages)

    place = op.chunk * stages + stage
    if op.kind == "F":
        return (at(place - 1),) if place > 0 else ()
    later = (at(place + 1),) if place + 1 < stages * chunks else ()
    return ((stage, Op("F", op.microbatch, op.chunk)), *later)


# What is asked for one schedule is asked again, by its times, its ticks and its slots.
@functools.lru_cache(maxsize=16)
def execution_order(schedule: Schedule) -> tuple[tuple[int, Op, tuple[tuple[int, Op], ...]], ...]:
    """All (stage, op, what it needs), each after what it needs and in the order of its stage.

    Raises:
      UserError: what `check` refuses.
    """
    _once_each(schedule)
    rows = [
        [(stage, op, needs(op, stage, schedule.stages, schedule.chunks)) for op in ops]
        for stage, ops in enumerate(schedule.ops)
    ]
    position, done, order = [0] * schedule.stages, set(), []
    before = -1
    while before < len(order):
        before = len(order)
        for stage, row in enumerate(rows):
            while position[stage] < len(row):
                step = row[position[stage]]
                if not done.issuperset(step[2]):
                    break
                done.add(step[:2])
                order.append(step)
                position[stage] += 1
    if len(order) < sum(map(len, rows)):
        raise UserError(_halt(rows, position, done, schedule.name))
    return tuple(order)


def check(schedule: Schedule) -> None:
    """Refuses a schedule that does not do every pass once, or that cannot run to its end.

    Raises:
      UserError: says what is wrong.
    """
    execution_order(schedule)


def _once_each(schedule: Schedule) -> None:
    name = f"schedule {schedule.name!r}"
    positive(stages=schedule.stages, microbatches=schedule.microbatches, chunks=schedule.chunks)
    if len(schedule.ops) != schedule.stages:
        raise UserError(f"{name} orders {len(schedule.ops)} stages, but has {schedule.stages}")
    expected = {
        Op(kind, microbatch, chunk)
        for kind in "FB"
        for microbatch in range(schedule.microbatches)
        for chunk in range(schedule.chunks)
    }
    for stage, ops in enumerate(schedule.ops):
        for op, times in collections.Counter(ops).items():
            if op not in expected:
                raise UserError(
                    f"{name} has {op} on stage {stage}; kinds are F and B, micro-batches below"
                    f" {schedule.microbatches}, chunks below {schedule.chunks}"
                )
            if times > 1:
                raise UserError(f"{name} has {op} {times} times on stage {stage}; keep one")
        absent = sorted(expected.difference(ops), key=str)
        if absent:
            raise UserError(f"{name} never does {absent[0]} on stage {stage}; add it")


def _halt(rows: Sequence, position: Sequence[int], done: set[tuple[int, Op]], name: str) -> str:
    """Names an op that comes too late; dependencies have no cycle, so the walk finds one."""
    stage = next(s for s, row in enumerate(rows) if position[s] < len(row))
    while True:
        _, op, needed = rows[stage][position[stage]]
        source, missing = next(need for need in needed if need not in done)
        _, head, _ = rows[source][position[source]]
        if source == stage or head != missing:
            return (
                f"schedule {name!r} comes to a halt: {op} on stage {stage} waits for"
                f" {missing} on stage {source}, which stands behind {head} there; reorder them"
            )
        stage = source


def positive(**sizes: int) -> None:
    """Refuses sizes of a pipeline below one."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"a pipeline needs at least one of its {name}, not {size}")
