"""Structured matrices against dense ones at equal parameters: loss, FLOPs and CPU seconds.

    python -m benchmarks.structured_quality --host lm --seeds 5 --json PATH --plot PATH
    python -m benchmarks.structured_quality --host digits ...

A small GPT-2-shaped language model on the embedded corpus (`lm`), or a ViT on scikit-learn's digits
(`digits`), all of whose linears of attention and feed-forward are replaced. A layer has a quarter
or an eighth of a dense one's parameters, exactly; `narrow` is a dense model of such a width that
its layers have as many together. Every one of these layers does one multiplication and one addition
a parameter and token, so that equal parameters are equal FLOPs and there is one comparison, not
two. Butterfly factors have no such choice and are listed at the size they have.

Runs differ in `config.seed` (initial values and the order of the data) and are otherwise the same,
the learning rate too. CPU seconds are those of the process in the median step, all threads
together, which a loaded machine changes less than the time on the wall.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import re
import time

import jax
import numpy as np

from configs import common
from efficient import data as data_lib
from efficient import model as model_lib
from efficient.training.evaluation import Evaluator, bits_per_byte_baseline
from efficient.training.run import Run

WIDTH, DEPTH, HEADS = 160, 2, 4
ATTENTION, FEED_FORWARD = r"(.*/)?blocks/\d+/mixer/(q|k|v|out)", r"(.*/)?blocks/\d+/channel/.*"
LAYERS = re.compile(r"(.*/)?blocks/[\d-]+/(mixer/(q|k|v|out)|channel/(up|down))/(?!bias).*")
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


def host_config(host: str, width: int, rules: list[dict], steps: int, seed: int):
    """The host's config with these rules before its own."""
    arg = common.parse(None)
    if host == "lm":
        config = common.small_lm(arg, steps=steps)
        config.model = {**config.model, "width": width, "depth": DEPTH, "max_length": 64}
        config.rules = [*rules, *common.gpt2(width, DEPTH, HEADS)]
        config.data = {**config.data, "length": 64}
        config.eval_batches = 64
    else:
        config = common.digits(arg)
        config.phases = [{**config.phases[0], "steps": steps}]
        stage = {"width": width, "depth": DEPTH, "kernel": 2, "stride": 2}
        config.model = {**config.model, "stages": [stage]}
        attention, mlp, *rest = config.rules
        sized = [{**attention, "heads": HEADS}, {**mlp, "hidden": 4 * width}]
        config.rules = [*rules, *sized, *rest]
    schedule = {"name": "cosine", "peak": 2e-3, "warmup": max(1, steps // 10)}
    phase = config.phases[0]
    config.phases = [{**phase, "optimizer": {**phase["optimizer"], "learning_rate": schedule}}]
    config.seed = seed
    return config


def variants(host: str, steps: int):
    """(name, fraction, seed -> config) of everything that is compared."""

    def of(width, rules):
        return lambda seed: host_config(host, width, rules, steps, seed)

    yield "dense", 1.0, of(WIDTH, [])
    for fraction, techniques in VARIANTS.items():
        yield "narrow", fraction, of(NARROW[fraction], [])
        for name, (use, attention, feed_forward) in techniques.items():
            rules = [
                {"at": ATTENTION, "use": use, "bias": True, **attention},
                {"at": FEED_FORWARD, "use": use, "bias": True, **feed_forward},
            ]
            yield name, fraction, of(WIDTH, rules)
    rules = [{"at": f"{ATTENTION}|{FEED_FORWARD}", "use": "butterfly", "bias": True}]
    yield "butterfly", None, of(WIDTH, rules)


def train(config) -> dict:
    """The held-out metrics after the run, and what it cost."""
    run = Run(config, jax.devices()[:1])
    phase, state = run.phases[0], run.start()
    step, seconds = run.train_step(phase), []
    size = config.batch_size
    with data_lib.batches(run.train_source, batch_size=size, seed=config.seed) as batches:
        for _ in range(phase.config["steps"]):
            batch = run.placement.place_batch(next(batches), size)
            before = time.process_time()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.process_time() - before)
    shapes = model_lib.abstract(run.base)
    counts = {path: int(np.prod(s.shape)) for path, s in shapes.items()}
    found = {
        "parameters": sum(counts.values()),
        "layer_parameters": sum(n for path, n in counts.items() if LAYERS.fullmatch(path)),
        "flops_a_step": run.flops(phase),
        "cpu_seconds_a_step": float(np.median(seconds[2:])),
        "train_loss": float(metrics["loss"]),
        **Evaluator(run, phase)(state),
    }
    baseline = bits_per_byte_baseline(run)
    return found if baseline is None else {**found, "bigram_bits_per_byte": baseline}


def summary(records: list[dict], metric: str) -> list[dict]:
    """A row a variant: mean and standard deviation over seeds, and its costs."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["variant"], record["fraction"]].append(record)
    rows = []
    for (variant, fraction), found in groups.items():
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
                "seeds": len(found),
                "mean": float(np.mean(values)),
                "std": deviation,
                **costs,
            }
        )
    return rows


def plot(rows: list[dict], metric: str, path: str) -> None:
    """The metric against parameters, FLOPs and CPU seconds, a line a technique."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    chosen = list(variants(arguments.host, arguments.steps))
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = set(wanted) - {name for name, _, _ in chosen}
        if unknown:
            parser.error(
                f"--only {min(unknown)}: it is one of {', '.join(n for n, _, _ in chosen)}"
            )
        chosen = [entry for entry in chosen if entry[0] in wanted]
    records = []
    for seed in range(arguments.seeds):
        for name, fraction, config in chosen:
            found = train(config(seed))
            records.append({"variant": name, "fraction": fraction, "seed": seed, **found})
            print(f"{name:<13} {fraction or 0:<6} seed {seed}  {metric} {found[metric]:.4f}"
                  f"  {found['cpu_seconds_a_step'] * 1e3:.0f} ms", flush=True)  # fmt: skip
            jax.clear_caches()
    rows = summary(records, metric)
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        about = {
            "command": f"python -m benchmarks.structured_quality --host {arguments.host}"
            f" --seeds {arguments.seeds} --steps {arguments.steps}",
            "date": time.strftime("%Y-%m-%d"),
            "device": f"{os.cpu_count()} {platform.machine()} cores",
            "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")},
            "python": platform.python_version(),
        }
        with open(arguments.json, "w") as file:
            json.dump({**about, "metric": metric, "summary": rows, "runs": records}, file, indent=1)
    if arguments.plot:
        plot(rows, metric, arguments.plot)


if __name__ == "__main__":
    main()
