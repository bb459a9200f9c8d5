"""GPipe's schedule: its bubble, its gradients, what it keeps."""

from fractions import Fraction

import pipeline_numpy
import pytest

from efficient.parallel.schedule_report import bubble_formula, peak_formula, simulate
from efficient.parallel.schedule_table import lockstep_bubble, slots, ticks
from efficient.parallel.schedules import gpipe

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 7), (4, 8), (4, 16), (5, 3), (8, 32)]
COSTS = [(1, 2), (1, 1), (3, 1), (1, 3)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble(p, m):
    schedule = gpipe(p, m)
    for forward, backward in COSTS:
        timeline = simulate(schedule, Fraction(forward), Fraction(backward))
        assert timeline.makespan == (m + p - 1) * (forward + backward)
        assert timeline.bubble == Fraction(p - 1, m) == bubble_formula("gpipe", p, m)
        assert timeline.bubble_share == Fraction(p - 1, m + p - 1)
        assert lockstep_bubble(ticks(schedule), forward, backward) == pytest.approx((p - 1) / m)


def test_order_is_all_forward_then_all_backward_last_first():
    for ops in gpipe(3, 4).ops:
        assert [(op.kind, op.microbatch) for op in ops] == [
            *[("F", 0), ("F", 1), ("F", 2), ("F", 3)],
            *[("B", 3), ("B", 2), ("B", 1), ("B", 0)],
        ]


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 8), (5, 2)])
def test_gradients_are_those_of_the_whole_batch(p, m):
    pipeline_numpy.compare(gpipe(p, m))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_stage_keeps_the_inputs_of_all_micro_batches(p, m):
    """The run above recomputes all else from them."""
    schedule = gpipe(p, m)
    assert simulate(schedule).peak_activations == (m,) * p == peak_formula("gpipe", p, m)
    buffers = slots(ticks(schedule))
    assert buffers.kept.tolist() == [m] * p
    assert max(buffers.activations) <= 1 and max(buffers.gradients) <= 1


def test_speedup_of_the_schedule():
    """Against one stage that has all layers, communication free."""
    speedups = []
    for m in (1, 8, 32, 64):
        alone = 8 * m * 3
        speedups.append(alone / simulate(gpipe(8, m)).makespan)
        assert speedups[-1] == pytest.approx(8 * m / (m + 7))
    assert speedups == sorted(speedups)
    assert round(speedups[2], 2) == 6.56
