"""Between Monarch and dense: reverse sparsification, and dense models projected and fine-tuned.

    python -m benchmarks.sparse_to_dense reverse --seeds 3 --json PATH --plot PATH
    python -m benchmarks.sparse_to_dense finetune --seeds 3 --json PATH --plot PATH

The language model of `small_runs`, all linears of its blocks. The learning rate warms up, is held,
and decays over the last three tenths, in one phase or over two. Monarch matrices start as large as
dense ones, and where they are trained from scratch the rate is twice the dense model's. Each is the
best of those tried; bits per byte after 400 steps, one seed: four blocks end at 3.11, 3.00 and 3.02
with peaks of 0.002, 0.004 and 0.008, dense matrices at 3.12, 2.97, 2.98 and 3.15 with 0.001, 0.002,
0.003 and 0.004.

`reverse`: a share of the steps with Monarch matrices of four blocks, the rest dense. Beside it are
dense runs of fewer steps, which say what the same FLOPs are worth without the paper's idea.
`finetune`: a dense model is projected onto Monarch matrices of more and more blocks: held-out loss
before, right after, and after fine-tuning for a quarter of the steps; beside it Monarch matrices
trained from scratch for as many steps as both together.
"""

import argparse

import jax

from benchmarks.records import record
from benchmarks.small_runs import DEPTH, PEAK, host_config, means, run_phase, with_schedule
from configs import common
from efficient.training.evaluation import Evaluator
from efficient.training.run import Run

WIDTH = 128
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"
SHARES, DENSE_SHARES = (0.3, 0.5, 0.7, 0.9), (0.5, 0.65, 0.8, 1.0)
BLOCKS = (2, 4, 8, 16)
MONARCH_PEAK = 2 * PEAK


def monarch(blocks: int) -> list[dict]:
    return common.gpt2_linear(LAYERS, DEPTH, use="monarch", blocks=blocks, bias=True)


def config_of(rules, phases, seed):
    """Phases are (steps, schedule, surgery)."""
    config = host_config("lm", WIDTH, rules, 1, seed)
    one = config.phases[0]
    config.phases = [
        {**with_schedule(one, schedule), "steps": steps, "surgery": surgery}
        for steps, schedule, surgery in phases
    ]
    return config


def whole(steps: int, peak: float = PEAK) -> dict:
    warmup = max(1, steps // 20)
    return {"name": "wsd", "peak": peak, "warmup": warmup, "decay": 3 * steps // 10}


def bits(run, phase, state) -> float:
    return Evaluator(run, phase)(state)["bits_per_byte"]


def reverse(steps: int, seed: int):
    """Records of one seed."""
    plans = [("dense", share, []) for share in DENSE_SHARES]
    plans += [("reverse", share, monarch(4)) for share in SHARES]
    for name, share, rules in plans:
        first = round(share * steps)
        if name == "dense":
            phases = [(first, whole(first), [])]
        else:
            held = {"name": "constant", "value": MONARCH_PEAK, "warmup": max(1, steps // 20)}
            decay = min(3 * steps // 10, steps - first - 10)
            rest = {"name": "wsd", "peak": PEAK, "warmup": 10, "decay": decay}
            densify = [{"name": "monarch_to_dense"}]
            phases = [(first, held, []), (steps - first, rest, densify)]
        run = Run(config_of(rules, phases, seed), jax.devices()[:1])
        state, flops = run.start(), 0.0
        for phase in run.phases:
            state = run.pass_on(phase, state)[0] if phase.index else state
            state, _, _ = run_phase(run, phase, state)
            flops += run.flops(phase) * (phase.stop - phase.start)
        found = bits(run, run.phases[-1], state)
        yield {"name": name, "share": share, "flops": flops, "bits_per_byte": found}


def finetune(steps: int, seed: int):
    """Records of one seed: the dense model is trained once."""
    more = steps // 4
    tune = {"name": "cosine", "peak": PEAK / 2, "warmup": 10}
    base = None
    for blocks in BLOCKS:
        project = [{"name": "dense_to_monarch", "at": LAYERS, "blocks": blocks}]
        phases = [(steps, whole(steps), []), (more, tune, project)]
        run = Run(config_of([], phases, seed), jax.devices()[:1])
        if base is None:
            base = run_phase(run, run.phases[0], run.start())[0]
            before = bits(run, run.phases[0], base)
        state = run.pass_on(run.phases[1], base)[0]
        found = {"before": before, "projected": bits(run, run.phases[1], state)}
        state = run_phase(run, run.phases[1], state)[0]
        found["tuned"] = bits(run, run.phases[1], state)
        scratch = [(steps + more, whole(steps + more, MONARCH_PEAK), [])]
        run = Run(config_of(monarch(blocks), scratch, seed), jax.devices()[:1])
        state = run_phase(run, run.phases[0], run.start())[0]
        yield {"blocks": blocks, **found, "scratch": bits(run, run.phases[0], state)}


def plot(experiment: str, rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    if experiment == "reverse":
        for name, label in (("dense", "dense, fewer steps"), ("reverse", "Monarch, then dense")):
            own = sorted((r for r in rows if r["name"] == name), key=lambda r: r["flops"][0])
            mean, deviation = zip(*(r["bits_per_byte"] for r in own))
            axes.errorbar([r["flops"][0] for r in own], mean, deviation, marker="o", capsize=3,
                          label=label)  # fmt: skip
        axes.set_xlabel("training FLOPs")
    else:
        for name in ("before", "projected", "tuned", "scratch"):
            mean, deviation = zip(*(r[name] for r in rows))
            axes.errorbar([r["blocks"] for r in rows], mean, deviation, marker="o", capsize=3,
                          label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlabel("blocks of each factor")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=("reverse", "finetune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    run = {"reverse": reverse, "finetune": finetune}[arguments.experiment]
    records = []
    for seed in range(arguments.seeds):
        for found in run(arguments.steps, seed):
            records.append({"seed": seed, **found})
            print(records[-1], flush=True)
            jax.clear_caches()
    if arguments.experiment == "reverse":
        rows = means(records, ("name", "share"), ("flops", "bits_per_byte"))
    else:
        rows = means(records, ("blocks",), ("before", "projected", "tuned", "scratch"))
    for row in rows:
        print(row)
    if arguments.json:
        command = f"{arguments.experiment} --seeds {arguments.seeds} --steps {arguments.steps}"
        record(arguments.json, f"python -m benchmarks.sparse_to_dense {command}",
               summary=rows, runs=records)  # fmt: skip
    if arguments.plot:
        plot(arguments.experiment, rows, arguments.plot)


if __name__ == "__main__":
    main()
