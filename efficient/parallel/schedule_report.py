"""Pipeline schedules in time: simulation, bubble, memory, as text and as a picture.

Every stage does its ops in order, each as soon as its inputs are there. A micro-batch's pass
through a whole stage costs `forward` or `backward`, through one of v chunks a v-th of that. With
p stages and m micro-batches a stage computes for m (forward + backward); the `bubble` is its idle
time over that, as in arXiv 2104.04473, and `bubble_share` its idle time over the whole step, as in
arXiv 1811.06965. With exact numbers for the costs (`fractions.Fraction`) the results are exact.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from efficient.cli import main_guard
from efficient.errors import UserError, nearest
from efficient.parallel.schedule_ops import Op, Schedule, execution_order
from efficient.parallel.schedule_table import lockstep_bubble, slots, ticks
from efficient.parallel.schedules import BUILDERS, CHUNKED, build

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's blue and vermilion, told apart by the colour-blind.
COLORS = {"F": "#0072B2", "B": "#D55E00"}


@dataclasses.dataclass(frozen=True)
class Span:
    """One op and when it runs."""

    op: Op
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When every op of a schedule runs.

    Attributes:
      schedule: whose ops these are.
      forward, backward: the cost of a micro-batch's pass through a whole stage.
      spans: for each stage its ops with their times, in order.
    """

    schedule: Schedule
    forward: float
    backward: float
    spans: tuple[tuple[Span, ...], ...]

    @functools.cached_property
    def makespan(self) -> float:
        """From the start of the first op to the end of the last one."""
        return max(stage[-1].end for stage in self.spans)

    @property
    def compute(self) -> float:
        """How long each stage computes; the makespan without a bubble."""
        return self.schedule.microbatches * (self.forward + self.backward)

    @property
    def bubble(self) -> float:
        """A stage's idle time over its time of computing."""
        return self.makespan / self.compute - 1

    @property
    def bubble_share(self) -> float:
        """A stage's idle time over the whole step."""
        return 1 - self.compute / self.makespan

    @functools.cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """For each stage, the most chunk passes it holds between forward and backward."""
        steps = ([1 if span.op.kind == "F" else -1 for span in stage] for stage in self.spans)
        return tuple(max(itertools.accumulate(stage)) for stage in steps)

    @property
    def peak_stage_activations(self) -> tuple[float, ...]:
        """The same in units of one micro-batch's activations of a whole stage."""
        return tuple(peak / self.schedule.chunks for peak in self.peak_activations)

    @functools.cached_property
    def gradients_complete(self) -> tuple[tuple[float, ...], ...]:
        """[stage][chunk]: when the last backward pass through the chunk ends.

        From then on the chunk's gradient can be reduced over replicas, beside what still computes.
        """
        last = [
            {span.op.chunk: span.end for span in stage if span.op.kind == "B"}
            for stage in self.spans
        ]
        return tuple(tuple(ends[chunk] for chunk in sorted(ends)) for ends in last)


def simulate(
    schedule: Schedule, forward: float = 1.0, backward: float = 2.0, transfer: float = 0
) -> Timeline:
    """Runs a schedule on stages that each keep their own time.

    Args:
      schedule: the ops; refused where `check` refuses it.
      forward, backward: the cost of a micro-batch's pass through a whole stage.
      transfer: from the end of an op until its result is at another stage. It delays the receiver
        alone; sending costs a stage nothing.
    """
    if not (min(forward, backward) > 0 and 0 <= transfer < math.inf > forward + backward):
        raise UserError(
            f"costs must be positive, not forward {forward}, backward {backward}, transfer"
            f" {transfer}"
        )
    cost = {"F": forward / schedule.chunks, "B": backward / schedule.chunks}
    ends: dict[tuple[int, Op], float] = {}
    spans: list[list[Span]] = [[] for _ in range(schedule.stages)]
    for stage, op, needed_ops in execution_order(schedule):
        ready = [spans[stage][-1].end] if spans[stage] else [0]
        for other, needed in needed_ops:
            ready.append(ends[other, needed] + (transfer if other != stage else 0))
        start = max(ready)
        ends[stage, op] = start + cost[op.kind]
        spans[stage].append(Span(op, start, ends[stage, op]))
    return Timeline(schedule, forward, backward, tuple(map(tuple, spans)))


def _known(name: str) -> None:
    if name not in BUILDERS:
        raise UserError(f"there is no formula for {name!r}; {nearest(name, BUILDERS)}")


def bubble_formula(name: str, stages: int, microbatches: int, chunks: int = 1) -> Fraction:
    """A stage's idle time over its time of computing, without transfers.

    For `modular` with fewer micro-batches than stages it includes the wait at each change of
    chunk, (v - 1) (p - m) / (v m).
    """
    _known(name)
    idle = stages - 1
    if name == "modular":
        idle += (chunks - 1) * max(0, stages - microbatches)
    return Fraction(idle, microbatches * (chunks if name in CHUNKED else 1))


def peak_formula(name: str, stages: int, microbatches: int, chunks: int = 1) -> tuple[int, ...]:
    """For each stage, the most chunk passes it holds between forward and backward."""
    _known(name)
    passes = microbatches * (chunks if name in CHUNKED else 1)
    after = [stages - 1 - stage for stage in range(stages)]
    ahead = {
        "1f1b": after,
        "eager_1f1b": [2 * n for n in after],
        "interleaved": [2 * n + (chunks - 1) * stages for n in after],
    }.get(name, [passes] * stages)
    return tuple(min(passes, n + 1) for n in ahead)


def label(op: Op, chunks: int) -> str:
    """`F3`, and with several chunks `F3.1` for chunk 1."""
    return f"{op.kind}{op.microbatch}" + (f".{op.chunk}" if chunks > 1 else "")


def table(schedule: Schedule) -> str:
    """One row a stage, its ops from left to right; `F3.1` is micro-batch 3 forward in chunk 1."""
    rows = [[label(op, schedule.chunks) for op in ops] for ops in schedule.ops]
    width = max(len(cell) for row in rows for cell in row)
    margin = len(str(schedule.stages - 1))
    return "\n".join(
        f"stage {stage:>{margin}}  {' '.join(cell.ljust(width) for cell in row)}".rstrip()
        for stage, row in enumerate(rows)
    )


def summary(timeline: Timeline) -> str:
    """Bubble, memory and gradients in a few lines."""
    schedule = timeline.schedule
    steps = ticks(schedule)
    buffers = slots(steps)
    bubble = f"{timeline.bubble:.1%} of the computing time, {timeline.bubble_share:.1%} of the step"
    if schedule.name in BUILDERS:
        size = schedule.stages, schedule.microbatches, schedule.chunks
        bubble += f"; by formula {float(bubble_formula(schedule.name, *size)):.1%}"
    first = [float(ends[-1] / timeline.makespan) for ends in timeline.gradients_complete]
    lockstep = lockstep_bubble(steps, timeline.forward, timeline.backward)
    return "\n".join(
        [
            f"time             {float(timeline.makespan):g}",
            f"bubble           {bubble}",
            f"bubble, lockstep {lockstep:.1%} of the computing time, {len(steps)} ticks",
            f"passes held      {_numbers(timeline.peak_activations)} by stage",
            f"in whole stages  {_numbers(timeline.peak_stage_activations)}",
            f"first gradient   complete at {', '.join(f'{x:.0%}' for x in first)} of the step",
            f"slots, lockstep  {_numbers(buffers.activations)} for activations that arrive,"
            f" {_numbers(buffers.kept)} kept, {_numbers(buffers.gradients)} for gradients",
        ]
    )


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{float(value):g}" for value in values)


def draw(schedule: Schedule, path: str | pathlib.Path, **costs: float) -> None:
    """Draws the timeline: stages as rows, time to the right, darker boxes for later chunks.

    Args:
      schedule: what to draw.
      path: a .png, .pdf or .svg.
      costs: those of `simulate`.
    """
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    if path.suffix not in FORMATS or not path.parent.is_dir():
        raise UserError(
            f"cannot draw into {str(path)!r}; name a {', '.join(FORMATS)} in a folder that exists"
        )
    timeline = simulate(schedule, **costs)
    size = schedule.stages, schedule.microbatches, schedule.chunks
    figure = Figure(figsize=(10, 1.3 + 0.42 * schedule.stages), layout="constrained")
    axes = figure.subplots()
    _draw_boxes(axes, timeline)
    title = f"{schedule.name}: {size[0]} stages, {size[1]} micro-batches"
    title += f", {size[2]} chunks a stage" if size[2] > 1 else ""
    title += f"; bubble {timeline.bubble:.2%} of the computing time"
    if schedule.name in BUILDERS:
        title += f", by formula {float(bubble_formula(schedule.name, *size)):.2%}"
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _draw_boxes(axes: "Axes", timeline: Timeline) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    schedule, width = timeline.schedule, float(timeline.makespan)
    handles = {}
    for stage, spans in enumerate(timeline.spans):
        for span in spans:
            op, start = span.op, float(span.start)
            long = float(span.end) - start
            strength = (1 + op.chunk) / schedule.chunks * 0.6 + 0.4 if schedule.chunks > 1 else 0.8
            color = [1 - strength * (1 - part) for part in to_rgb(COLORS[op.kind])]
            box = Rectangle((start, stage - 0.45), long, 0.9, fc=color, ec="white", lw=0.8)
            axes.add_patch(box)
            handles.setdefault((op.kind != "F", op.chunk), box)
            # A number that would not fit into its box is left out.
            if long / width > 0.0065 * len(str(op.microbatch)):
                ink = "white" if sum(color) < 1.9 else "black"
                center = (start + long / 2, stage)
                axes.annotate(
                    str(op.microbatch), center, color=ink, fontsize=8, ha="center", va="center"
                )
    names = [
        ("backward" if back else "forward") + (f", chunk {chunk}" if schedule.chunks > 1 else "")
        for back, chunk in sorted(handles)
    ]
    boxes = [handles[key] for key in sorted(handles)]
    # Below the time axis, where it hides no box.
    axes.figure.legend(
        boxes, names, loc="outside lower right", ncols=len(names), fontsize=8, frameon=False
    )
    axes.set(xlim=(0, width), ylim=(schedule.stages - 0.5, -0.5), xlabel="time")
    axes.set_yticks(range(schedule.stages), [f"stage {s}" for s in range(schedule.stages)])
    axes.set_facecolor("#EEEEEE")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, labelsize=8)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the docstring of `efficient.parallel.schedules`."""
    parser = argparse.ArgumentParser(
        prog="python -m efficient.parallel.schedules",
        description="A pipeline schedule: its order, bubble and memory.",
    )
    parser.add_argument("name", help=", ".join(BUILDERS))
    parser.add_argument("--stages", type=int, default=4, help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, default=8, help="parts of a batch")
    parser.add_argument("--chunks", type=int, default=1, help="chunks of layers on a stage")
    parser.add_argument("--forward", type=float, default=1.0, help="cost of a forward pass")
    parser.add_argument("--backward", type=float, default=2.0, help="cost of a backward pass")
    parser.add_argument("--transfer", type=float, default=0.0, help="delay between two stages")
    parser.add_argument("--draw", help="a picture of the timeline, " + ", ".join(FORMATS))
    options = parser.parse_args(arguments)
    schedule = build(options.name, options.stages, options.microbatches, options.chunks)
    costs = {name: getattr(options, name) for name in ("forward", "backward", "transfer")}
    timeline = simulate(schedule, **costs)
    if options.draw:
        draw(schedule, options.draw, **costs)
    print(f"{table(schedule)}\n\n{summary(timeline)}")


if __name__ == "__main__":
    main()
