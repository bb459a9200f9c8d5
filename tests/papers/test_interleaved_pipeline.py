"""1F1B and interleaved 1F1B of Megatron-LM: order, bubble, memory, communication."""

from fractions import Fraction

import pipeline_numpy
import pytest

from efficient.errors import UserError
from efficient.parallel.schedule_report import bubble_formula, peak_formula, simulate
from efficient.parallel.schedule_table import lockstep_bubble, slots, ticks
from efficient.parallel.schedules import (
    eager_one_f_one_b,
    interleaved,
    one_f_one_b,
)

SIZES = [(1, 1), (1, 4), (2, 1), (2, 6), (3, 2), (3, 9), (4, 8), (4, 16), (6, 4), (8, 24)]
CHUNKED = [(1, 3, 2), (2, 2, 3), (2, 6, 1), (3, 3, 2), (3, 9, 4), (4, 8, 2), (4, 12, 3), (6, 12, 2)]
COSTS = [(1, 2), (1, 1), (3, 1), (1, 3)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_one_forward_one_backward(p, m):
    schedule = one_f_one_b(p, m)
    for forward, backward in COSTS:
        timeline = simulate(schedule, Fraction(forward), Fraction(backward))
        assert timeline.bubble == Fraction(p - 1, m) == bubble_formula("1f1b", p, m)
    held = tuple(min(m, p - stage) for stage in range(p))
    assert timeline.peak_activations == held == peak_formula("1f1b", p, m)
    assert max(held) <= p


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_eager_one_forward_one_backward(p, m):
    """Twice the forward passes ahead: the same bubble, also in lockstep, for more memory."""
    schedule = eager_one_f_one_b(p, m)
    for forward, backward in COSTS:
        timeline = simulate(schedule, Fraction(forward), Fraction(backward))
        assert timeline.bubble == Fraction(p - 1, m) == bubble_formula("eager_1f1b", p, m)
        assert lockstep_bubble(ticks(schedule), forward, backward) == pytest.approx((p - 1) / m)
    held = tuple(min(m, 2 * (p - stage) - 1) for stage in range(p))
    assert timeline.peak_activations == held == peak_formula("eager_1f1b", p, m)


@pytest.mark.parametrize(("p", "m", "v"), CHUNKED)
def test_bubble(p, m, v):
    schedule = interleaved(p, m, v)
    right = Fraction(p - 1, v * m)
    for forward, backward in COSTS:
        timeline = simulate(schedule, Fraction(forward), Fraction(backward))
        assert timeline.bubble == right == bubble_formula("interleaved", p, m, v)
        assert lockstep_bubble(ticks(schedule), forward, backward) == pytest.approx(float(right))


def test_order_by_hand():
    """Two stages, four micro-batches, two chunks, worked out from the rule."""

    def names(ops):
        return " ".join(f"{op.kind}{op.microbatch}.{op.chunk}" for op in ops)

    first, last = map(names, interleaved(2, 4, 2).ops)
    assert first == (
        "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    )
    assert last == (
        "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0"
    )
    first, last = map(names, one_f_one_b(2, 3).ops)
    assert first == "F0.0 F1.0 B0.0 F2.0 B1.0 B2.0"
    assert last == "F0.0 B0.0 F1.0 B1.0 F2.0 B2.0"


@pytest.mark.parametrize(("p", "m", "v"), CHUNKED)
def test_warmup_and_memory(p, m, v):
    """Forward passes before the first backward one: Megatron-LM's count, and the one it pairs."""
    schedule = interleaved(p, m, v)
    right = [min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1) for stage in range(p)]
    before = [[op.kind for op in ops].index("B") for ops in schedule.ops]
    timeline = simulate(schedule)
    assert before == right == list(timeline.peak_activations)
    assert tuple(right) == peak_formula("interleaved", p, m, v)
    assert slots(ticks(schedule)).kept.tolist() == right


@pytest.mark.parametrize(("p", "v", "ratio"), [(4, 2, 1.375), (8, 2, 1.4375), (8, 4, 1.21875)])
def test_memory_against_one_forward_one_backward(p, v, ratio):
    """In units of a micro-batch's activations of a whole stage."""
    plain = simulate(one_f_one_b(p, 2 * p)).peak_stage_activations
    chunked = simulate(interleaved(p, 2 * p, v)).peak_stage_activations
    assert max(chunked) / max(plain) == ratio == 1 + (p - 1) / (p * v)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 8, 3)])
def test_activations_sent(p, m, v):
    """Counted where they arrive."""
    sent = [
        int((slots(ticks(schedule)).activation_store >= 0).sum())
        for schedule in (one_f_one_b(p, m), interleaved(p, m, v))
    ]
    assert sent == [m * (p - 1), m * (p * v - 1)]


@pytest.mark.parametrize(("p", "m", "near"), [(4, 9, 8), (4, 10, 12), (4, 1, 4), (3, 5, 6)])
def test_groups_must_be_whole(p, m, near):
    with pytest.raises(UserError, match=f"multiple of its {p} stages, not {m}; .* is {near}$"):
        interleaved(p, m, 2)


@pytest.mark.parametrize(("p", "m", "v"), [(1, 2, 2), (2, 4, 3), (4, 8, 2)])
def test_gradients(p, m, v):
    pipeline_numpy.compare(interleaved(p, m, v))
    pipeline_numpy.compare(one_f_one_b(p, m))
    pipeline_numpy.compare(eager_one_f_one_b(p, m))
