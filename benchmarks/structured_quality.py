"""Structured matrices against dense ones at equal parameters: loss, FLOPs and CPU seconds.

    python -m benchmarks.structured_quality --host lm --seeds 5 --json PATH --plot PATH
    python -m benchmarks.structured_quality --host digits ...

A small GPT-2-shaped language model on the embedded corpus (`lm`), or a ViT on scikit-learn's digits
(`digits`), all of whose linears of attention and feed-forward are replaced. A layer has a quarter
or an eighth of a dense one's parameters, exactly; `narrow` is a dense model of such a width that
its layers have as many together. Every one of these layers does one multiplication and one addition
a parameter and token, so that equal parameters are equal FLOPs and there is one comparison, not
two; counted, Monarch layers do a sixth more, for the backward pass computes what is between the
factors again. Products of butterfly factors, of blocks of 5, have no such choice and are listed at
the size they have.

All matrices start as large as a dense layer's, by the root mean square of their numbers, zeros
among them (`initial_std` in the record); those of low rank as the leading parts of one, which is
less. The learning rate is each variant's own: on two seeds its peak is doubled, or else halved, for
as long as that is better; the best is run on all seeds, and another too if the first seeds were
lucky. What is better is told by the held-out examples that are reported.

`--only` trains some and takes the others from the file of `--json`, which says of each what it was
measured on. Runs of one kind differ in initial values and the order of the data; all else but the
learning rate is the same for all. CPU seconds are those of the process in the median step, all
threads together, which a loaded machine changes less than the time on the wall.
"""

import argparse
import collections
import json
import os
import re
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.records import record
from benchmarks.small_runs import DEPTH, at_rate, best_rate, host_config, mean_of, run_phase
from configs import common
from efficient import model as model_lib
from efficient.training.evaluation import Evaluator, bits_per_byte_baseline
from efficient.training.run import Run

WIDTH = 160
LAYERS = re.compile(r"(.*/)?blocks/[\d-]+/(mixer/(q|k|v|out)|channel/(up|down))/(?!bias).*")
# What a host's dense layers start at: the language model's as `common.gpt2` has them, the others
# with a variance of 1 / fan-in.
OUTPUT_STD = common.output_std(DEPTH)
STARTS = {
    "lm": {
        "mixer/(q|k|v)": 0.02,
        "mixer/out": OUTPUT_STD,
        "channel/up": 0.02,
        "channel/down": OUTPUT_STD,
    },
    "digits": {
        "mixer/(q|k|v|out)": WIDTH**-0.5,
        "channel/up": WIDTH**-0.5,
        "channel/down": (4 * WIDTH) ** -0.5,
    },
}
SEARCH_SEEDS = 2
# Fraction of the parameters -> (technique, arguments for D x D, and for D x 4 D and 4 D x D).
VARIANTS = {
    1 / 4: {
        "monarch": ("monarch", {"blocks": 8}, {"blocks": 5}),
        "pixelfly": ("pixelfly", {"block": 10, "density": 0.25}, {"block": 10, "density": 0.25}),
        "low_rank": ("low_rank", {"rank": 20}, {"rank": 32}),
        "block_sparse": ("block_sparse", {"block": 10}, {"block": 10}),
    },
    1 / 8: {
        "monarch": ("monarch", {"blocks": 16}, {"blocks": 10}),
        "pixelfly": ("pixelfly", {"block": 5, "density": 0.125}, {"block": 5, "density": 0.125}),
        "low_rank": ("low_rank", {"rank": 10}, {"rank": 16}),
        "block_sparse": (
            "block_sparse",
            {"block": 10, "density": 0.125},
            {"block": 10, "density": 0.125},
        ),
    },
}
NARROW = {1 / 4: 80, 1 / 8: 56}  # widths: 12 D^2 parameters a block


def variants(host: str, steps: int):
    """(name, fraction, config) of everything that is compared."""

    def of(width, rules):
        return host_config(host, width, rules, steps, 0)

    yield "dense", 1.0, of(WIDTH, [])
    for fraction, techniques in VARIANTS.items():
        yield "narrow", fraction, of(NARROW[fraction], [])
        for name, (use, attention, feed_forward) in techniques.items():
            yield name, fraction, of(WIDTH, replaced(host, use, attention, feed_forward))
    sizes = {"block": 5, "pad": True}
    yield "butterfly", None, of(WIDTH, replaced(host, "butterfly", sizes, sizes))


def replaced(host: str, use: str, attention: dict, feed_forward: dict) -> list[dict]:
    """Rules of a technique for both kinds of layers; matrices start as large as dense ones."""
    more = {"init": "spectral"} if use == "low_rank" else {}
    sizes = {"mixer": attention, "channel": feed_forward}
    return [
        {"at": rf"(.*/)?blocks/\d+/{where}", "use": use, "bias": True, "init_std": std}
        | sizes[where.split("/")[0]]
        | more
        for where, std in STARTS[host].items()
    ]


def initial_std(config) -> float:
    """Root mean square over the matrices of attention and feed-forward, as they start."""
    base = Run(config, jax.devices()[:1]).base
    model = model_lib.bind(base, model_lib.init(base, jax.random.key(0)))
    squares = numbers = 0.0
    for path, layer in model_lib.modules(model):
        if LAYERS.fullmatch(f"{path}/kernel"):
            matrix = np.asarray(layer.materialize())
            squares, numbers = squares + np.sum(matrix**2), numbers + matrix.size
    return float(np.sqrt(squares / numbers))


def train(config, seeds: Sequence[int]):
    """For each seed the held-out metrics after the run, and what it cost.

    One program serves all seeds: nothing in its steps is random.
    """
    run = Run(config, jax.devices()[:1])
    phase = run.phases[0]
    counts = {path: int(np.prod(s.shape)) for path, s in model_lib.abstract(run.base).items()}
    evaluate, baseline = Evaluator(run, phase), bits_per_byte_baseline(run)
    about = {} if baseline is None else {"bigram_bits_per_byte": baseline}
    about["parameters"] = sum(counts.values())
    about["layer_parameters"] = sum(n for path, n in counts.items() if LAYERS.fullmatch(path))
    about["flops_a_step"] = run.flops(phase)
    for seed in seeds:
        run.init_key = jax.random.key(seed)
        state, metrics, seconds = run_phase(run, phase, run.start(), seed)
        yield {
            "seed": seed,
            "rate": phase.config["optimizer"]["learning_rate"]["peak"],
            **about,
            "cpu_seconds_a_step": float(np.median(seconds[2:])),
            "train_loss": metrics["loss"],
            **evaluate(state),
        }


def search(config, metric: str, seeds: int, label: str) -> list[dict]:
    """What `train` gives at the best learning rate for all seeds, and at others for some."""
    runs = collections.defaultdict(list)

    def measure(rate, seeds=range(min(SEARCH_SEEDS, seeds))):
        for run in train(at_rate(config, rate), seeds):
            runs[rate].append(run)
            cost = f"{run['cpu_seconds_a_step'] * 1e3:.0f} ms"
            print(f"{label} rate {rate:g}  seed {run['seed']}  {metric} {run[metric]:.4f}  {cost}",
                  flush=True)  # fmt: skip
        return mean(rate)

    def mean(rate):
        return mean_of(runs[rate], metric)

    best = best_rate(measure)
    while len(runs[best]) < seeds:
        measure(best, range(len(runs[best]), seeds))
        best = min(runs, key=mean)  # another, where the first seeds were lucky
    return [run for found in runs.values() for run in found]


def summary(records: list[dict], metric: str) -> list[dict]:
    """A row a variant at its best learning rate, which has most seeds: over them, and costs."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for found in records:
        groups[found["variant"], found["fraction"]][found["rate"]].append(found)
    rows = []
    for (variant, fraction), rates in groups.items():
        by_rate = {rate: (-len(found), mean_of(found, metric)) for rate, found in rates.items()}
        rate = min(by_rate, key=by_rate.get)
        found = rates[rate]
        values = [r[metric] for r in found]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        costs = {
            name: float(np.median([r[name] for r in found]))
            for name in ("parameters", "layer_parameters", "flops_a_step", "cpu_seconds_a_step")
        }
        rows.append(
            {
                "variant": variant,
                "fraction": fraction,
                "rate": rate,
                "seeds": len(found),
                "mean": float(np.mean(values)),
                "std": deviation,
                **costs,
            }
        )
    return rows


def kept(path: str, again: set[str]) -> tuple[list[dict], list[dict]]:
    """Of an earlier record, the runs of variants that are not run again, and their origins."""
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    runs = [r for r in found.pop("runs") if r["variant"] not in again]
    about = {k: found[k] for k in ("command", "date", "device", "versions", "python")}
    earlier = found.get("kept", [])
    others = {r["variant"] for r in runs} - {v for entry in earlier for v in entry["variants"]}
    origins = [*earlier, {**about, "variants": sorted(others)}]
    for entry in origins:
        entry["variants"] = [v for v in entry["variants"] if v not in again]
    return runs, [entry for entry in origins if entry["variants"]]


def plot(rows: list[dict], metric: str, path: str) -> None:
    """The metric against parameters, FLOPs and CPU seconds, a line a technique."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    axes = {
        "layer_parameters": "parameters of the replaced layers",
        "flops_a_step": "FLOPs a step",
        "cpu_seconds_a_step": "CPU seconds a step",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for panel, (cost, label) in zip(panels, axes.items()):
        for i, name in enumerate(names):
            own = sorted((r for r in rows if r["variant"] == name), key=lambda r: r[cost])
            panel.errorbar(
                [r[cost] for r in own], [r["mean"] for r in own], [r["std"] for r in own],
                marker="o", capsize=3, label=name, color=f"C{i}", linewidth=1,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"held-out {metric.replace('_', ' ')}")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", choices=("lm", "digits"), default="lm")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", help="variants, separated by commas")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    metric = "bits_per_byte" if arguments.host == "lm" else "loss"
    everything = list(variants(arguments.host, arguments.steps))
    chosen = everything
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {name for name, _, _ in chosen}
        if unknown:
            parser.error(
                f"--only {min(unknown)}: it is one of {', '.join(n for n, _, _ in chosen)}"
            )
        chosen = [entry for entry in chosen if entry[0] in wanted]
    records, origins = [], []
    if arguments.only and arguments.json and os.path.exists(arguments.json):
        records, origins = kept(arguments.json, {name for name, _, _ in chosen})
    for name, fraction, config in chosen:
        for found in search(config, metric, arguments.seeds, f"{name:<13} {fraction or '':<6}"):
            records.append({"variant": name, "fraction": fraction, **found})
        jax.clear_caches()
    order = {(name, fraction): i for i, (name, fraction, _) in enumerate(everything)}
    records.sort(key=lambda r: order[r["variant"], r["fraction"]])
    rows = summary(records, metric)
    starts = {(name, fraction): initial_std(config) for name, fraction, config in everything}
    for row in rows:
        row["initial_std"] = starts[row["variant"], row["fraction"]]
        print(json.dumps(row))
    if arguments.json:
        command = f"--host {arguments.host} --seeds {arguments.seeds} --steps {arguments.steps}"
        command += f" --only {arguments.only}" if arguments.only else ""
        record(arguments.json, f"python -m benchmarks.structured_quality {command}", kept=origins,
               metric=metric, summary=rows, runs=records)  # fmt: skip
    if arguments.plot:
        plot(rows, metric, arguments.plot)


if __name__ == "__main__":
    main()
