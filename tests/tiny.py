"""What the tests of the loop share: runs of a tiny model, their arrays, and `train.py` outside."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import common
from efficient.checkpoints.checkpoint import Checkpointer, read
from efficient.training import loop
from efficient.training.run import Run, flatten

ROOT = pathlib.Path(__file__).parents[1]
TRAIN, EVAL = ROOT / "train.py", ROOT / "eval.py"


def config(*phases: dict, depth: int = 2, rules=None, model=None, **fields) -> ConfigDict:
    """A GPT-2-shaped decoder, 32 wide, on 32 tokens of the copying task, in batches of 8."""
    config = common.defaults()
    sizes = {"width": 32, "depth": depth, "max_length": 32}
    config.model = {"name": "decoder", "tied": True, **sizes, **(model or {})}
    config.rules = common.gpt2(32, depth, 2) if rules is None else rules
    task = {"length": 32, "num_tokens": 8, "train_size": 64, "eval_size": 24}
    config.data = {"name": "copying", **task}
    config.batch_size, config.log_every, config.plot = 8, 1, False
    config.phases = list(phases) or [common.phase(4)]
    for name, value in fields.items():
        config[name] = value
    return config


def packed_text(folder: pathlib.Path) -> dict:
    """`config.data` of packed documents, whose examples hold unequal numbers of tokens."""
    rng = np.random.default_rng(0)
    for i in range(40):
        text = rng.integers(97, 123, size=int(rng.integers(5, 60))).astype(np.uint8)
        (folder / f"{i}.txt").write_bytes(text.tobytes())
    return {"name": "text", "path": str(folder), "length": 32, "packing": "documents"}


def llama_rules(heads: int = 4, kv_heads: int = 2) -> list[dict]:
    return common.llama(heads, kv_heads, hidden=64)


def mesh_of(**sizes):
    """A mesh of these axes on the first of the fake devices."""
    count = int(np.prod(list(sizes.values())))
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), auto, devices=jax.devices()[:count])


def layout(mesh):
    """How queries [B, T, N, H] lie on a mesh of data, sequence and tensor, or of some of them."""
    if "data" not in mesh.shape:
        return NamedSharding(
            mesh, P(None, "sequence", "tensor" if "tensor" in mesh.shape else None)
        )
    tensor = ("tensor",) if "tensor" in mesh.shape else None
    return NamedSharding(mesh, P(("data",), ("sequence",), tensor, None))


def host(arrays) -> dict[str, np.ndarray]:
    """A (nested) state as path -> NumPy array."""
    return {path: np.asarray(a) for path, a in flatten(arrays).items()}


def start(config: ConfigDict, devices=None):
    """(run, its first state) on the given devices, by default one."""
    run = Run(config, devices or jax.devices()[:1])
    return run, run.start()


def batches(run: Run, steps: int):
    """The first `steps` batches of a run, on its mesh."""
    size = run.config.batch_size
    with loop.data_lib.batches(run.train_source, batch_size=size, seed=run.config.seed) as source:
        return [run.placement.place_batch(next(source), size) for _ in range(steps)]


def states(config: ConfigDict, steps: int, devices=None) -> tuple[list[dict], list[dict]]:
    """The states before and after each of the first steps, and the steps' metrics, in NumPy."""
    run, state = start(config, devices)
    train_step = run.train_step(run.phases[0])
    found, metrics = [host(state)], []
    for batch in batches(run, steps):
        state, values = train_step(state, batch)
        found.append(host(state))
        metrics.append(host(values))
    return found, metrics


def checkpoint(workdir, at: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by the path of its single layer."""
    folder = str(pathlib.Path(workdir) / "checkpoints")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for path, (shape, dtype) in read(folder, at).items()
    }
    with Checkpointer(folder) as checkpoints:
        arrays, _ = checkpoints.restore(target, at)
    return {path: np.asarray(a) for path, a in arrays.items()}


def steps_in(workdir) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = pathlib.Path(workdir) / "checkpoints"
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def same(found, expected, only=lambda path: True) -> None:
    """Asserts that both hold the same paths and, bit for bit, the same arrays."""
    assert set(found) == set(expected)
    paths = [path for path in sorted(expected) if only(path)]
    assert paths
    different = [p for p in paths if found[p].tobytes() != expected[p].tobytes()]
    assert not different


def rows(workdir) -> list[tuple[int, str]]:
    """(step, kind) of each line of metrics.jsonl."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["kind"]) for row in map(json.loads, lines)]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a command outside this process, with that many CPU devices."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def command(script: pathlib.Path, *flags: str, devices: int = 1, **options) -> subprocess.Popen:
    """`train.py` or `eval.py` in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, str(script), *flags], cwd=ROOT, env=environment(devices), **pipes
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) once the command has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err
