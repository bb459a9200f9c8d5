"""What benchmarks on a GPU share: errors beside a reference's, times taken in turns, records."""

import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def device() -> Any | None:
    """The first GPU; None, and a line that says so, where there is none."""
    found = [d for d in jax.devices() if d.platform == "gpu"]
    if not found:
        print(f"skipped: no GPU here (jax sees {jax.devices()[0].platform}); needs jax[cuda13]")
    return found[0] if found else None


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def chosen(items: Sequence[Any], names: str) -> Sequence[Any] | None:
    """Those of `items` that have these names, separated by commas; None, said, for an unknown one.

    Args:
      names: "" for all.
    """
    if not names:
        return items
    wanted = names.split(",")
    unknown = set(wanted) - {x.name for x in items}
    if unknown:
        known = ", ".join(x.name for x in items)
        print(f"no shape {', '.join(sorted(unknown))}; one of: {known}", file=sys.stderr)
        return None
    return [x for x in items if x.name in wanted]


def errors(found: Sequence[Any], right: Sequence[Any]) -> list[float]:
    """Greatest absolute error of each array; infinite where something is not finite."""
    worst = []
    for value, expected in zip(found, right, strict=True):
        value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
        finite = np.isfinite(value).all()
        worst.append(float(np.abs(value - expected).max()) if finite else float("inf"))
    return worst


def check(name: str, right: Sequence[Any], near: Sequence[Any], ours: Callable) -> dict[str, Any]:
    """Our errors, those of another implementation in the same dtype, what is allowed, the verdict.

    Twice the other's error is allowed, plus the last bits of float32.

    Args:
      right: results in float32. near: the other's results.
      ours: gives our results; if it fails the other shapes are still worth a check.
    """
    try:
        mine = errors(ours(), right)
    except Exception as error:
        return {"case": name, "ours": [], "passed": False, "reason": reason(error)}
    other = errors(near, right)
    most = [float(np.abs(np.asarray(x, np.float64)).max()) for x in right]
    allowed = [2 * e + 2.0**-21 * max(m, 1) for e, m in zip(other, most, strict=True)]
    passed = all(e <= a for e, a in zip(mine, allowed, strict=True))
    return {"case": name, "ours": mine, "near": other, "allowed": allowed, "passed": passed}


def say(verdict: dict[str, Any], names: str):
    """One line of a check; `names` of the arrays."""
    worst = verdict.get("reason") or ", ".join(f"{e:.2e}" for e in verdict["ours"])
    passed = "passed" if verdict["passed"] else "FAILED"
    print(f"check {verdict['case']:32}{passed}  errors of {names}: {worst}", flush=True)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Calls without arguments, each measured, and how to wait for what they return."""

    calls: tuple[Callable, ...]
    wait: Callable = jax.block_until_ready


def seconds(call: Callable, wait: Callable, calls: int) -> float:
    """Of one of `calls` calls in a queue."""
    start = time.perf_counter()
    for _ in range(calls):
        last = call()
    wait(last)
    return (time.perf_counter() - start) / calls


def medians(timed: dict[str, Timed], rounds: int, budget: float) -> dict[str, tuple[float, ...]]:
    """Of each call's times over rounds in which all take turns, about `budget` seconds each."""
    counts = {
        (name, i): max(2, int(budget / max(seconds(call, each.wait, 2), 1e-6)))
        for name, each in timed.items()
        for i, call in enumerate(each.calls)
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in counts}
    for _ in range(rounds):
        for (name, i), count in counts.items():
            times[name, i].append(seconds(timed[name].calls[i], timed[name].wait, count))
    return {
        name: tuple(statistics.median(times[name, i]) for i in range(len(each.calls)))
        for name, each in timed.items()
    }


def kernel_seconds(program: Callable, *arrays: Any, calls: int = 10) -> float | None:
    """Of the kernels of a call of a jitted program, one after another, as CUPTI counts them.

    What passes between two kernels is not in it. None where CUPTI cannot be used.
    """
    try:
        from jax.experimental.mosaic.gpu import profiler

        measured = profiler.measure(program, aggregate=True, iterations=calls)(*arrays)[1]
        return statistics.median(measured) * 1e-3
    except Exception as error:  # a second view of what is timed anyway
        print(f"no kernel times: {reason(error)}", file=sys.stderr)
        return None


def write(path: str, on: Any, **parts: Any):
    """A record of all figures so far, with device, version and command, where there is a path."""
    if not path:
        return
    about = {
        "device": on.device_kind, "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
    }  # fmt: skip
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"about": about, **parts}, file, indent=1)
