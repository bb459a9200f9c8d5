"""What benchmarks share: calls that take turns on a noisy machine, and records of results."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def by_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, np.ndarray]:
    """Seconds of each call in each turn.

    In every turn each is called once, in another order each time, so that what else runs on the
    machine meets all. A first turn that compiles is left out.
    """
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name in rng.permutation(list(calls)):
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(found) for name, found in times.items()}


def quartiles(ratios: np.ndarray) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(q) for q in np.percentile(ratios, [25, 50, 75])]


def record(path: str, command: str, **results) -> None:
    """Writes results with what they were measured on."""
    packages = ("jax", "flax", "optax")
    about = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{os.cpu_count()} {platform.machine()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**about, **results}, file, indent=1)
