"""kill -9 at any moment: the same command, started again until it ends, ends with the same bits."""

import random
import shutil
import subprocess
import time

import pytest
import tiny

FLAGS = (
    "--config=configs/quickstart.py:smoke",
    "--config.checkpoint_every=1",
    "--config.eval_every=3",
    "--config.log_every=1",
    "--config.plot=False",
    "--config.sample.length=0",
)


def start(folder, workers: int):
    workers = f"--config.data_workers={workers}"
    return tiny.command(tiny.TRAIN, *FLAGS, workers, f"--workdir={folder}")


def straight(folder, workers: int) -> float:
    """Runs without interruption; gives its seconds."""
    began = time.monotonic()
    status, _, err = tiny.finish(start(folder, workers))
    assert (status, err) == (0, ""), err
    return time.monotonic() - began


def go_on_until_the_end(folder, workers: int) -> str:
    """Starts the command again, at most twice: what a kill leaves must never stop it."""
    status, out, err = tiny.finish(start(folder, workers))
    assert status == 0, err
    assert "Traceback" not in err
    return out


def check(folder, expected) -> None:
    tiny.same(tiny.checkpoint(folder), tiny.checkpoint(expected))
    assert tiny.rows(folder) == tiny.rows(expected)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(workdir of an uninterrupted run, its seconds)."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, straight(folder, 0)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_ends_with_the_same_bits(expected, tmp_path):
    process = start(tmp_path / "run", 0)
    for line in process.stdout:
        if line.startswith("step 2/"):  # the save of step 1 or 2 is under way
            break
    process.kill()
    process.wait()
    process.stdout.close(), process.stderr.close()
    assert 6 not in tiny.steps_in(tmp_path / "run")
    go_on_until_the_end(tmp_path / "run", 0)
    check(tmp_path / "run", expected[0])


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 2), (3, 2)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(expected, tmp_path, seed, workers):
    reference, seconds = expected
    folder, rng = tmp_path / "run", random.Random(seed)
    killed = 0
    for _ in range(4):  # anywhere from the imports, through compilation, to the last save
        began = time.monotonic()
        process = start(folder, workers)
        try:
            process.communicate(timeout=rng.uniform(0.1, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=30)  # ends when no worker holds the pipes any more
            killed += 1
            continue
        if killed:
            break
        shutil.rmtree(folder)  # it was faster than the first run: again, and sooner
        seconds = (time.monotonic() - began) / 2
    assert killed
    go_on_until_the_end(folder, workers)
    check(folder, reference)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_passed_over(expected, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(expected[0], folder)
    newest = folder / "checkpoints" / "6"
    newest.rename(folder / "checkpoints" / "6.orbax-checkpoint-tmp-1")
    out = go_on_until_the_end(folder, 0)
    assert "resuming at step 5" in out
    check(folder, expected[0])
