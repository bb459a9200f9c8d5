"""Fields of a screened Poisson equation by a stacked tensorial network and its baselines, drawn.

    python -m benchmarks.poisson_fields RUN [RUN ...] [--example N] [--png PATH]

Each RUN is the workdir of `configs/stacked_tensorial.py` in one of its modes. A column each shows a
held-out field as its newest checkpoint gives it and the error, beside the field that the solver
computes; below are the errors over training steps. Prints the mean relative error on all held-out
examples of each.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
from ml_collections import ConfigDict

from efficient import data as data_lib
from efficient import model as model_lib
from efficient.scope import Context
from efficient.training import loop
from efficient.training.run import Run


def predicted(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, targets) [examples, n, n] of the held-out examples."""
    run = Run(ConfigDict(json.loads((folder / "config.json").read_text())), jax.devices()[:1])
    phase, state = loop.restored(run, folder)
    model = model_lib.bind(phase.stacked, state["params"] | state["state"])
    call = jax.jit(lambda batch: model(batch, Context()))
    found, wanted = [], []
    for batch in data_lib.eval_batches(run.eval_source, run.config.batch_size):
        real = np.asarray(batch["weight"]) > 0
        found.append(np.asarray(call(batch))[real])
        wanted.append(np.asarray(batch["target"])[real])
    n = run.config.data["grid"]
    return tuple(np.concatenate(parts).reshape(-1, n, n) for parts in (found, wanted))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean over examples of |error| / |target|."""
    size = lambda a: np.sqrt(np.square(a).sum((1, 2)))  # noqa: E731
    return float((size(found - wanted) / size(wanted)).mean())


def draw(runs: dict[str, pathlib.Path], fields, wanted, example: int, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(runs) + 1, figsize=(3 * (len(runs) + 1), 8.4))
    true = wanted[example]
    most = np.abs(true).max()
    worst = max(np.abs(found[example] - true).max() for found in fields.values())
    field = {"vmin": -most, "vmax": most, "cmap": "RdBu_r", "origin": "lower"}
    error = {"vmin": -worst, "vmax": worst, "cmap": "PuOr", "origin": "lower"}
    shown = axes[0, 0].imshow(true.T, **field)
    figure.colorbar(shown, ax=axes[0, :], shrink=0.8)
    axes[1, 0].axis("off")
    for column, (name, found) in enumerate(fields.items(), start=1):
        axes[0, column].imshow(found[example].T, **field)
        title = f"{name}\n{relative(found, wanted):.3f} on all"
        axes[0, column].set_title(title, fontsize=9)
        shown = axes[1, column].imshow((found[example] - true).T, **error)
    axes[0, 0].set_title("solver", fontsize=9)
    axes[1, 1].set_ylabel("error")
    figure.colorbar(shown, ax=axes[1, :], shrink=0.8)
    for one in axes[:2].flat:
        one.set_xticks([])
        one.set_yticks([])
    grid = axes[2, 0].get_gridspec()
    for one in axes[2]:
        one.remove()
    curve = figure.add_subplot(grid[2, :])
    for name, folder in runs.items():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] == "train"]
        curve.semilogy(
            [row["step"] for row in rows], [row["relative_error"] for row in rows], label=name
        )
    curve.set_xlabel("step")
    curve.set_ylabel("relative error, training")
    curve.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--example", type=int, default=0, help="number of a held-out example")
    parser.add_argument("--png", default="docs/poisson_fields.png")
    args = parser.parse_args(argv)
    if missing := [run for run in args.runs if not (run / "config.json").exists()]:
        print(f"{missing[0]} holds no run (no config.json); train it first", file=sys.stderr)
        return 2
    runs = {run.name.replace("_", " "): run for run in args.runs}
    fields, wanted = {}, None
    for name, run in runs.items():
        fields[name], wanted = predicted(run)
        print(f"{name}: relative error {relative(fields[name], wanted):.4f}")
    draw(runs, fields, wanted, args.example, args.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
