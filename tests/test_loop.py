"""The loop: resume, accumulation, precision, averages, freezing, treatments, and how it stops."""

import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import eval as eval_script
from configs import common
from efficient.checkpoints import layout
from efficient.errors import UserError
from efficient.registry import register
from efficient.training import loop

SGD = {"name": "sgd", "learning_rate": 0.5}
FROZEN = [{"at": r"embed/.*|blocks/0/.*", "train": False}]


def two_phases(**fields):
    """Adam with an average, then momentum on half of the parameters; a checkpoint of each step."""
    momentum = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}
    first = common.phase(4, ema=0.9, parameters=[common.NO_DECAY])
    second = common.phase(4, optimizer=momentum, parameters=FROZEN)
    every = {"checkpoint_every": 1, "keep_checkpoints": 100}
    return tiny.config(first, second, **{**every, **fields})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run of two phases, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    loop.train(two_phases(), str(folder))
    return folder


def interrupted(whole, folder, step: int):
    """A workdir as a run leaves it that was killed after the checkpoint of `step`.

    That is before the evaluation of that step, which a resumed run must not forget.
    """
    shutil.copytree(whole, folder)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["step"] <= step]
    before = before[:-1] if json.loads(before[-1])["kind"] == "eval" else before
    (folder / "metrics.jsonl").write_text("".join(before))
    for at in tiny.steps_in(folder):
        if at > step:
            shutil.rmtree(folder / "checkpoints" / str(at))
    return folder


# At the end of a phase, in the next one, within the first; with loading processes.
RESUMED = [
    pytest.param(4, 0, marks=pytest.mark.slow),
    (6, 0),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (3, 1))),
]


@pytest.mark.parametrize(("step", "workers"), RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path, step, workers):
    folder = interrupted(whole, tmp_path / "run", step)
    loop.train(two_phases(data_workers=workers), str(folder))
    assert tiny.steps_in(folder) == list(range(1, 9))
    for at in range(step + 1, 9):
        tiny.same(tiny.checkpoint(folder, at), tiny.checkpoint(whole, at))
    assert tiny.rows(folder) == tiny.rows(whole)
    lines = [(of / "metrics.jsonl").read_text().splitlines() for of in (folder, whole)]
    found, expected = ([json.loads(line)["loss"] for line in of] for of in lines)
    assert found == expected


def test_what_a_checkpoint_holds_and_what_stays_frozen(whole):
    first, last = tiny.checkpoint(whole, 4), tiny.checkpoint(whole, 8)
    assert any(path.startswith("ema/") for path in first)
    assert not any(path.startswith("ema/") for path in last)
    assert any("mu/blocks/1" in path for path in first)
    state = [path for path in last if path.startswith("optimizer/")]
    assert any("blocks/1/" in path for path in state)
    assert not any("embed" in path or "blocks/0/" in path for path in state)
    start = {p.removeprefix("ema/"): a for p, a in first.items() if p.startswith("ema/")}
    frozen = [p for p in start if p.startswith(("embed/", "blocks/0/"))]
    assert len(frozen) > 5
    for path in start:  # a phase begins from the average of the one before
        unchanged = last[f"params/{path}"].tobytes() == start[path].tobytes()
        assert unchanged == (path in frozen), path


def test_metrics_hold_each_step_once(whole):
    train = [(step, "train") for step in range(1, 9)]
    assert tiny.rows(whole) == [*train[:4], (4, "eval"), *train[4:], (8, "eval")]


@pytest.mark.parametrize("every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_line_tells_what_was_seen_up_to_its_step(whole, tmp_path, every):
    folder = whole
    if every > 1:  # then most lines are written while the next step is under way
        folder = tmp_path
        loop.train(tiny.config(common.phase(8), log_every=every, eval_every=4), str(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) >= 4
    for row in rows:
        assert (row["examples"], row["tokens"]) == (8 * row["step"], 8 * 32 * row["step"]), row
    flops = [row["flops"] / row["step"] for row in rows[:4]]  # of the first phase
    assert flops == [flops[0]] * 4 and flops[0] > 0


def test_a_finished_run_started_again_only_evaluates(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    found = loop.train(two_phases(), str(folder))
    assert "resuming at step 8" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    recorded = json.loads(before.splitlines()[-1])
    assert found["loss"] == recorded["loss"] and 0 < found["loss"] < 4
    tiny.same(tiny.checkpoint(folder), tiny.checkpoint(whole))


@pytest.mark.slow
def test_a_run_of_another_mesh_is_evaluated_on_the_devices_that_are_here(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "mesh": {"data": 1, "fsdp": 3, "tensor": 64}}))
    capsys.readouterr()
    eval_script.main(["eval.py", f"--workdir={tmp_path / 'run'}"])
    found = json.loads(capsys.readouterr().out)
    recorded = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["step"] == recorded["step"] == 8
    np.testing.assert_allclose(found["loss"], recorded["loss"], rtol=1e-5)


@pytest.mark.slow
def test_another_config_is_refused_and_free_fields_are_not(whole, tmp_path):
    folder = interrupted(whole, tmp_path / "run", 7)
    before = (folder / "config.json").read_text()
    for name, value in {"seed": 1, "batch_size": 16, "compute_dtype": "bfloat16"}.items():
        with pytest.raises(UserError, match=rf"another config\.{name}.*new --workdir"):
            loop.train(two_phases(**{name: value}), str(folder))
    assert (folder / "config.json").read_text() == before
    assert tiny.steps_in(folder) == list(range(1, 8))
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    free = {"mesh": mesh, "log_every": 3, "eval_batches": 1, "keep_checkpoints": 3}
    loop.train(two_phases(**free), str(folder))
    assert tiny.steps_in(folder) == [6, 7, 8]


def test_init_from_starts_where_the_other_run_ended(whole, tmp_path):
    config = tiny.config(common.phase(2, optimizer=SGD), init_from=str(whole))
    _, state = tiny.start(config)
    found = {p: np.asarray(a) for p, a in layout.unstack(state["params"]).items()}
    ended = tiny.checkpoint(whole)
    assert len(found) > 20
    for path, array in found.items():
        assert array.tobytes() == ended[f"params/{path}"].tobytes()
    assert int(state["step"]) == 0
    with pytest.raises(UserError, match=r"init_from.*does not exist"):
        tiny.start(tiny.config(init_from=str(tmp_path / "none")))
    wide = tiny.config(model={"width": 64}, init_from=str(whole))
    with pytest.raises(UserError, match=r"does not fit.*misshapen"):
        tiny.start(wide)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path, packed):
    data = {"depth": 1} | ({"data": tiny.packed_text(tmp_path)} if packed else {})
    phase = common.phase(3, optimizer=SGD, clip=None)
    one, metrics = tiny.states(tiny.config(phase, **data), 3)
    if packed:  # else the weighting would not show
        run, _ = tiny.start(tiny.config(phase, **data))
        rows = [np.asarray(batch["weights"]).sum(axis=1) for batch in tiny.batches(run, 3)]
        assert all(len(set(r)) > 1 for r in rows)
    for count in (2, 4):
        split, split_metrics = tiny.states(tiny.config(phase, accumulate=count, **data), 3)
        for before, after in zip(one[1:], split[1:], strict=True):
            for path in before:
                # Sums of at most 256 float32 terms in another order: a few units in the last place
                # of the largest term.
                np.testing.assert_allclose(after[path], before[path], rtol=1e-5, atol=2e-6)
        for name in ("loss", "accuracy", "weight", "grad_norm"):
            np.testing.assert_allclose(split_metrics[2][name], metrics[2][name], rtol=1e-5)
    # a bias of all keys shifts every logit of a query alike: its gradient is rounding
    params = [p for p in one[0] if p.startswith("params/") and not p.endswith("/k/bias")]
    moved = [np.abs(one[3][p] - one[0][p]).max() for p in params]
    assert min(moved) > 1e-5


@pytest.mark.slow
def test_bfloat16_computes_near_float32_on_float32_weights():
    phase = common.phase(20, optimizer={"name": "adamw", "learning_rate": 3e-3}, ema=0.9)
    _, metrics = tiny.states(tiny.config(phase, depth=1), 20)
    half, half_metrics = tiny.states(tiny.config(phase, depth=1, compute_dtype="bfloat16"), 20)
    floats = [path for path in half[-1] if half[-1][path].dtype != np.int32]
    assert floats and all(half[-1][path].dtype == np.float32 for path in floats)
    moved = [half[-1][p] - half[0][p] for p in half[0] if p.startswith("params/")]
    # float32 master weights hold steps that bfloat16 would round away
    assert any(np.any(jnp.asarray(half[-1][p], jnp.bfloat16) != half[-1][p]) for p in floats)
    assert all(np.abs(m).max() > 0 for m in moved)
    losses = [
        (float(a["loss"]), float(b["loss"])) for a, b in zip(metrics, half_metrics, strict=True)
    ]
    assert any(a != b for a, b in losses)
    np.testing.assert_allclose(*np.transpose(losses), rtol=0.02)
    assert losses[-1][1] < losses[0][1] - 0.1


def test_the_average_is_that_of_the_parameters():
    found, _ = tiny.states(tiny.config(common.phase(6, ema=0.75), depth=1), 6)
    paths = [path for path in found[0] if path.startswith("ema/")]
    assert len(paths) > 10
    for path in paths:
        values = [np.float64(state[path.replace("ema/", "params/")]) for state in found]
        average = values[0]
        for value in values[1:]:
            average = 0.75 * average + 0.25 * value
        np.testing.assert_allclose(found[-1][path], average, rtol=1e-6, atol=1e-7)
    assert any(
        np.abs(found[-1][p] - found[-1][p.replace("ema/", "params/")]).max() > 1e-4 for p in paths
    )


def gradient_step(**fields):
    """(parameters before, their change, metrics) of one step of SGD at rate 1."""
    phase = common.phase(1, **{"optimizer": {"name": "sgd", "learning_rate": 1.0}, **fields})
    found, metrics = tiny.states(tiny.config(phase, depth=1), 1)
    params = [{p: np.float64(a) for p, a in s.items() if p.startswith("params/")} for s in found]
    return params[0], {p: params[1][p] - params[0][p] for p in params[0]}, metrics[0]


@pytest.fixture(scope="module")
def plain():
    return gradient_step(clip=None)


def norm(changes) -> float:
    return float(np.sqrt(sum((change**2).sum() for change in changes.values())))


def test_clipping_bounds_the_global_norm(plain):
    _, change, metrics = plain
    size = norm(change)
    np.testing.assert_allclose(metrics["grad_norm"], size, rtol=1e-5)
    _, clipped, clipped_metrics = gradient_step(clip=size / 3)
    np.testing.assert_allclose(norm(clipped), size / 3, rtol=1e-5)
    np.testing.assert_allclose(clipped_metrics["grad_norm"], size, rtol=1e-5)  # before clipping
    for path in change:
        np.testing.assert_allclose(clipped[path], change[path] / 3, rtol=1e-4, atol=1e-6)
    _, loose, _ = gradient_step(clip=size * 3)
    for path in change:
        np.testing.assert_allclose(loose[path], change[path], rtol=1e-5, atol=1e-7)


def test_learning_rate_multipliers_are_exact(plain):
    before, change, _ = plain
    rules = [
        {"at": r"blocks/0/.*", "learning_rate": 0.3},
        {"at": r"blocks/.*bias", "learning_rate": 5.0},
        {"at": r"blocks/0/mixer/q/bias", "learning_rate": 100.0},  # the first match wins
    ]
    _, scaled, _ = gradient_step(clip=None, parameters=rules)
    exact = 0
    for path in change:
        factor = 0.3 if "blocks/0/" in path else 5.0 if path.endswith("bias") else 1.0
        factor = factor if "blocks/" in path else 1.0
        if not before[path].any():  # from zero the change is the update itself
            expected = np.float32(change[path]) * np.float32(factor)
            assert np.array_equal(np.float32(scaled[path]), expected), path
            exact += 1
        one = np.spacing(np.abs(np.float32(before[path]))).max()
        wanted = factor * change[path]
        np.testing.assert_allclose(scaled[path], wanted, rtol=1e-6, atol=2 * (1 + factor) * one)
    assert exact >= 8


@pytest.mark.slow
def test_weight_decay_is_what_the_rules_say():
    rate, decay = 0.01, 0.5
    adamw = {"name": "adamw", "learning_rate": rate, "weight_decay": decay}
    rules = [{"at": r".*(bias|_norm/.*)", "weight_decay": 0.0}]
    without = {**adamw, "weight_decay": 0.0}
    before, base, _ = gradient_step(optimizer=without)
    _, decayed, _ = gradient_step(optimizer=adamw, parameters=rules)
    _, everywhere, _ = gradient_step(optimizer=adamw)
    for path in base:
        expected = base[path] - rate * decay * before[path]
        one = np.spacing(np.abs(np.float32(before[path]))).max()
        np.testing.assert_allclose(everywhere[path], expected, rtol=1e-5, atol=4 * one)
        exempt = path.endswith("bias") or "_norm/" in path
        if exempt:
            assert np.array_equal(decayed[path], base[path]), path
        else:
            np.testing.assert_allclose(decayed[path], expected, rtol=1e-5, atol=4 * one)
    scale = "params/final_norm/scale"
    assert np.abs(everywhere[scale] - decayed[scale]).max() > 0.9 * rate * decay


@pytest.mark.slow
def test_a_profile_window_is_traced_also_where_a_run_resumes_within_it(tmp_path):
    """In processes of their own: the profiler crashes one in which a test has loaded libtpu."""
    folder = tmp_path / "run"

    def told(first, last):
        config = tmp_path / "mine.py"
        config.write_text(
            "from configs import quickstart\n\ndef get_config(arg=None):\n"
            "    config = quickstart.get_config('smoke')\n"
            "    config.checkpoint_every, config.eval_batches = 2, 1\n"
            f"    config.profile = [{first}, {last}]\n"
            "    return config\n"
        )
        flags = f"--config={config}", f"--workdir={folder}"
        status, out, err = tiny.finish(tiny.command(tiny.TRAIN, *flags))
        assert status == 0, err
        newest = max(tiny.steps_in(folder))
        shutil.rmtree(folder / "checkpoints" / str(newest))
        return newest, re.findall(r"profile of steps (\d+ to \d+): (.*)", out)

    newest, found = told(1, 2)
    assert found == [("1 to 2", f"{folder}/profile")]
    assert len(list(folder.rglob("*.xplane.pb"))) == 1
    assert told(0, 99)[1] == [(f"{newest - 2} to {newest - 1}", f"{folder}/profile")]
    assert len(list(folder.rglob("*.xplane.pb"))) == 2
    assert told(newest + 3, newest + 9)[1] == []


@register("surgery", "test_blank")
class Blank:
    """Makes every array zero."""

    def apply(self, model):
        del model

    def convert(self, values, model, key):
        del model, key
        return {path: jnp.zeros_like(array) for path, array in values.items()}


@pytest.mark.slow
def test_surgery_after_the_last_step_is_what_is_evaluated(tmp_path, capsys):
    config = tiny.config(common.phase(2), common.phase(0, surgery=[{"name": "test_blank"}]))
    uniform = np.log(16)  # nats, of a model whose logits are all zero
    for _ in range(2):  # the second time resumed after the last step
        found = loop.train(config, str(tmp_path))
        np.testing.assert_allclose(found["loss"], uniform, rtol=1e-6)
    capsys.readouterr()
    loop.evaluate(config, str(tmp_path), None, 0, 0.0)
    printed = json.loads(capsys.readouterr().out)  # nothing else, for a program to read
    np.testing.assert_allclose(printed["loss"], uniform, rtol=1e-6)
    assert printed["step"] == 2
    trained = tiny.checkpoint(tmp_path)
    assert np.abs(trained["params/embed/table"]).max() > 0


@register("schedule", "test_explodes")
def explodes(total_steps, *, at: int):
    """A rate that is sane up to step `at` and infinite there."""
    del total_steps
    return lambda step: jnp.where(step < at, 1e-2, jnp.inf)


@pytest.mark.parametrize("every", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, every):
    optimizer = {"name": "sgd", "learning_rate": {"name": "test_explodes", "at": 5}}
    phase = common.phase(12, optimizer=optimizer)
    fields = {"checkpoint_every": every, "keep_checkpoints": 20, "log_every": 4}
    with pytest.raises(UserError) as raised:
        loop.train(tiny.config(phase, **fields), str(tmp_path))
    message, good = str(raised.value), 5 if every == 1 else 4
    assert "at step 6" in message, message  # the update of step 6 is the infinite one
    assert f"checkpoint is step {good} in {tmp_path}/checkpoints" in message
    assert "config.phases[0].optimizer.learning_rate" in message
    assert tiny.steps_in(tmp_path)[-1] == good
    saved = tiny.checkpoint(tmp_path)
    assert all(np.isfinite(array).all() for array in saved.values())


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    flags = ["--config=configs/quickstart.py:smoke", "--config.checkpoint_every=0"]
    flags += ["--config.log_every=1", "--config.eval_every=0", "--config.plot=False"]
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = tiny.command(tiny.TRAIN, *flags, f"--workdir={stopped}")
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGTERM)
    status, out, err = tiny.finish(process)
    assert (status, err) == (143, ""), (status, out, err)
    assert "stopped by SIGTERM at step" in out and "saved" in out
    (step,) = tiny.steps_in(stopped)
    assert step < 6
    status, out, err = tiny.finish(tiny.command(tiny.TRAIN, *flags, f"--workdir={stopped}"))
    assert (status, err) == (0, ""), err
    assert f"resuming at step {step}" in out
    status, _, err = tiny.finish(tiny.command(tiny.TRAIN, *flags, f"--workdir={straight}"))
    assert (status, err) == (0, ""), err
    tiny.same(tiny.checkpoint(stopped), tiny.checkpoint(straight))
    assert [row for row in tiny.rows(stopped) if row[1] == "train"] == [
        (step, "train") for step in range(1, 7)
    ]


@pytest.mark.slow
def test_scanned_blocks_equal_unrolled_ones():
    phase = common.phase(3, optimizer=SGD)
    finals = {}
    for scan_from in (6, 100):
        config = tiny.config(phase, depth=8, model={"scan_from": scan_from})
        run, state = tiny.start(config)
        stacked = any("0-7" in path for path in state["params"])
        assert stacked == (scan_from == 6)
        train_step = run.train_step(run.phases[0])
        for batch in tiny.batches(run, 3):
            state, metrics = train_step(state, batch)
        finals[scan_from] = tiny.host(layout.unstack(state["params"])), tiny.host(metrics)
    (scanned, scanned_metrics), (unrolled, unrolled_metrics) = finals.values()
    assert set(scanned) == set(unrolled)
    for path in unrolled:
        np.testing.assert_allclose(scanned[path], unrolled[path], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(scanned_metrics["loss"], unrolled_metrics["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan_from", [1, 6])
def test_recomputation_changes_no_gradient(scan_from):
    phase = common.phase(2, optimizer=SGD)
    found = {}
    for remat in ("none", "dots", "full"):
        config = tiny.config(phase, model={"remat": remat, "scan_from": scan_from})
        found[remat], _ = tiny.states(config, 2)
    for remat in ("dots", "full"):
        for path, expected in found["none"][2].items():
            np.testing.assert_allclose(found[remat][2][path], expected, rtol=1e-5, atol=2e-6)
    text = {}
    for remat in ("none", "full"):  # that something is computed again
        config = tiny.config(phase, model={"remat": remat, "scan_from": scan_from})
        run, state = tiny.start(config)
        step = run.train_step(run.phases[0])
        text[remat] = str(jax.make_jaxpr(step)(state, tiny.batches(run, 1)[0]))
    assert "remat" in text["full"] and "remat" not in text["none"]
