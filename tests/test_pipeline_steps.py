"""Pipelined steps against accumulated ones on one device, and what a pipeline refuses.

The differences allowed are those of test_mesh.py's kind, of float32 sums in another order.
"""

import jax
import numpy as np
import pytest
import tiny

from configs import common
from efficient.errors import UserError
from efficient.model import layers_of
from efficient.parallel import schedules
from efficient.parallel.schedule_table import slots, ticks
from efficient.training import loop
from efficient.training import step as step_lib

RATE = 64.0  # so that small gradients too are far above the last places of parameters
SCHEDULES = {
    "gpipe": {"schedule": "gpipe", "chunks": 1},
    "1f1b": {"schedule": "1f1b", "chunks": 1},
    "eager_1f1b": {"schedule": "eager_1f1b", "chunks": 1},
    "interleaved": {"schedule": "interleaved", "chunks": 2},
    "modular": {"schedule": "modular", "chunks": 2},
}


def config(depth=4, wiring=None, **fields):
    """Four blocks with stochastic depth, four microbatches, plain gradients, a frozen table."""
    rate = {"at": r"blocks/\d+", "use": "pre_norm", "drop_path": 0.3}
    phase = common.phase(
        4,
        optimizer={"name": "sgd", "learning_rate": RATE},
        clip=None,
        parameters=[{"at": "position/table", "train": False}],
    )
    rules = [wiring or rate, *common.gpt2(32, depth, 2)]
    fields = {"accumulate": 4, "mesh": {"data": 1}, **fields}
    return tiny.config(phase, depth=depth, rules=rules, **fields)


def step(config, devices):
    """(arrays before, after, metrics) of one step, layer by layer."""
    run, state = tiny.start(config, devices)
    before = layered(state["params"])
    state, metrics = run.train_step(run.phases[0])(state, tiny.batches(run, 1)[0])
    return before, layered(state["params"]), {n: float(m) for n, m in metrics.items()}


def layered(params):
    found = {}
    for path, array in params.items():
        layers = layers_of(path)
        for i, layer in enumerate(layers):
            found[layer] = np.asarray(array[i] if len(layers) > 1 else array)
    return found


@pytest.fixture(scope="module")
def accumulated():
    return step(config(), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_pipeline_takes_the_step_of_one_device(accumulated, name):
    """Loss and every gradient, with the randomness of layers and microbatches."""
    before, after, metrics = accumulated
    mesh = {"pipeline": 2, "data": 2}
    start, found, others = step(config(mesh=mesh, pipeline=SCHEDULES[name]), jax.devices()[:4])
    for metric, value in metrics.items():
        assert abs(others[metric] - value) <= 2e-6 * abs(value), metric
    for path, array in before.items():
        assert start[path].tobytes() == array.tobytes()
        gradient = array - after[path]
        largest = np.abs(gradient).max()
        if path == "position/table":
            assert largest == 0
        elif not path.endswith("k/bias"):  # zero but for rounding
            assert largest > 1e-3, path
        # Gradients are differences of float32 parameters of order one.
        np.testing.assert_allclose(
            start[path] - found[path], gradient, rtol=0, atol=1e-5 * largest + 3e-7
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [("fsdp", "tensor"), ("sequence", "tensor"), ("data", "tensor"), ("fsdp", "sequence")]
)
def test_stages_split_over_two_more_axes_take_the_step_of_one_device(axes):
    plain = {"at": r"blocks/\d+", "use": "pre_norm"}
    before, after, metrics = step(config(wiring=plain), jax.devices()[:1])
    mesh = {"data": 1, "pipeline": 2, **dict.fromkeys(axes, 2)}
    start, found, others = step(config(wiring=plain, mesh=mesh), jax.devices())
    assert abs(others["loss"] - metrics["loss"]) <= 2e-6 * abs(metrics["loss"])
    for path, array in before.items():
        gradient = array - after[path]
        np.testing.assert_allclose(
            start[path] - found[path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max() + 3e-7
        )


@pytest.mark.slow
def test_model_flops_are_those_of_one_device():
    mesh = {"data": 1, "pipeline": 2, "fsdp": 2, "tensor": 2}
    alone, stages = (
        tiny.start(config(mesh=m), jax.devices()[:n])[0] for m, n in (({"data": 1}, 1), (mesh, 8))
    )
    for platform in (None, "tpu"):
        expected = alone.flops(alone.phases[0], platform)
        assert stages.flops(stages.phases[0], platform) == expected > 0


@pytest.mark.slow
def test_memory_is_that_of_the_inputs_a_schedule_keeps():
    """Temporaries of two schedules differ by the inputs that GPipe keeps beyond eager 1F1B."""
    microbatches, found, kept = 16, {}, {}
    for name in ("gpipe", "eager_1f1b"):
        one = config(
            wiring={"at": r"blocks/\d+", "use": "pre_norm"},
            mesh={"pipeline": 2},
            pipeline=SCHEDULES[name],
            accumulate=microbatches,
            batch_size=16 * microbatches,
        )
        run, _ = tiny.start(one, jax.devices()[:2])
        phase = run.phases[0]
        state = step_lib.abstract_state(phase, run.placement)
        compiled = run.train_step(phase).lower(state, run.abstract_batch()).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes
        kept[name] = slots(ticks(schedules.build(name, 2, microbatches))).kept.max()
    assert kept == {"gpipe": 16, "eager_1f1b": 3}
    inputs = (found["gpipe"] - found["eager_1f1b"]) / (4 * 16 * 32 * 32)
    assert abs(inputs - (kept["gpipe"] - kept["eager_1f1b"])) <= 1  # XLA's own buffers differ


@pytest.mark.slow
def test_a_run_goes_on_without_its_pipeline(tmp_path):
    """Two steps in stages, two of Megatron's splits: the parameters of four steps of the latter."""

    def run(folder, mesh):
        one = config(mesh=mesh, accumulate=2, checkpoint_every=2, keep_checkpoints=9)
        optimizer = {"name": "sgd", "learning_rate": 0.1}
        one.phases = [{**one.phases[0], "optimizer": optimizer}]
        loop.train(one, str(tmp_path / folder))

    split = {"data": 4, "tensor": 2}
    run("whole", split)
    run("piped", {"data": 4, "pipeline": 2})
    (tmp_path / "piped" / "checkpoints" / "4").rename(tmp_path / "4")
    run("piped", split)
    assert tiny.steps_in(tmp_path / "piped") == [2, 4]
    first = tiny.checkpoint(tmp_path / "whole", 2)
    found, expected = (tiny.checkpoint(tmp_path / name, 4) for name in ("piped", "whole"))
    assert set(found) == set(expected)
    for path in (p for p in expected if p.startswith("params/")):
        moved = np.abs(expected[path] - first[path]).max()
        error = np.abs(found[path] - expected[path]).max()
        assert error <= 1e-4 * moved + 3e-7, path
    assert np.abs(expected["params/embed/table"] - first["params/embed/table"]).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "3 layers do not divide into 2 stages of 1 chunks; a depth of 4 does"),
        ({"pipeline": {"schedule": "interleaved", "chunks": 3}}, "into 2 stages of 3 chunks"),
        ({"pipeline": {"schedule": "gpip", "chunks": 1}}, "no schedule 'gpip'; did you mean"),
        ({"pipeline": {"schedule": "gpipe", "chunks": 2}}, "gpipe has one chunk a stage"),
        (
            {"pipeline": SCHEDULES["interleaved"], "accumulate": 1},
            "accumulate=1 microbatches: .* nearest is 2",
        ),
        (
            {"wiring": {"at": "blocks/1", "use": "pre_norm", "drop_path": 0.1}},
            "blocks that are all alike; blocks/1 differs from the one before",
        ),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.start(config(mesh={"pipeline": 2}, **fields), jax.devices()[:2])
