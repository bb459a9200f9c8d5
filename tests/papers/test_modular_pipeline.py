"""Modular pipelines with layered gradient accumulation: bubble, early gradients, stretches."""

import itertools
from fractions import Fraction

import pipeline_numpy
import pytest

from efficient.parallel.schedule_report import bubble_formula, peak_formula, simulate
from efficient.parallel.schedule_table import lockstep_bubble, ticks
from efficient.parallel.schedules import gpipe, interleaved, modular, one_f_one_b

COSTS = [(1, 2), (1, 1), (3, 1), (1, 3)]


@pytest.mark.parametrize(
    ("p", "m", "v"), [(1, 1, 1), (1, 3, 2), (2, 2, 3), (3, 4, 2), (4, 8, 2), (4, 5, 4), (6, 9, 3)]
)
def test_bubble(p, m, v):
    schedule = modular(p, m, v)
    right = Fraction(p - 1, v * m)
    for forward, backward in COSTS:
        timeline = simulate(schedule, Fraction(forward), Fraction(backward))
        assert timeline.bubble == right == bubble_formula("modular", p, m, v)
        assert lockstep_bubble(ticks(schedule), forward, backward) == pytest.approx(float(right))
    assert timeline.peak_activations == (v * m,) * p == peak_formula("modular", p, m, v)
    # GPipe's activations, with a bubble v times as small.
    assert timeline.peak_stage_activations == (m,) * p
    assert simulate(gpipe(p, m), Fraction(1), Fraction(2)).bubble == v * right


@pytest.mark.parametrize(("p", "m", "v"), [(2, 1, 2), (4, 1, 3), (4, 3, 2), (6, 2, 4)])
def test_bubble_with_fewer_micro_batches_than_stages(p, m, v):
    """Forward and backward alike: v - 1 changes of chunk take a ring of p, and p - 1 to fill."""
    steps = (v - 1) * p + p - 1 + m
    for forward, backward in COSTS:
        timeline = simulate(modular(p, m, v), Fraction(forward), Fraction(backward))
        assert timeline.makespan == Fraction(steps * (forward + backward), v)
        assert timeline.bubble == Fraction(steps, v * m) - 1 == bubble_formula("modular", p, m, v)
        assert timeline.bubble > Fraction(p - 1, v * m)


def left_for_reduction(schedule):
    """[stage][chunk]: backward passes that the stage still does after the chunk's last."""
    result = []
    for ops in schedule.ops:
        last = {op.chunk: n for n, op in enumerate(ops) if op.kind == "B"}
        after = [sum(op.kind == "B" for op in ops[n + 1 :]) for _, n in sorted(last.items())]
        result.append(after)
    return result


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 12, 3)])
def test_gradients_are_complete_early(p, m, v):
    assert left_for_reduction(modular(p, m, v)) == [[c * m for c in range(v)]] * p
    assert left_for_reduction(interleaved(p, m, v)) == [[c * p for c in range(v)]] * p
    assert left_for_reduction(gpipe(p, m)) == left_for_reduction(one_f_one_b(p, m)) == [[0]] * p
    timeline = simulate(modular(p, m, v), Fraction(1), Fraction(2))
    for stage, complete in enumerate(timeline.gradients_complete):
        end = timeline.spans[stage][-1].end
        assert list(complete) == [end - Fraction(2 * c * m, v) for c in range(v)]


def stretches(ops):
    """How often a stage turns to a chunk other than the one before."""
    return sum(1 for _ in itertools.groupby(op.chunk for op in ops))


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 16, 2), (4, 12, 3)])
def test_stretches_of_a_chunk(p, m, v):
    """One forward and one backward for each chunk, the last chunk's two being one."""
    assert {stretches(ops) for ops in modular(p, m, v).ops} == {2 * v - 1}
    other = [stretches(ops) for ops in interleaved(p, m, v).ops]
    assert min(other) > 2 * v - 1
    if (p, m, v) == (4, 8, 2):
        assert (min(other), max(other)) == (5, 19)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 2, 2), (2, 3, 3), (4, 8, 2), (4, 2, 2)])
def test_gradients(p, m, v):
    pipeline_numpy.compare(modular(p, m, v))
