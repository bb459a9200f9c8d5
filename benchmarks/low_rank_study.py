"""Low-rank training from scratch: how factors start, how they are decayed, and a full-rank warm-up.

    python -m benchmarks.low_rank_study --seeds 3 --json PATH --plot PATH

The language model of `small_runs` with the choices of `configs/low_rank_study.py`: all linears of
its blocks in two factors, of two ranks. A start is an initialization of the factors, or `warm-up`:
the first quarter of the steps dense, then cut to the rank. Every start meets no decay of the
factors, weight decay of the factors and Frobenius decay, each at one rate; `--rates` other rates,
from the spectral start at the higher rank. All else decays at 0.1. `dense` has whole matrices,
`narrow` a smaller width with as many parameters in its layers, or a few more.

The peak of the learning rate is that at which a start without decay does best on the held-out
examples that are reported: doubled, or else halved, for as long as that is better. The runs at
other peaks are recorded too, and left out of the summary.

The effective rank of a matrix is exp of the entropy of its singular values over their sum: the mean
over all replaced layers after training. `norm` is the root mean square of their Frobenius norms.
"""

import argparse
import functools
import math

import jax
import numpy as np

from benchmarks.records import record
from benchmarks.small_runs import PEAK, at_rate, best_rate, host_config, mean_of, means, run_phase
from configs.low_rank_study import INITS, LAYERS, factorized
from efficient import model as model_lib
from efficient.checkpoints import layout
from efficient.surgery.common import linears
from efficient.training import step as step_lib
from efficient.training.evaluation import Evaluator
from efficient.training.run import Run

WIDTH, HEADS = 128, 4
RANKS = (16, 32)
WARMUP = 0.25
DECAYS = {"none": ("weight", 0.0), "weight": ("weight", 1.0), "frobenius": ("frobenius", 1.0)}
MEASURED = ("bits_per_byte", "effective_rank", "norm")
CHOICE = ("start", "decay", "rate", "rank")


def narrow_width(rank: int) -> int:
    """The least multiple of the heads whose layers have as many parameters as factors of a rank."""
    # A block has 12 D^2 parameters, and 18 r D in factors of D x D and D x 4 D.
    return HEADS * math.ceil((1.5 * rank * WIDTH) ** 0.5 / HEADS)


def choices(rates: tuple[float, ...]):
    """(start, decay, rate, rank) of everything that is trained."""
    yield "dense", "none", 0.0, None
    for rank in RANKS:
        yield "narrow", "none", 0.0, rank
        for start in (*INITS, "warm-up"):
            for name, (_, rate) in DECAYS.items():
                yield start, name, rate, rank
    for rate in rates:
        for name in ("weight", "frobenius"):
            if rate != DECAYS[name][1]:
                yield "spectral", name, rate, RANKS[-1]


def config_of(
    start: str, decay: str, rate: float, rank: int | None, steps: int, peak: float = PEAK
):
    """The config of one choice."""
    width = narrow_width(rank) if start == "narrow" else WIDTH
    config = at_rate(host_config("lm", width, [], steps, 0), peak)
    if start in ("dense", "narrow"):
        return config
    warm = start == "warm-up"
    init = "spectral" if warm else start
    return factorized(config, rank, init, DECAYS[decay][0], rate, WARMUP if warm else 0.0)


def spectra(phase, state) -> dict[str, float]:
    """What the replaced layers' singular values are."""
    values = layout.unstack(step_lib.eval_params(state) | state["state"])
    model = model_lib.bind(phase.single, values)
    ranks, squares = [], []
    for _, layer in linears(model, LAYERS):
        found = np.linalg.svd(np.float64(layer.materialize()), compute_uv=False)
        shares = found[found > 0] / found.sum()
        ranks.append(np.exp(-np.sum(shares * np.log(shares))))
        squares.append(np.sum(found**2))
    return {"effective_rank": float(np.mean(ranks)), "norm": float(np.sqrt(np.mean(squares)))}


def train(config, seeds: int):
    """A record a seed, which differ in initial values and the order of the data."""
    run = Run(config, jax.devices()[:1])
    last = run.phases[-1]
    evaluate = Evaluator(run, last)
    flops = sum(run.flops(phase) * (phase.stop - phase.start) for phase in run.phases)
    parameters = sum(int(np.prod(s.shape)) for s in last.shapes.values())
    for seed in range(seeds):
        run.init_key = jax.random.key(seed)
        state = run.start()
        for phase in run.phases:
            state = run.pass_on(phase, state)[0] if phase.index else state
            state, metrics, _ = run_phase(run, phase, state, seed)
        yield {
            "seed": seed,
            "parameters": parameters,
            "flops": flops,
            "train_loss": metrics["loss"],
            "bits_per_byte": evaluate(state)["bits_per_byte"],
            **spectra(last, state),
        }


def summary(records: list[dict], peaks: dict) -> list[dict]:
    """Means over seeds at the peak of each start and rank."""
    own = [found for found in records if found["peak"] == peaks[found["start"], found["rank"]]]
    return means(own, (*CHOICE, "peak"), (*MEASURED, "flops", "parameters"))


def plot(rows: list[dict], path: str) -> None:
    """A panel a rank, a place a start, a color a decay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = (*INITS, "warm-up")
    figure, panels = pyplot.subplots(1, len(RANKS), figsize=(9, 4), sharey=True,
                                     layout="constrained")  # fmt: skip
    for panel, rank in zip(panels, RANKS):
        for i, (decay, (_, rate)) in enumerate(DECAYS.items()):
            own = {r["start"]: r["bits_per_byte"] for r in rows
                   if (r["decay"], r["rate"], r["rank"]) == (decay, rate, rank)}  # fmt: skip
            mean, deviation = zip(*(own[start] for start in starts))
            label = "no decay of factors" if decay == "none" else f"{decay} decay"
            panel.errorbar(np.arange(len(starts)) + 0.15 * (i - 1), mean, deviation, marker="o",
                           capsize=3, linestyle="", label=label)  # fmt: skip
        for start, style in (("dense", "-"), ("narrow", "--")):
            (mean, _), = (r["bits_per_byte"] for r in rows
                          if r["start"] == start and r["rank"] in (None, rank))  # fmt: skip
            panel.axhline(mean, color="gray", linestyle=style, label=start)
        panel.set_xticks(range(len(starts)), starts)
        panel.set_title(f"rank {rank} of width {WIDTH}")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("held-out bits per byte")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rates", default="", help="more rates of decay, separated by commas")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    rates = tuple(float(rate) for rate in filter(None, arguments.rates.split(",")))
    seeds = arguments.seeds
    command = f"python -m benchmarks.low_rank_study --seeds {seeds}"
    command += f" --steps {arguments.steps}" + (f" --rates {arguments.rates}" if rates else "")
    records, peaks = [], {}

    def measure(choice, peak: float) -> float:
        of = dict(zip(CHOICE, choice)) | {"peak": peak}
        found = [of | run for run in train(config_of(*choice, arguments.steps, peak), seeds)]
        print(*found, sep="\n", flush=True)
        records.extend(found)
        return mean_of(found, "bits_per_byte")

    for choice in choices(rates):
        start, decay, _, rank = choice
        if decay == "none":
            peaks[start, rank] = best_rate(functools.partial(measure, choice))
        else:
            measure(choice, peaks[start, rank])
        jax.clear_caches()
        rows = summary(records, peaks)
        if arguments.json:  # after every choice, for those who do not wait
            record(arguments.json, command, summary=rows, runs=records)
    for row in rows:
        print(row)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
