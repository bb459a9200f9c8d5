"""Benchmarks of what a technique does to the loss: merging of records, and what is trained."""

import functools
import json
import re

import numpy as np
import pytest

from benchmarks import low_rank_study, small_runs, structured_quality
from benchmarks.records import record
from efficient.training.run import Run


def test_runs_that_are_not_repeated_keep_their_origin(tmp_path):
    path = str(tmp_path / "found.json")
    runs = [{"variant": name, "seed": seed} for name in ("dense", "monarch") for seed in (0, 1)]
    record(path, "first", runs=runs)
    kept, origins = structured_quality.kept(path, {"monarch"})
    assert kept == runs[:2]
    assert [(o["command"], o["variants"]) for o in origins] == [("first", ["dense"])]
    record(path, "second", kept=origins, runs=kept + runs[2:] + [{"variant": "narrow", "seed": 0}])
    kept, origins = structured_quality.kept(path, {"narrow"})
    assert kept == runs
    found = [(o["command"], o["variants"]) for o in origins]
    assert found == [("first", ["dense"]), ("second", ["monarch"])]
    kept, origins = structured_quality.kept(path, {"dense", "monarch", "narrow"})
    assert kept == origins == []
    assert set(json.load(open(path))["kept"][0]) >= {"date", "device", "versions", "python"}


def dict_of_variants(host="lm"):
    return {(name, f): config for name, f, config in structured_quality.variants(host, 10)}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["lm", "digits"])
def test_matrices_start_as_large_as_dense_ones(host):
    found = dict_of_variants(host)
    dense = structured_quality.initial_std(found["dense", 1.0])
    for name in structured_quality.VARIANTS[0.25]:
        least = 0.4 if name == "low_rank" else 0.9  # which is a part of a dense one
        assert least < structured_quality.initial_std(found[name, 0.25]) / dense < 1.1, name


@pytest.mark.parametrize(
    ("loss", "tried", "best"),
    [
        (lambda rate, seed: abs(np.log2(rate) - 2), [1, 2, 4, 8], 4),
        (lambda rate, seed: abs(np.log2(rate) + 1), [0.25, 0.5, 1, 2], 0.5),
        (lambda rate, seed: np.nan if rate > 1 else 1 / rate, [0.5, 1, 2], 1),
        # 4 is best on two seeds, 2 on all
        (lambda rate, seed: abs(rate - 3.9) if seed < 2 or rate < 4 else 9.0, [1, 2, 4, 8], 2),
    ],
    ids=["up", "down", "diverging", "lucky"],
)
def test_a_learning_rate_is_found(loss, tried, best, monkeypatch):
    costs = {"parameters": 7, "layer_parameters": 5, "flops_a_step": 3}

    def train(rate, seeds):
        for seed in seeds:
            found = {"seed": seed, "rate": rate, "loss": loss(rate, seed)}
            yield {**found, **costs, "cpu_seconds_a_step": seed}

    search = functools.partial(small_runs.best_rate, start=1)
    monkeypatch.setattr(structured_quality, "best_rate", search)
    monkeypatch.setattr(structured_quality, "train", train)
    monkeypatch.setattr(structured_quality, "at_rate", lambda config, rate: rate)
    runs = structured_quality.search(None, "loss", 5, "")
    assert sorted({run["rate"] for run in runs}) == tried
    records = [{"variant": "monarch", "fraction": 0.25, **run} for run in runs]
    (row,) = structured_quality.summary(records, "loss")
    assert (row["rate"], row["seeds"]) == (best, 5)
    np.testing.assert_allclose(row["mean"], np.mean([loss(best, seed) for seed in range(5)]))
    assert row["cpu_seconds_a_step"] == 2


def test_the_learning_rate_reaches_the_run():
    config = small_runs.at_rate(dict_of_variants()["dense", 1.0], 0.125)
    assert max(Run(config).phases[0].learning_rate(i) for i in range(10)) == 0.125


def test_a_narrow_model_has_as_many_parameters():
    for rank in low_rank_study.RANKS:
        counts = []
        for start in ("narrow", "spectral"):
            run = Run(low_rank_study.config_of(start, "none", 0.0, rank, 4))
            shapes = run.phases[0].shapes.items()
            layers = [s.shape for p, s in shapes if re.search("blocks.*(kernel|/down|/up)$", p)]
            counts.append(sum(int(np.prod(shape)) for shape in layers))
        assert counts[1] <= counts[0] < 1.1 * counts[1]


def test_every_start_meets_every_decay():
    found = list(low_rank_study.choices((0.5,)))
    assert len(found) == len(set(found)) == 1 + 2 + 2 * 4 * 3 + 2
    for start, decay, rate, rank in found:
        config = low_rank_study.config_of(start, decay, rate, rank, 8)
        assert sum(phase["steps"] for phase in config.phases) == 8
        assert len(config.phases) == (2 if start == "warm-up" else 1)
        low = [rule for rule in config.rules if rule["use"] == "low_rank"]
        assert bool(low) == (start in low_rank_study.INITS)
        rates = {k: config.phases[-1]["optimizer"].get(f"{k}_decay", 0.0)
                 for k in ("frobenius", "factor")}  # fmt: skip
        assert rates == {"frobenius": rate * (decay == "frobenius"),
                         "factor": rate * (decay == "weight")}  # fmt: skip


def test_every_start_is_summed_up_at_its_own_learning_rate(monkeypatch, tmp_path):
    def train(config, seeds):
        peak = config.phases[-1]["optimizer"]["learning_rate"]["peak"]
        best = 0.001 if config.rules[0]["use"] == "low_rank" else 0.004
        for seed in range(seeds):
            measured = dict.fromkeys(("effective_rank", "norm", "flops", "parameters"), 1.0)
            yield {"seed": seed, "bits_per_byte": 3 + seed + abs(np.log2(peak / best)), **measured}

    path = tmp_path / "found.json"
    monkeypatch.setattr(low_rank_study, "train", train)
    monkeypatch.setattr("sys.argv", ["low_rank_study", "--seeds", "2", "--json", str(path)])
    low_rank_study.main()
    found = json.load(open(path))
    rows, runs = found["summary"], found["runs"]
    chosen = list(low_rank_study.choices(()))
    assert [tuple(row[k] for k in low_rank_study.CHOICE) for row in rows] == chosen
    for row in rows:
        assert row["peak"] == (0.001 if row["start"] in low_rank_study.INITS else 0.004)
        np.testing.assert_allclose(row["bits_per_byte"], [3.5, 0.5])
    searched = [r for r in runs if r["start"] == "spectral" and r["rank"] == 16]
    assert {r["peak"] for r in searched} == {0.0005, 0.001, 0.002, 0.004}
    assert {r["peak"] for r in searched if r["decay"] != "none"} == {0.001}


def test_effective_rank_and_norm():
    """Of the matrices of one step's model, against those put there: equal singular values."""
    run = Run(low_rank_study.config_of("spectral_ones", "none", 0.0, 16, 4))
    found = low_rank_study.spectra(run.phases[0], run.start())
    np.testing.assert_allclose([found["effective_rank"], found["norm"]], [16, 4], rtol=1e-4)
