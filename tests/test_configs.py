"""Every config builds at full size without allocating; the slow tests make its smoke run."""

import importlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

import train
from configs import common
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.parallel import redco
from efficient.parallel.mesh import AXES, make_mesh
from efficient.parallel.placement import Placement
from efficient.training import experiment
from efficient.training.run import Run

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common")
)
FACTS = {"vocab_size": 256, "image_size": (8, 8), "channels": 1, "num_classes": 10}


def load(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_full_config_builds_abstractly(name):
    config = load(name)
    model, _ = experiment.build_model(config, FACTS)
    mesh = make_mesh({"data": -1})
    placement = Placement.parse(mesh, redco.expand(config.placement, model, mesh.shape))
    phases = experiment.build_phases(config, model, placement)
    assert phases[-1].stop == sum(p["steps"] for p in config.phases) > 0
    assert all(p.trained for p in phases)
    assert set(config.mesh) == set(AXES), "an override of a mesh axis would be refused"


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_how_to_run_it(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    for part in ("Command:", "Hardware:", "Expected:", f"configs/{name}.py"):
        assert part in text, f"configs/{name}.py: its docstring lacks {part!r}"


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published: OpenAI's GPT-2 small, Meta's Llama 7B and Llama 2 70B, Google's Gemma 2B.
    [
        ("gpt2_124m", 124_439_808),
        ("llama_7b", 6_738_415_616),
        ("llama_70b", 68_976_648_192),
        ("gemma_2b", 2_506_172_416),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    model, _ = experiment.build_model(load(name), {})
    shapes = model_lib.abstract(model)
    assert sum(math.prod(s.shape) for s in shapes.values()) == parameters


def test_argument_composes_with_overrides_and_refuses_what_it_does_not_know():
    assert common.parse("smoke,depth=3", depth=1).to_dict() == {"smoke": True, "depth": 3}
    assert common.parse(None, depth=1).depth == 1
    with pytest.raises(UserError, match="did you mean 'depth'"):
        common.parse("depht=3", depth=1)
    with pytest.raises(UserError, match="is no int"):
        common.parse("depth=three", depth=1)
    with pytest.raises(UserError, match="'objectiv'; did you mean"):
        common.phase(3, objectiv={})


def test_rules_compose_across_papers():
    """The README's example: a linear in two layers, a wiring in all, before the base's rules."""
    config = common.small_lm(common.parse("smoke"))
    config.rules = [
        {"at": r"blocks/0/channel/.*", "use": "monarch", "blocks": 4},
        {"at": r"blocks/\d+", "use": "hybrid_norm"},
        *config.rules,
    ]
    config.batch_size = 8  # one example for each of the tests' devices
    run = Run(config)
    shapes = run.phases[0].shapes
    assert shapes["blocks/1/channel/up/kernel"].shape == (64, 256)
    assert not any(p.startswith("blocks/0/channel/up/kernel") for p in shapes)
    assert "blocks/1/mixer/q_norm/scale" in shapes


# A process that has imported what a run imports, and whose copies make the runs: four seconds each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "efficient.training.loop", __name__])


def train_in_a_copy(argv, home, log):
    """`python train.py ...`, without LLVM's optimization; what it prints goes into `log`."""
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(ROOT)
    os.environ |= {"HOME": home, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    train.main(["train.py", *argv])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_smoke_run_ends_well_within_a_minute(name, tmp_path):
    start, log = time.monotonic(), tmp_path / "log"
    argv = [f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}/run", "--config.seed=3"]
    run = FORKS.Process(target=train_in_a_copy, args=(argv, str(tmp_path), str(log)))
    run.start()
    run.join(300)
    run.kill()
    assert run.exitcode == 0, log.read_text()[-2000:]
    assert time.monotonic() - start < 60
    check_smoke_run(tmp_path / "run")


@pytest.mark.slow
def test_quickstart_smoke_run_as_a_user_starts_it(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py:smoke"]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run", "--config.seed=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_smoke_run(tmp_path / "run")
    check_everything_is_shown(done.stdout, tmp_path / "run")


def check_smoke_run(folder: pathlib.Path) -> None:
    """Held-out figures are there, and the override of the seed."""
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(row["kind"] == "eval" and math.isfinite(row["loss"]) for row in rows)
    assert json.loads((folder / "config.json").read_text())["seed"] == 3


def check_everything_is_shown(text: str, folder: pathlib.Path) -> None:
    """What the first command of the README prints and leaves behind."""
    assert re.search(r"^step +\d+/\d+  loss \d+\.\d+ .*tokens/s .*ETA ", text, re.M)
    held_out = re.search(
        r"^held-out at step \d+: .*bits_per_byte ([\d.]+).*bigram model", text, re.M
    )
    assert held_out and 0 < float(held_out[1]) < 9
    sample = text[text.index("def ", held_out.end()) :]
    assert len(sample.encode()) > 30
    for name in ("metrics.jsonl", "tensorboard", "loss.png"):
        assert name in text[text.rindex("files ") :] and (folder / name).exists()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").rglob("*tfevents*"))
    assert str(folder / "checkpoints") in text and list((folder / "checkpoints").iterdir())
    assert list((folder / "compile_cache").iterdir())  # the same command starts faster again


@pytest.mark.slow
def test_the_argument_of_a_config_composes_with_overrides_of_its_fields(tmp_path):
    flags = ["--config.model.depth=1", "--config.sample.length=3", "--config.profile=(1,2)"]
    command = [sys.executable, "train.py", "--config=configs/lamb.py:smoke,adamw", *flags]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    subprocess.run([*command, f"--workdir={tmp_path}/run"], cwd=ROOT, check=True, env=env)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["phases"][0]["optimizer"]["name"] == "adamw"
    assert (config["model"]["depth"], config["sample"]["length"]) == (1, 3)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
