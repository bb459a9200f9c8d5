"""A whole training step of a model of GPT-2 medium's shape, dense and structured, by turns.

    python -m benchmarks.train_step [--only dense,monarch_8,...] [--layers N] [--where]
        [--json PATH]

Width 1024, 16 heads, 1024 tokens a sequence, a vocabulary of 50257, bfloat16 products, AdamW. Each
variant is the model with other linear layers in attention and MLP; embedding, head, attention and
optimizer are the same. Steps of all variants take turns in one process on the first device of this
machine; a time is the median over turns. Losses of the first steps are printed, to be looked at: a
variant that is not training is not measured. With --where, three steps of each are traced, and what
kernels a GPU spends them in is printed; of no other device is that known here.
"""

import argparse
import collections
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.records import by_turns, record
from configs import common
from efficient import data as data_lib
from efficient.training.run import Run

LINEARS = r"blocks/(\d+/)?(mixer/(q|k|v|out)|channel/(up|down))"
VARIANTS = {
    "dense": [],
    "monarch_4": [{"at": LINEARS, "use": "monarch", "blocks": 4, "bias": True}],
    "monarch_8": [{"at": LINEARS, "use": "monarch", "blocks": 8, "bias": True}],
    "pixelfly": [{"at": LINEARS, "use": "pixelfly", "density": 0.34, "block": 128, "bias": True}],
}


def config(rules: list, layers: int, batch: int):
    """GPT-2 medium's shape with these linear layers."""
    found = common.small_lm(common.parse(None), steps=1000)
    found.model = {
        "name": "decoder",
        "vocab_size": 50257,
        "width": 1024,
        "depth": layers,
        "max_length": 1024,
        "tied": True,
    }
    found.rules = [*rules, *common.gpt2(1024, layers, 16)]
    found.data = {"name": "stdlib", "length": 1024}
    found.compute_dtype, found.batch_size = "bfloat16", batch
    return found


def prepared(config):
    """(a call that takes a step, the number of parameters); the call keeps the state."""
    run = Run(config, jax.devices()[:1])
    size = config.batch_size
    with data_lib.batches(run.train_source, batch_size=size, seed=0) as batches:
        batch = run.placement.place_batch(next(batches), size)
    kept = {"state": run.start()}
    step = run.train_step(run.phases[0]).lower(kept["state"], batch).compile()

    def call():
        kept["state"], metrics = step(kept["state"], batch)
        return metrics["loss"]

    return call, sum(int(p.size) for p in kept["state"]["params"].values())


def where(call: Callable, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kernel, the longest first; those that differ by a number are one.

    Empty where the trace has no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        found: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = re.sub(r"(_\d+)+$|_mosaic_gpu_kernel$", "", event.name)
                    found[name] += event.duration_ns / 1e6 / steps
    return dict(found.most_common())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, with commas")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 1024 tokens")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--where", action="store_true", help="kernels of a step, on a GPU")
    parser.add_argument("--json", default="", help="where to write the result")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - set(VARIANTS):
        known = ", ".join(VARIANTS)
        print(f"no variant {', '.join(sorted(unknown))}; one of: {known}", file=sys.stderr)
        return 2
    calls, rows = {}, {}
    for name in names:
        calls[name], parameters = prepared(config(VARIANTS[name], args.layers, args.batch))
        losses = [float(calls[name]()) for _ in range(5)]
        rows[name] = {"parameters": parameters, "losses_of_first_steps": losses}
        print(f"{name}: {parameters:,} parameters, losses {np.round(losses, 3)}", flush=True)
    times = by_turns(calls, args.turns)
    for name, row in rows.items():
        row["step_s"] = float(np.median(times[name]))
        ratio = np.median(times[names[0]] / times[name])
        row["times_as_fast"] = float(ratio)
        print(f"{name:12}{row['step_s'] * 1e3:8.1f} ms, {ratio:.2f} times as fast as {names[0]}")
    for name in names if args.where else ():
        kernels = rows[name]["kernels_ms"] = where(calls[name])
        print(f"{name}: {sum(kernels.values()):.1f} ms in {len(kernels)} kinds of kernels")
        for kernel, ms in list(kernels.items())[:14]:
            print(f"    {ms:7.2f} ms  {kernel[:90]}", flush=True)
    if args.json:
        on = jax.devices()[0].device_kind
        command = " ".join(["python -m benchmarks.train_step", *(argv or sys.argv[1:])])
        record(args.json, command, ran_on=on, layers=args.layers, batch=args.batch, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
