"""Pipeline schedules as data: which stage does which forward and backward pass, in which order.

A model of p v chunks of layers runs on p stages, v chunks each; chunk c of stage s is the model's
chunk c p + s, so that with v > 1 the activations go round the ring of stages v times. A batch is
cut into m micro-batches. Every schedule here is synchronous: all weights stay as they are until
the gradients of all micro-batches are added up, so the result is that of the undivided batch.

| name | of | bubble | chunk activations held by stage s |
|---|---|---|---|
| `gpipe` | Huang et al. 2018, arXiv 1811.06965 | (p - 1) / m | m |
| `1f1b` | PipeDream-Flush, as in arXiv 2104.04473 | (p - 1) / m | min(m, p - s) |
| `eager_1f1b` | Zhuang et al. 2022, arXiv 2211.05322 | (p - 1) / m | min(m, 2 (p - s) - 1) |
| `interleaved` | Narayanan et al. 2021, arXiv 2104.04473 | (p - 1) / (v m) | min(v m, W + 1) |
| `modular` | Lamy-Poirier 2021, arXiv 2106.02679 | (p - 1) / (v m) | v m |

with W = 2 (p - 1 - s) + (v - 1) p; the bubble is a stage's idle time over its time of computing.

What was read, and what was not. Of the papers only the abstracts. Megatron-LM's schedules.py gives
the number W of forward passes before the first pair of one forward and one backward, and the order
of chunks, of `interleaved`, and that number for `1f1b`. That `eager_1f1b` holds 2 (p - s) - 1
micro-batches is from github.com/ailzhang/minPP. `gpipe` runs the micro-batches backward last first,
as descriptions of the paper's figure 2 do; others draw them in order, with the same bubble and the
same memory. That `modular` finishes a layer for all micro-batches before it turns to the next one
is also in the abstract of the patent US 12585929 B2; that micro-batches keep their order backward
is a choice made here, and the bubble follows from both. It holds for m >= p; with fewer
micro-batches each of the v - 1 changes of chunk waits for the ring and adds (p - m) / (v m). The
bubbles of the others are the known ones; all are checked against simulation.

`schedule_ops` says what a schedule is and checks one, `schedule_report` has times, memory and
drawings, `schedule_table` the tables that an SPMD program runs by. From the command line:

    python -m efficient.parallel.schedules interleaved --stages 4 --microbatches 8 --chunks 2
"""

from collections.abc import Callable, Iterable, Sequence

from efficient.errors import UserError, nearest
from efficient.papers import Claim, Paper
from efficient.parallel.schedule_ops import Op, Schedule, positive


def _passes(kind: str, pairs: Iterable[tuple[int, int]]) -> list[Op]:
    return [Op(kind, microbatch, chunk) for microbatch, chunk in pairs]


def _alternate(forward: Sequence[Op], backward: Sequence[Op], warmup: int) -> tuple[Op, ...]:
    """`warmup` forward passes, then one forward and one backward in turn, then what is left."""
    warmup = min(warmup, len(forward))
    ops = list(forward[:warmup])
    for pair in zip(forward[warmup:], backward, strict=False):
        ops += pair
    return (*ops, *backward[len(forward) - warmup :])


def gpipe(stages: int, microbatches: int) -> Schedule:
    """GPipe: all micro-batches forward, then all backward, last first."""
    positive(stages=stages, microbatches=microbatches)
    order = [(i, 0) for i in range(microbatches)]
    ops = (*_passes("F", order), *_passes("B", order[::-1]))
    return Schedule("gpipe", stages, microbatches, 1, (ops,) * stages)


def _one_chunk(name: str, stages: int, microbatches: int, ahead: int) -> Schedule:
    positive(stages=stages, microbatches=microbatches)
    order = [(i, 0) for i in range(microbatches)]
    forward, backward = _passes("F", order), _passes("B", order)
    ops = tuple(_alternate(forward, backward, ahead * (stages - 1 - s)) for s in range(stages))
    return Schedule(name, stages, microbatches, 1, ops)


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """PipeDream-Flush: stage s runs p - 1 - s forward passes ahead, then one forward, one backward.

    A micro-batch goes backward as soon as it can, so that a stage holds at most p - s of them.
    """
    return _one_chunk("1f1b", stages, microbatches, 1)


def eager_one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """1F1B that runs 2 (p - 1 - s) forward passes ahead on stage s.

    In times of its own this gains nothing over `one_f_one_b` unless transfers take long. Where the
    stages go in lockstep, a micro-batch is back at stage s only 2 (p - 1 - s) ticks after it left,
    and only with so many under way has every tick a forward and a backward pass to do.
    """
    return _one_chunk("eager_1f1b", stages, microbatches, 2)


def interleaved(stages: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B: p micro-batches through one chunk, then through the next, and so on.

    Stage s runs W = 2 (p - 1 - s) + (v - 1) p chunk passes ahead, as Megatron-LM does; backward it
    takes the same groups of p micro-batches from the last chunk to the first.

    Raises:
      UserError: the micro-batches cannot be taken in groups of p.
    """
    positive(stages=stages, microbatches=microbatches, chunks=chunks)
    if microbatches % stages:
        near = max(stages, (2 * microbatches + stages) // (2 * stages) * stages)
        raise UserError(
            f"interleaved needs micro-batches in a multiple of its {stages} stages, not"
            f" {microbatches}; the nearest is {near}"
        )
    groups = [range(first, first + stages) for first in range(0, microbatches, stages)]
    forward = _passes("F", [(i, c) for group in groups for c in range(chunks) for i in group])
    down = range(chunks)[::-1]
    backward = _passes("B", [(i, c) for group in groups for c in down for i in group])
    ops = tuple(
        _alternate(forward, backward, 2 * (stages - 1 - s) + (chunks - 1) * stages)
        for s in range(stages)
    )
    return Schedule("interleaved", stages, microbatches, chunks, ops)


def modular(stages: int, microbatches: int, chunks: int) -> Schedule:
    """Layered gradient accumulation on a modular pipeline: one chunk after the other.

    All micro-batches go through a chunk before the stage turns to the next one, forward and
    backward. A chunk's gradient is complete when its last micro-batch is, and can be reduced over
    the replicas while the stage works on the chunk before it; its weights are needed in one
    stretch forward and one backward.
    """
    positive(stages=stages, microbatches=microbatches, chunks=chunks)
    forward = [(i, c) for c in range(chunks) for i in range(microbatches)]
    backward = [(i, c) for c in reversed(range(chunks)) for i in range(microbatches)]
    ops = (*_passes("F", forward), *_passes("B", backward))
    return Schedule("modular", stages, microbatches, chunks, (ops,) * stages)


BUILDERS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "eager_1f1b": eager_one_f_one_b,
    "interleaved": interleaved,
    "modular": modular,
}
CHUNKED = ("interleaved", "modular")


def build(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """The schedule of that name; only those of `CHUNKED` take more than one chunk a stage."""
    if name not in BUILDERS:
        raise UserError(f"there is no schedule {name!r}; {nearest(name, BUILDERS)}")
    if name in CHUNKED:
        return BUILDERS[name](stages, microbatches, chunks)
    if chunks != 1:
        raise UserError(
            f"{name} has one chunk a stage, not {chunks}; {' and '.join(CHUNKED)} have more"
        )
    return BUILDERS[name](stages, microbatches)


_TEST = "tests/papers/test_{}.py::test_{}".format
_CLUSTER = "needs many accelerators"

PAPERS = (
    Paper(
        slug="gpipe",
        status="equations",
        claims=(
            Claim(
                "the bubble is (p - 1) / (m + p - 1) of the step",
                _TEST("gpipe", "bubble"),
                True,
                "exact in simulation, and in lockstep too; 15.8% at p = 4 and m = 16",
            ),
            Claim(
                "gradients are those of the undivided batch, however many stages there are",
                _TEST("gpipe", "gradients_are_those_of_the_whole_batch"),
                True,
                "of the tables, run over simulated ranks in float64; up to rounding",
            ),
            Claim(
                "with re-materialisation a stage keeps its micro-batches' inputs and nothing else",
                _TEST("gpipe", "stage_keeps_the_inputs_of_all_micro_batches"),
                True,
            ),
            Claim(
                "speeds up almost linearly with the stages",
                _TEST("gpipe", "speedup_of_the_schedule"),
                note="the schedule allows p m / (m + p - 1), 6.56 of 8 at m = 32; communication and"
                " uneven stages need accelerators",
            ),
            Claim("trains AmoebaNet-B with 557M and a Transformer with 6B weights", note=_CLUSTER),
        ),
        source="the abstract and public descriptions of figure 2; the paper's text was not read",
        departures=("a batch norm's statistics over micro-batches are the executor's matter",),
    ),
    Paper(
        slug="interleaved_pipeline",
        status="equations",
        claims=(
            Claim(
                "1F1B has GPipe's bubble, and a stage holds at most p micro-batches, not m",
                _TEST("interleaved_pipeline", "one_forward_one_backward"),
                True,
                "stage s holds min(m, p - s)",
            ),
            Claim(
                "v chunks a stage make the bubble (p - 1) / (v m)",
                _TEST("interleaved_pipeline", "bubble"),
                True,
                "exact in simulation, and in lockstep too",
            ),
            Claim(
                "memory is comparable to that of 1F1B",
                _TEST("interleaved_pipeline", "memory_against_one_forward_one_backward"),
                True,
                "the first stage holds 1 + (p - 1) / (p v) times as much: 1.375 times at p = 4 and"
                " v = 2",
            ),
            Claim(
                "v chunks a stage send v times as much",
                _TEST("interleaved_pipeline", "activations_sent"),
                True,
                "p v - 1 activations a micro-batch where 1F1B sends p - 1",
            ),
            Claim("throughput rises by 10% and more", note=_CLUSTER),
            Claim("502 petaFLOP/s on 3,072 GPUs, 52% of their peak", note=_CLUSTER),
        ),
        source="github.com/NVIDIA/Megatron-LM, megatron/core/pipeline_parallel/schedules.py; the"
        " abstract; the paper's text was not read",
        departures=(
            "m is a multiple of p; Megatron-LM takes groups of other sizes, too",
            "m = p has no warm-up of its own, which Megatron-LM once had",
        ),
    ),
    Paper(
        slug="modular_pipeline",
        status="equations",
        claims=(
            Claim(
                "layers dealt out in turn make the bubble v times as small, (p - 1) / (v m)",
                _TEST("modular_pipeline", "bubble"),
                True,
                "for m >= p; exact in simulation, and in lockstep too",
            ),
            Claim(
                "a layer's gradients are complete and can be reduced while earlier layers compute",
                _TEST("modular_pipeline", "gradients_are_complete_early"),
                True,
                "chunk c has the time of c m backward passes left for it, interleaved 1F1B that of"
                " c p, GPipe and 1F1B none",
            ),
            Claim(
                "less data moves: a layer's weights are needed in one stretch each way",
                _TEST("modular_pipeline", "stretches_of_a_chunk"),
                True,
                "2 v - 1 stretches on a stage, 3 at p = 4, m = 8, v = 2, where interleaved 1F1B has"
                " 5 to 19",
            ),
            Claim("the shortest training time is cut by half", note=_CLUSTER),
        ),
        source="the abstract, and that of the patent US 12585929 B2; the paper's text was not read",
        departures=(
            "a chunk may have several layers, the paper's is one",
            "that micro-batches keep their order backward is a choice made here",
        ),
    ),
)

if __name__ == "__main__":
    from efficient.parallel.schedule_report import main

    main()
