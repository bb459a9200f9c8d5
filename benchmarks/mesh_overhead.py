"""What a mesh costs where it can gain nothing: fake devices of one CPU against one device.

    python -m benchmarks.mesh_overhead [--turns N] [--only NAME,...] [--json PATH]

A train step of the small language model, the same batch in every mesh, by turns in one process. All
devices share the machine's cores, so that the total work over the time is what is compared: the
figure is the median over turns of a mesh's time over that of one device in the same turn, with
quartiles. Pipelines are compared with one device that accumulates the same microbatches; they
compute each chunk again in the backward pass (`remat=full` on one device does too).
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import jax
import numpy as np

from benchmarks.records import by_turns, quartiles, record
from configs import common
from efficient import data as data_lib
from efficient.training.run import Run

# name -> (mesh, what one device does too)
MESHES = {
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {}),
    "tensor": ({"data": 4, "tensor": 2}, {}),
    "sequence": ({"data": 4, "sequence": 2}, {}),
    "data x fsdp x tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    "pipeline": ({"data": 2, "pipeline": 4}, {"accumulate": 8}),
}


def config(mesh: dict, **fields):
    """The small language model, 32 sequences of 128 tokens a step."""
    found = common.small_lm(common.parse(None))
    found.batch_size, found.mesh = 32, mesh
    for name, value in fields.items():
        found[name] = value
    if "accumulate" in fields:
        found.model = {**found.model, "remat": "full"}
    return found


def prepared(config, devices):
    """A call that takes a step; it keeps the state of the last one."""
    run = Run(config, devices)
    phase, size = run.phases[0], config.batch_size
    step, kept = run.train_step(phase), {"state": run.start()}
    with data_lib.batches(run.train_source, batch_size=size, seed=0) as batches:
        batch = run.placement.place_batch(next(batches), size)

    def call():
        kept["state"], metrics = step(kept["state"], batch)
        return metrics["loss"]

    return call


def measure(name: str, turns: int) -> dict:
    """A mesh against one device."""
    mesh, fields = MESHES[name]
    calls = {
        "one": prepared(config({"data": 1}, **fields), jax.devices()[:1]),
        "mesh": prepared(config(mesh, **fields), jax.devices()),
    }
    losses = {which: float(call()) for which, call in calls.items()}
    times = by_turns(calls, turns)
    return {
        "mesh": mesh,
        "one_device_ms": float(np.median(times["one"]) * 1e3),
        "mesh_ms": float(np.median(times["mesh"]) * 1e3),
        "ratio": quartiles(times["mesh"] / times["one"]),
        "losses_of_first_step": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh_overhead")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help=f"of {', '.join(MESHES)}")
    parser.add_argument("--json")
    options = parser.parse_args()
    names = [n.strip() for n in options.only.split(",") if n.strip()] or list(MESHES)
    if unknown := set(names) - set(MESHES):
        parser.error(f"--only {min(unknown)}: of {', '.join(MESHES)}")
    print(f"load {os.getloadavg()[0]:.1f}")
    rows = []
    for name in names:
        rows.append({"name": name, **measure(name, options.turns)})
        low, median, high = rows[-1]["ratio"]
        print(f"{name:<22} {rows[-1]['mesh_ms']:7.0f} ms, one device"
              f" {rows[-1]['one_device_ms']:6.0f} ms: {median:.2f} times ({low:.2f} to {high:.2f})",
              flush=True)  # fmt: skip
        jax.clear_caches()
    if options.json:
        command = f"python -m benchmarks.mesh_overhead --turns {options.turns}"
        record(options.json, command, rows=rows)


if __name__ == "__main__":
    main()
