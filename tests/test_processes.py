"""Two processes over loopback: they train as one does, save, resume, and notice a death."""

import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

FLAGS = (
    "--config=configs/quickstart.py:smoke",
    "--config.checkpoint_every=2",
    "--config.log_every=1",
    "--config.plot=False",
    "--config.sample.length=0",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pair(folder, *flags, devices=1):
    """The two processes of a run, with a device each."""
    where = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--workdir={folder}")
    return [
        tiny.command(tiny.TRAIN, *FLAGS, *flags, *where, f"--process={i}", devices=devices)
        for i in range(2)
    ]


def ended(processes, timeout=300):
    return [tiny.finish(process, timeout) for process in processes]


def wait_for_checkpoint(folder, timeout=200) -> None:
    """Until a checkpoint of this workdir is complete: they are written beside the steps."""
    until = time.monotonic() + timeout
    while not tiny.steps_in(folder):
        assert time.monotonic() < until, "no checkpoint was completed"
        time.sleep(0.01)


def wait_for(process, start: str) -> None:
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The workdir of the same run in one process with two devices."""
    folder = tmp_path_factory.mktemp("one")
    status, _, err = tiny.finish(tiny.command(tiny.TRAIN, *FLAGS, f"--workdir={folder}", devices=2))
    assert (status, err) == (0, ""), err
    return folder


def check(folder, expected) -> None:
    """The same run up to the order of the two devices' sums, in another library."""
    found, wanted = tiny.checkpoint(folder), tiny.checkpoint(expected)
    assert set(found) == set(wanted)
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)
    assert tiny.rows(folder) == tiny.rows(expected)
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (folder, expected)]
    losses = [[json.loads(line)["loss"] for line in of] for of in lines]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--config.mesh.data=1", "--config.mesh.fsdp=2")])
def test_two_processes_train_as_one_does(one_process, tmp_path, mesh):
    (status, out, err), (other, silent, _) = ended(pair(tmp_path / "run", *mesh))
    assert (status, other) == (0, 0), err
    assert "2 x cpu" in out and not [x for x in silent.splitlines() if "[Gloo]" not in x]
    check(tmp_path / "run", one_process)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_they_go_on(one_process, tmp_path):
    processes = pair(tmp_path / "run")
    wait_for(processes[0], "step 1/")
    processes[1].send_signal(signal.SIGTERM)
    (status, out, err), (other, _, _) = ended(processes)
    assert (status, other) == (143, 143), (out, err)
    (step,) = tiny.steps_in(tmp_path / "run")[-1:]
    assert step < 6
    (status, out, err), _ = ended(pair(tmp_path / "run"))
    assert status == 0 and f"resuming at step {step}" in out, err
    check(tmp_path / "run", one_process)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_stops_the_other(one_process, tmp_path, victim):
    processes = pair(tmp_path / "run")
    wait_for(processes[0], "step 2/")
    processes[victim].kill()
    began = time.monotonic()
    status, _, err = tiny.finish(processes[1 - victim], timeout=120)
    assert time.monotonic() - began < 60
    assert status not in (0, -9)
    # JAX itself ends the processes that lose process 0, where its coordination service runs
    assert ("another task died" if victim == 0 else "another process of this run has died") in err
    tiny.finish(processes[victim])
    (status, _, err), _ = ended(pair(tmp_path / "run"))
    assert status == 0, err
    check(tmp_path / "run", one_process)


# data x tensor, an axis of it between two processes and one within each.
SPLIT = ("--config.mesh.data=2", "--config.mesh.tensor=2")

# Restores the newest checkpoint in one of N processes, of 4 / N devices each, and writes it whole.
RESTORE = """
import json, pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
folder, out, coordinator, count, index = sys.argv[1:]
if count != "1":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(count), int(index))
from ml_collections import ConfigDict
from efficient.training import loop
from efficient.training.run import Run
run = Run(ConfigDict(json.loads((pathlib.Path(folder) / "config.json").read_text())))
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 4 // int(count)
_, state = loop.restored(run, pathlib.Path(folder))
whole = {p: multihost_utils.process_allgather(a, tiled=True) for p, a in state["params"].items()}
if jax.process_index() == 0:
    np.savez(out, **whole)
"""


def restored(folder, out, count):
    """Parameters by path, restored by `count` processes that share four devices."""
    arguments = (str(folder), str(out), f"127.0.0.1:{free_port()}", str(count))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RESTORE, *arguments, str(i)],
            cwd=tiny.ROOT,
            env=tiny.environment(4 // count),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    for process in processes:
        status, _, err = tiny.finish(process)
        assert status == 0, err
    with np.load(out) as found:
        return dict(found)


@pytest.mark.slow
def test_a_death_on_a_mesh_of_two_axes_and_restoring_at_other_numbers_of_processes(tmp_path):
    folder, one = tmp_path / "run", tmp_path / "one"
    command = tiny.command(tiny.TRAIN, *FLAGS, *SPLIT, f"--workdir={one}", devices=4)
    status, _, err = tiny.finish(command)
    assert status == 0, err
    processes = pair(folder, *SPLIT, devices=2)
    wait_for_checkpoint(folder)
    processes[1].kill()
    began = time.monotonic()
    status, _, err = tiny.finish(processes[0], timeout=120)
    assert time.monotonic() - began < 60
    assert status not in (0, -9) and "another process of this run has died" in err
    tiny.finish(processes[1])
    (status, out, err), _ = ended(pair(folder, *SPLIT, devices=2))
    assert status == 0, err
    assert "resuming at step" in out
    check(folder, one)
    found = {n: restored(folder, tmp_path / f"{n}.npz", n) for n in (1, 2, 4)}
    assert found[1]
    for path, array in found[1].items():
        assert np.abs(array).max() > 0 or path.endswith("bias")
        for n in (2, 4):
            assert found[n][path].tobytes() == array.tobytes(), (n, path)


def test_a_process_that_finds_no_other_says_so(tmp_path):
    where = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process=1")
    process = tiny.command(tiny.TRAIN, *FLAGS, *where, "--wait=3", f"--workdir={tmp_path / 'run'}")
    status, _, err = tiny.finish(process, timeout=100)
    assert status != 0
    assert "error: the processes did not meet" in err
    assert not (tmp_path / "run").exists()
