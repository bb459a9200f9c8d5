"""Pipeline schedules as data: their checks, tables, times, command line; any valid order runs."""

import dataclasses
import subprocess
import sys
from fractions import Fraction

import matplotlib.image
import numpy as np
import pipeline_numpy
import pytest
from hypothesis import given, settings, strategies

from efficient.errors import UserError
from efficient.parallel import schedule_report, schedules
from efficient.parallel.schedule_ops import Op, Schedule, check
from efficient.parallel.schedule_report import bubble_formula, peak_formula, simulate, table
from efficient.parallel.schedule_table import lockstep_bubble, lockstep_time, slots, ticks

EXAMPLES = {
    "gpipe": schedules.gpipe(4, 8),
    "1f1b": schedules.one_f_one_b(4, 8),
    "eager_1f1b": schedules.eager_one_f_one_b(4, 8),
    "interleaved": schedules.interleaved(4, 8, 2),
    "modular": schedules.modular(4, 8, 2),
}
sizes = strategies.integers(1, 4)


def any_schedule(name, p, m, v):
    m = m * p if name == "interleaved" else m
    return schedules.build(name, p, m, v if name in schedules.CHUNKED else 1)


@settings(max_examples=30, deadline=None)
@given(strategies.sampled_from(list(schedules.BUILDERS)), sizes, strategies.integers(1, 6), sizes)
def test_built_schedules_run(name, p, m, v):
    schedule = any_schedule(name, p, m, v)
    size = schedule.stages, schedule.microbatches, schedule.chunks
    timeline = simulate(schedule, Fraction(1), Fraction(2))
    assert timeline.bubble == bubble_formula(name, *size)
    assert timeline.peak_activations == peak_formula(name, *size)
    pipeline_numpy.compare(schedule)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, strategies.integers(1, 3), strategies.integers(0, 2**32 - 1))
def test_any_order_that_can_run_runs(p, m, v, seed):
    """Activations and gradients that wait, in any number, are found again in their slots."""
    pipeline_numpy.compare(pipeline_numpy.random_schedule(p, m, v, seed), seed)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, strategies.integers(1, 3), strategies.integers(0, 2**32 - 1))
def test_slots_are_as_few_as_can_be(p, m, v, seed):
    """As many as are in use at once, counted here tick by tick."""
    steps = ticks(pipeline_numpy.random_schedule(p, m, v, seed))
    found = slots(steps)
    for sort, count in (
        ("activation", found.activations),
        ("kept", found.kept),
        ("gradient", found.gradients),
    ):
        store, read = (getattr(found, f"{sort}_{end}") for end in ("store", "read"))
        arrived, done = (np.cumsum(x >= 0, axis=0) for x in (store, read))
        # A slot is in use up to the end of the tick in which it is read.
        in_use = arrived - np.pad(done, ((1, 0), (0, 0)))[:-1]
        np.testing.assert_array_equal(in_use.max(axis=0), count)
        assert store.max() < max(1, count.max())


@pytest.mark.parametrize("name", EXAMPLES)
def test_ticks_keep_the_order_of_the_stage(name):
    schedule = EXAMPLES[name]
    steps = ticks(schedule)
    for stage, ops in enumerate(schedule.ops):
        found = []
        for tick in range(len(steps)):
            for kind, microbatch, chunk in (
                ("F", steps.forward_microbatch, steps.forward_chunk),
                ("B", steps.backward_microbatch, steps.backward_chunk),
            ):
                if microbatch[tick, stage] >= 0:
                    found.append(Op(kind, microbatch[tick, stage], chunk[tick, stage]))
                else:
                    assert chunk[tick, stage] == -1
        assert tuple(found) == ops


def test_ticks_by_hand():
    """Two stages, two micro-batches: the last stage goes forward and backward in one tick."""
    steps = ticks(schedules.one_f_one_b(2, 2))
    np.testing.assert_array_equal(steps.forward_microbatch, [[0, -1], [1, 0], [-1, 1], [-1, -1]])
    np.testing.assert_array_equal(steps.backward_microbatch, [[-1, -1], [-1, 0], [0, 1], [1, -1]])
    found = slots(steps)
    np.testing.assert_array_equal(found.activation_store, [[-1, -1], [-1, 0], [-1, 0], [-1, -1]])
    np.testing.assert_array_equal(found.activation_read, found.activation_store)
    np.testing.assert_array_equal(found.kept_store, [[0, -1], [1, 0], [-1, 0], [-1, -1]])
    np.testing.assert_array_equal(found.kept_read, [[-1, -1], [-1, 0], [0, 0], [1, -1]])
    np.testing.assert_array_equal(found.gradient_store, [[-1, -1], [-1, -1], [0, -1], [0, -1]])
    np.testing.assert_array_equal(found.gradient_read, found.gradient_store)
    assert [found.activations.tolist(), found.kept.tolist(), found.gradients.tolist()] == [
        [0, 1],
        [2, 1],
        [1, 0],
    ]


@pytest.mark.parametrize(
    ("name", "own", "lockstep", "never_skips", "count", "held"),
    [
        ("gpipe", 0.375, 0.375, 1.625, 21, 8),
        ("1f1b", 0.375, 1.0, 1.375, 19, 4),
        ("eager_1f1b", 0.375, 0.375, 0.75, 14, 7),
        ("interleaved", 0.1875, 0.1875, 0.625, 26, 11),
        ("modular", 0.1875, 0.1875, 1.3125, 37, 16),
    ],
)
def test_numbers_of_the_docstring(name, own, lockstep, never_skips, count, held):
    steps = ticks(EXAMPLES[name])
    assert len(steps) == count
    for backward in (2, 3):
        timeline = simulate(EXAMPLES[name], 1, backward)
        assert timeline.bubble == pytest.approx(own)
        assert timeline.peak_activations[0] == held == max(timeline.peak_activations)
        assert lockstep_bubble(steps, 1, backward) == pytest.approx(lockstep)
        assert lockstep_bubble(steps, 1, backward, skip=False) == pytest.approx(never_skips)


def test_larger_numbers_of_the_docstring():
    found = {}
    for name in EXAMPLES:
        schedule = schedules.build(name, 8, 64, 4 if name in schedules.CHUNKED else 1)
        own, lockstep = simulate(schedule).bubble, lockstep_bubble(ticks(schedule))
        found[name] = f"{own:.3f} {lockstep:.3f}"
    assert found == {
        "gpipe": "0.109 0.109",
        "1f1b": "0.109 0.969",
        "eager_1f1b": "0.109 0.109",
        "interleaved": "0.027 0.027",
        "modular": "0.027 0.027",
    }


@pytest.mark.parametrize("p", [2, 4, 6])
def test_steady_state_of_one_forward_one_backward_in_lockstep(p):
    """p more micro-batches take 2 p - 1 ticks, each with a forward and a backward pass."""
    fewer, more = (ticks(schedules.one_f_one_b(p, m)) for m in (8 * p, 9 * p))
    assert len(more) - len(fewer) == 2 * p - 1
    assert lockstep_time(more) - lockstep_time(fewer) == 3 * (2 * p - 1)
    fewer, more = (ticks(schedules.eager_one_f_one_b(p, m)) for m in (8 * p, 9 * p))
    assert len(more) - len(fewer) == p


def test_lockstep_time_by_hand():
    """1F1B on two stages with two micro-batches: F, F | F B, B | F B, B."""
    steps = ticks(schedules.one_f_one_b(2, 2))
    assert lockstep_time(steps, 1, 10) == 1 + 11 + 11 + 10
    assert lockstep_time(steps, 1, 10, skip=False) == 4 * 11


def test_transfer_delays_the_receiver():
    """Two stages, one micro-batch: over and back."""
    assert simulate(schedules.gpipe(2, 1), 1, 2, 5).makespan == 2 * (1 + 2) + 2 * 5
    # What eager 1F1B is for: transfers hide behind the forward passes that run ahead.
    plain, eager = (
        simulate(schedules.build(name, 4, 16), transfer=0.5).bubble
        for name in ("1f1b", "eager_1f1b")
    )
    assert eager < 0.6 * plain


def swap(schedule, stage, a, b):
    ops = list(schedule.ops[stage])
    ops[a], ops[b] = ops[b], ops[a]
    return replace(schedule, stage, ops)


def replace(schedule, stage, ops):
    rows = list(schedule.ops)
    rows[stage] = tuple(ops)
    return dataclasses.replace(schedule, name="mine", ops=tuple(rows))


PLAIN = schedules.one_f_one_b(2, 3)  # F0 F1 B0 F2 B1 B2 | F0 B0 F1 B1 F2 B2


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (replace(PLAIN, 0, PLAIN.ops[0][:-1]), "never does B of micro-batch 2, chunk 0 on stage 0"),
        (replace(PLAIN, 1, (*PLAIN.ops[1], Op("F", 0))), "F of micro-batch 0, chunk 0 2 times on"),
        (replace(PLAIN, 1, (*PLAIN.ops[1], Op("W", 0))), "has W of micro-batch 0, chunk 0 on st"),
        (replace(PLAIN, 1, (*PLAIN.ops[1], Op("F", 3))), "micro-batches below 3"),
        (replace(PLAIN, 1, (*PLAIN.ops[1], Op("F", 0, 1))), "chunks below 1"),
        (dataclasses.replace(PLAIN, ops=PLAIN.ops[:1]), "orders 1 stages, but has 2"),
        (dataclasses.replace(PLAIN, microbatches=0), "at least one of its microbatches, not 0"),
        # Backward before its own forward.
        (
            swap(PLAIN, 1, 0, 1),
            r"halt: B of micro-batch 0, chunk 0 on stage 1 waits for F of micro-batch 0, chunk 0 on"
            " stage 1, which stands behind B of micro-batch 0",
        ),
        # Stage 0 wants the gradient of 1 first, stage 1 makes that of 0 first and waits for F 1.
        (
            Schedule(
                "mine",
                2,
                2,
                1,
                (
                    (Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)),
                    (Op("F", 0), Op("F", 1), Op("B", 0), Op("B", 1)),
                ),
            ),
            r"halt: B of micro-batch 0, chunk 0 on stage 0 waits for B of micro-batch 0, chunk 0 on"
            " stage 1, which stands behind F of micro-batch 1, chunk 0 there",
        ),
    ],
)
def test_broken_schedules_are_refused(schedule, message):
    for use in (check, simulate, ticks):
        with pytest.raises(UserError, match=message):
            use(schedule)


@pytest.mark.parametrize("name", EXAMPLES)
def test_good_schedules_pass(name):
    check(EXAMPLES[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpip", 2, 2), "did you mean 'gpipe'"),
        (("gpipe", 2, 2, 2), "gpipe has one chunk a stage, not 2"),
        (("modular", 2, 2, 0), "at least one of its chunks, not 0"),
        (("1f1b", 0, 2), "at least one of its stages, not 0"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        schedules.build(*arguments)


@pytest.mark.parametrize("costs", [(0, 1, 0), (1, -1, 0), (1, 1, -1), (float("nan"), 1, 0)])
def test_wrong_costs_are_refused(costs):
    with pytest.raises(UserError, match="costs must be positive"):
        simulate(PLAIN, *costs)
    if costs[2] == 0:
        with pytest.raises(UserError, match="costs must be positive"):
            lockstep_bubble(ticks(PLAIN), *costs[:2])
    with pytest.raises(UserError, match="no formula for 'mine'"):
        bubble_formula("mine", 1, 1)


def test_text():
    assert table(PLAIN).splitlines() == [
        "stage 0  F0 F1 B0 F2 B1 B2",
        "stage 1  F0 B0 F1 B1 F2 B2",
    ]
    assert table(schedules.modular(1, 1, 2)) == "stage 0  F0.0 F0.1 B0.1 B0.0"


@pytest.mark.parametrize("name", ["gpipe", "modular"])
def test_drawing(name, tmp_path):
    schedule_report.draw(EXAMPLES[name], tmp_path / "x.png", backward=1.0)
    pixels = matplotlib.image.imread(tmp_path / "x.png")
    assert pixels.shape[1] == 1100 and pixels.std() > 0.1


def test_drawing_a_schedule_without_a_formula(tmp_path):
    own = replace(PLAIN, 0, PLAIN.ops[0])
    schedule_report.draw(own, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 0
    for bad in (tmp_path / "x.bmp", tmp_path / "nowhere" / "x.png"):
        with pytest.raises(UserError, match=r"cannot draw into .*\.png, \.pdf, \.svg"):
            schedule_report.draw(own, bad)


def test_command_line(capsys, tmp_path):
    picture = tmp_path / "x.svg"
    line = ["interleaved", "--stages", "2", "--microbatches", "4", "--chunks", "2"]
    schedule_report.main([*line, "--draw", str(picture)])
    printed = capsys.readouterr().out
    assert "stage 1  F0.0 F1.0 F0.1 B0.1" in printed
    assert "12.5% of the computing time, 11.1% of the step; by formula 12.5%" in printed
    assert picture.stat().st_size > 0
    with pytest.raises(SystemExit) as stop:
        schedule_report.main(["interleaved", "--microbatches", "9"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_module_runs_without_jax():
    code = (
        "import sys; from efficient.parallel import schedule_report;"
        "schedule_report.main(['modular', '--chunks', '2']); assert 'jax' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    command = [sys.executable, "-m", "efficient.parallel.schedules", "gpip"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (
        2,
        "error: there is no schedule 'gpip'; did you mean 'gpipe'?\n",
    )
