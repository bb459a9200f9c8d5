"""How well a run reads contexts of other lengths than it was trained on.

The same held-out tokens are scored at every length, each context ending with them, so that lengths
differ in what comes before and in nothing else.
"""

import copy
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from efficient import data as data_lib
from efficient.data.pipeline import spec_of
from efficient.errors import UserError
from efficient.training import curves
from efficient.training.evaluation import Evaluator
from efficient.training.loop import restored
from efficient.training.metrics import print_line
from efficient.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CONTEXTS = 1024


class Endings:
    """The last `length` tokens of each example, of which the last `scored` weigh.

    Args:
      source: language-modelling examples of at least `length` tokens.
      length: T of the examples given.
      scored: how many targets at the end have weight 1; those before have 0.
    """

    def __init__(self, source: data_lib.Source, length: int, scored: int):
        self.source, self.length, self.facts = source, length, source.facts
        self.weights = (np.arange(length) >= length - scored).astype(np.float32)
        self.spec = spec_of(self[0])

    def __len__(self) -> int:
        return min(len(self.source), MOST_CONTEXTS)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example = self.source[index]
        cut = {name: example[name][-self.length :] for name in ("tokens", "targets")}
        return cut | {"weights": self.weights}


def evaluate(config: ConfigDict, workdir: str, lengths: Sequence[int], label: str) -> None:
    """Prints bits per byte (or nats per token) by length of context, and keeps and draws them.

    What is scored are the last tokens of each context, half as many as the shortest context has.
    `lengths.json` in the workdir keeps the curves of several calls, one a label, as long as they
    scored the same tokens; `lengths.png` shows them.

    Args:
      config: of the model that holds the run's parameters.
      workdir: the run.
      lengths: of the contexts, ascending.
      label: the name of the curve.

    Raises:
      UserError: lengths that make no sense, or a model or data that have but one length.
    """
    trained, longest = _check(config, lengths), max(lengths)
    config = config.copy_and_resolve_references()
    config.data.length = longest
    config.model.max_length = max(longest, config.model.max_length)
    run, folder = Run(config), pathlib.Path(workdir).absolute()
    if set(run.eval_source.spec) != {"tokens", "targets"}:
        raise UserError("--lengths is for streams of text; set data.packing='stream'")
    phase, state = restored(run, folder)
    scored, found = lengths[0] // 2, {}
    for length in lengths:
        view = copy.copy(run)
        view.eval_source = Endings(run.eval_source, length, scored)
        view.config = copy.deepcopy(config)
        ways = run.placement.batch_ways
        view.config.batch_size = max(ways, config.batch_size * trained // length // ways * ways)
        view.config.eval_batches = 0
        metrics = Evaluator(view, phase)(state)
        metric = "bits_per_byte" if "bits_per_byte" in metrics else "loss"
        found[length] = metrics[metric]
        print_line(json.dumps({"length": length, metric: metrics[metric]}))
    kept = {"metric": metric, "trained": trained, "scored": scored}
    kept["contexts"] = len(view.eval_source)
    record = _keep(folder / "lengths.json", kept, label, found)
    figure(record).savefig(folder / "lengths.png", dpi=150)
    print_line(f"files {folder / 'lengths.json'}, lengths.png")


def _check(config: ConfigDict, lengths: Sequence[int]) -> int:
    """The length of training; refuses what cannot be evaluated at other lengths."""
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 2:
        raise UserError(f"--lengths must be ascending numbers of at least 2, got {list(lengths)}")
    if "length" not in config.data or "max_length" not in config.model:
        raise UserError("--lengths is for language models, whose config has data.length")
    learned = any(rule["use"] == "learned" for rule in config.rules)
    if learned and lengths[-1] > config.model.max_length:
        raise UserError(
            f"learned positions end at model.max_length={config.model.max_length}; leave out longer"
            " --lengths"
        )
    return config.data.length


def _keep(path: pathlib.Path, kept: Mapping, label: str, found: Mapping[int, float]) -> dict:
    """Writes the curve beside those of the same tokens that the file holds already."""
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(name) == value for name, value in kept.items())
    all_curves = (old["curves"] if same else {}) | {label: {str(n): v for n, v in found.items()}}
    record = {**kept, "curves": all_curves}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(path)
    return record


def figure(record: Mapping) -> "Figure":
    """Curves of `lengths.json` over the length of context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(curves.STYLE):
        drawn = Figure(figsize=(5.0, 3.1))
        axes = drawn.add_subplot()
        for index, (label, points) in enumerate(record["curves"].items()):
            lengths = [int(n) for n in points]
            color, marker = curves.COLORS[index % len(curves.COLORS)], "osD^v"[index % 5]
            # Hollow and ever smaller, so that curves which coincide are seen.
            size = {"markersize": max(3, 9 - 2 * index), "markerfacecolor": "none"}
            axes.plot(
                lengths, list(points.values()), color=color, marker=marker, label=label, **size
            )
        dashed = {"color": "#4D4D4D", "linewidth": 1.0, "linestyle": (0, (4, 2))}
        axes.axvline(record["trained"], label="length of training", zorder=1.5, **dashed)
        axes.set_xscale("log", base=2)
        ticks = sorted({int(n) for points in record["curves"].values() for n in points})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        axes.set_xlabel("tokens of context")
        unit = "bits per byte" if record["metric"] == "bits_per_byte" else "nats per token"
        axes.set_ylabel(f"{unit} of the last {record['scored']} tokens")
        axes.legend(loc="upper left")
    return drawn
