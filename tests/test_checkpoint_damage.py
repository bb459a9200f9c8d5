"""Checkpoints: nothing lost to damage, to being killed, or to another process."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import ROOT, assert_bitwise, place, save_three, structs, tree

from efficient.checkpoints.checkpoint import Checkpointer
from efficient.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_three(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    """A copy of them to write to."""
    return shutil.copytree(saved, tmp_path / "run")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp
from efficient.checkpoints.checkpoint import Checkpointer
checkpoints = Checkpointer({directory!r})
"""


def python(code, directory, **options):
    code = SCRIPT.format(root=str(ROOT), directory=str(directory)) + code
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = tiny.environment()
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes, **options)


QUIET = """
for step in (1, 2):
    x = jnp.arange(float(1 << 20)).reshape(2, -1) + step
    checkpoints.save(step, {'x/0-1/y': x}, {}, wait=True)
for file in checkpoints.directory.glob("2/arrays/*/d/*"):
    file.write_bytes(file.read_bytes()[:file.stat().length // 2])
checkpoints.restore({'x/0-1/y': jax.ShapeDtypeStruct(x.shape, x.dtype)})
checkpoints.save(3, {'x/0-1/y': x + 1}, {})
"""


def test_damage_gives_one_line_and_leaving_python_finishes_the_save(tmp_path):
    out, err = python(QUIET, tmp_path).communicate(timeout=180)
    assert err == ""
    damaged, moved, *lost = out.splitlines()
    assert damaged.startswith("checkpoint 2 is damaged: ") and damaged.endswith("; using 1")
    assert moved == "checkpoint 2 is now 2.damaged"
    if lost:  # Python 3.12 and newer start no threads when they exit
        assert sys.version_info >= (3, 12)
        assert lost[0].startswith("checkpoint 3 could not be written: RuntimeError: can't create")
    target = {"x/0-1/y": jax.ShapeDtypeStruct((2, 1 << 19), jnp.float32)}
    found, metadata = Checkpointer(tmp_path).restore(target)
    step = metadata["step"]
    assert step == (1 if lost else 3)
    expected = np.arange(1 << 20, dtype=np.float32) + np.float32(step)
    assert np.array_equal(found["x/0-1/y"].reshape(-1), expected)


# Being killed

ENDLESS = """
for step in range(1, 10**6):
    x = jax.random.normal(jax.random.key(step), (4, 128, 512))
    checkpoints.save(step, {'blocks/0-3/w': x, 'state/step': jnp.int32(step)}, {})
    print(step, flush=True)
"""


def kill_while_saving(directory, delay):
    """Kills a run of endless saves `delay` seconds after its second save; latest step before."""
    process = python(ENDLESS, directory)
    for line in process.stdout:
        if int(line) >= 2:
            break
        assert process.poll() is None
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    told = [int(line) for line in process.stdout.read().split()]
    process.stderr.close()
    process.stdout.close()
    process.wait()
    return max(told, default=2)


def check_killed(directory, told, capsys):
    target = {
        "blocks/0-3/w": jax.ShapeDtypeStruct((4, 128, 512), jnp.float32),
        "state/step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    with Checkpointer(directory) as checkpoints:
        capsys.readouterr()
        arrays, metadata = checkpoints.restore(target)
        assert capsys.readouterr().out == ""  # what is half-written is not even a candidate
        step = metadata["step"]
        # `told` was handed over; the one before it was complete by then.
        assert told - 1 <= step <= told + 1 and checkpoints.latest() == step
        expected = jax.random.normal(jax.random.key(step), (4, 128, 512))
        assert_bitwise(arrays, {"blocks/0-3/w": expected, "state/step": np.int32(step)})
        checkpoints.save(step + 1, arrays, {}, wait=True)
    assert all(p.name.isdigit() for p in Path(directory).iterdir())  # no leftovers


@pytest.mark.parametrize("seed", range(3))
def test_killed_in_the_middle_of_saving(tmp_path, seed, capsys):
    told = kill_while_saving(tmp_path, random.Random(seed).uniform(0, 0.5))
    check_killed(tmp_path, told, capsys)


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path, capsys):
    for i in range(10):
        told = kill_while_saving(tmp_path / str(i), 0.05 * i)
        check_killed(tmp_path / str(i), told, capsys)


# Damage


def data_files(step):
    """The files of OCDBT, smallest first; the last holds the arrays themselves."""
    files = [p for p in step.rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: ("process" in str(p), p.stat().st_size))


def flip(path, offset, bit=0):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(bytes(raw))


def change_json(checkpoint_, **changes):
    path = checkpoint_ / "metadata" / "metadata"
    content = json.loads(path.read_text())
    content["metadata"].update(changes)
    path.write_text(json.dumps(content))


DAMAGE = {
    "no arrays": lambda s: shutil.rmtree(s / "arrays"),
    "no data": lambda s: [p.unlink() for p in data_files(s)],
    "no manifest": lambda s: [p.unlink() for p in s.rglob("manifest.ocdbt")],
    "cut data": lambda s: [p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
                           for p in data_files(s)],
    "empty data": lambda s: [p.write_bytes(b"") for p in data_files(s)],
    "zeroed data": lambda s: [p.write_bytes(bytes(p.stat().st_size)) for p in data_files(s)],
    "flipped bit": lambda s: flip(data_files(s)[-1], data_files(s)[-1].stat().st_size // 3),
    "flipped index": lambda s: flip(data_files(s)[0], data_files(s)[0].stat().st_size // 3),
    "garbled tree": lambda s: (s / "arrays" / "_METADATA").write_text("[1, 2"),
    "no json": lambda s: (s / "metadata" / "metadata").unlink(),
    "empty json": lambda s: (s / "metadata" / "metadata").write_text(""),
    "garbled json": lambda s: (s / "metadata" / "metadata").write_bytes(b'{"metadata": \xff\xfe'),
    "other json": lambda s: (s / "metadata" / "metadata").write_text("[]"),
    "changed json": lambda s: change_json(s, step=301),
    "nothing": lambda s: [shutil.rmtree(s), s.mkdir()],
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(run, kind, capsys):
    DAMAGE[kind](run / "300")
    checkpoints = Checkpointer(run)
    arrays, metadata = checkpoints.restore(structs(tree()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("checkpoint 300 is damaged: ") and lines[0].endswith("; using 200")
    assert metadata["step"] == 200
    assert_bitwise(arrays, tree(200))
    assert checkpoints.latest() == 200


def test_a_flipped_bit_anywhere_never_goes_unnoticed(run, capsys):
    rng, pristine, steps = random.Random(0), run / "300.copy", []
    (run / "300").rename(pristine)
    files = [p.relative_to(pristine) for p in pristine.rglob("*") if p.is_file()]
    for i in range(24):
        shutil.rmtree(run / "300", ignore_errors=True)
        shutil.copytree(pristine, run / "300")
        if i % 2:  # half of them in the arrays themselves
            path = data_files(run / "300")[-1]
        else:
            path = run / "300" / rng.choice(files)
        if path.stat().st_size:
            flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        arrays, metadata = Checkpointer(run).restore(structs(tree()))
        assert_bitwise(arrays, tree(metadata["step"]))  # either 300 unharmed or 200
        steps.append(metadata["step"])
    assert steps[1::2].count(200) >= 8  # the rest fell on bytes that nothing reads
    told = capsys.readouterr().out
    assert told.count("300 is damaged: the checksum of ") >= 4  # else unnoticed by Orbax


def test_damaged_checkpoints_are_moved_aside_not_deleted(run, capsys):
    DAMAGE["flipped bit"](run / "300")
    files = {p.relative_to(run / "300") for p in (run / "300").rglob("*")}
    with Checkpointer(run, keep=2) as checkpoints:
        checkpoints.restore(structs(tree()))
        assert {p.name for p in run.iterdir()} == {"100", "200", "300"}  # reading changes nothing
        for step in (250, 300, 350):
            checkpoints.save(step, place(tree(step)), {})
        checkpoints.wait()
        assert_bitwise(checkpoints.restore(structs(tree()), 300)[0], tree(300))
    assert {p.name for p in run.iterdir()} == {"300", "350", "300.damaged"}
    assert {p.relative_to(run / "300.damaged") for p in (run / "300.damaged").rglob("*")} == files
    DAMAGE["flipped bit"](run / "350")
    DAMAGE["no json"](run / "300")
    with Checkpointer(run, keep=1) as checkpoints, pytest.raises(UserError):
        checkpoints.restore(structs(tree()))
    with Checkpointer(run) as checkpoints:
        with pytest.raises(UserError):
            checkpoints.restore(structs(tree()), 300)
        checkpoints.save(300, place(tree(1)), {})
    names = {p.name for p in run.iterdir()}
    assert names == {"300", "300.damaged", "300.damaged.1", "350.superseded"}


def test_all_damaged_is_an_error_and_deletes_nothing(run):
    for step, kind in ((100, "no data"), (200, "garbled json"), (300, "flipped bit")):
        DAMAGE[kind](run / str(step))
    before = {p: p.is_file() and p.read_bytes() for p in run.rglob("*")}
    checkpoints = Checkpointer(run)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(300: "):
        checkpoints.restore(structs(tree()))
    assert {p: p.is_file() and p.read_bytes() for p in run.rglob("*")} == before
    assert checkpoints.latest() is None


def test_a_step_asked_for_by_number_is_not_replaced_by_another(run):
    DAMAGE["cut data"](run / "300")
    with pytest.raises(UserError, match="checkpoint 300 is damaged: "):
        Checkpointer(run).restore(structs(tree()), 300)
    with pytest.raises(UserError, match=r"no checkpoint 250; it has \[100, 200, 300\]"):
        Checkpointer(run).restore(structs(tree()), 250)


# Several processes

TWO = """
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
index, port, directory = int(sys.argv[1]), sys.argv[2], {directory!r}
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, index)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

def host(step):
    kernel = np.random.default_rng(step).normal(size=(3, 64, 64)).astype(np.float32)
    return {{"blocks/0-2/w": kernel, "step": np.int32(step)}}

def specs(spec):
    return {{"blocks/0-2/w": NamedSharding(mesh, P(None, *spec)), "step": NamedSharding(mesh, P())}}

def place(step):
    put = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda i: np.asarray(x)[i])
    return jax.tree.map(put, host(step), specs(("data", "model")))

def restored(checkpoints, step):
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s),
        host(0), specs(("model", None)))
    arrays, metadata = checkpoints.restore(target)
    assert metadata["step"] == step, metadata
    for key, value in host(step).items():
        for shard in arrays[key].addressable_shards:
            assert np.array_equal(shard.data, np.asarray(value)[shard.index]), key

for step in (100, 200, 300):
    checkpoints.save(step, place(step), {{"phase": 0}})
checkpoints.wait()
restored(checkpoints, 300)
if index == 0:
    for path in checkpoints.directory.glob("300/arrays/ocdbt.process_1/d/*"):
        path.unlink()
    print("now", flush=True)
multihost_utils.sync_global_devices("damaged")
restored(checkpoints, 200)
checkpoints.save(300, place(301), {{}})
checkpoints.save(400, place(400), {{}})
restored(checkpoints, 400)
checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_save_agree_on_damage_and_restore(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = (SCRIPT + TWO).format(root=str(ROOT), directory=str(tmp_path))
    code = code.replace("checkpoints = Checkpointer", "make = lambda: Checkpointer", 1)
    code = code.replace("def host(", "checkpoints = make()\n\ndef host(", 1)
    command, env = [sys.executable, "-c", code], tiny.environment(2)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    both = [subprocess.Popen([*command, str(i), str(port)], **pipes) for i in range(2)]
    try:
        outs = [process.communicate(timeout=150)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(outs)
    assert "checkpoint 300 is damaged: " in outs[0] and "; using 200" in outs[0]
    assert "damaged" not in outs[1]
    assert {p.name for p in tmp_path.iterdir()} == {"300", "400", "300.damaged"}
    target = {"blocks/0-2/w": jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)}
    arrays, _ = Checkpointer(tmp_path).restore(target, allow_extra=["step"])
    expected = np.random.default_rng(400).normal(size=(3, 64, 64)).astype(np.float32)
    assert_bitwise(arrays, {"blocks/0-2/w": expected})
