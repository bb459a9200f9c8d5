"""Small models trained in this process, for benchmarks of what a technique does to the loss."""

import collections
import copy
import math
import time

import jax
import numpy as np

from configs import common
from efficient import data as data_lib

DEPTH, HEADS = 2, 4
PEAK = 2e-3


def host_config(host: str, width: int, rules: list[dict], steps: int, seed: int):
    """A two-layer model of this width with these rules before its own.

    `lm`: GPT-2's shape on 64 bytes of the embedded corpus; `digits`: a ViT of 16 tokens.
    """
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
    schedule = {"name": "cosine", "peak": PEAK, "warmup": max(1, steps // 10)}
    config.phases = [with_schedule(config.phases[0], schedule)]
    config.seed = seed
    return config


def with_schedule(phase: dict, schedule: dict) -> dict:
    """The phase with this learning rate."""
    return {**phase, "optimizer": {**phase["optimizer"], "learning_rate": schedule}}


def at_rate(config, peak: float):
    """The config with this peak of the learning rate."""
    config = copy.deepcopy(config)
    (phase,) = config.phases
    schedule = {**phase["optimizer"]["learning_rate"], "peak": peak}
    config.phases = [with_schedule(phase, schedule)]
    return config


def best_rate(measure, start: float = PEAK) -> float:
    """The least measured of `start` and its doubles or halves: its neighbours are worse."""
    found = {start: measure(start)}
    for factor in (2.0, 0.5):
        rate = start
        while True:
            found[rate * factor] = measure(rate * factor)
            if found[rate * factor] >= found[rate]:
                break
            rate *= factor
        if rate != start:
            break
    return rate


def run_phase(run, phase, state, seed: int | None = None):
    """(state after the phase, metrics of its last step, CPU seconds of each step).

    CPU seconds are those of all threads of the process.

    Args:
      seed: of the order of the data; None: the config's.
    """
    step, seconds, size = run.train_step(phase), [], run.config.batch_size
    source, seed = run.train_source, run.config.seed if seed is None else seed
    with data_lib.batches(source, batch_size=size, seed=seed, start_step=phase.start) as batches:
        for _ in range(phase.start, phase.stop):
            batch = run.placement.place_batch(next(batches), size)
            before = time.process_time()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.process_time() - before)
    return state, {name: float(value) for name, value in metrics.items()}, seconds


def mean_of(runs: list[dict], metric: str) -> float:
    """Infinite where a run diverged."""
    found = float(np.mean([run[metric] for run in runs]))
    return math.inf if math.isnan(found) else found


def means(records, by, values):
    """[{*by, value: [mean, standard deviation]}] over seeds."""
    groups = collections.defaultdict(list)
    for found in records:
        groups[tuple(found[key] for key in by)].append(found)
    return [
        dict(zip(by, key))
        | {v: [float(np.mean(c)), float(np.std(c))] for v in values for c in [[r[v] for r in own]]}
        for key, own in groups.items()
    ]
