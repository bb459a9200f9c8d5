"""Benchmarks of what a technique does to the loss: merging of records, and what is trained."""

import json
import re

import numpy as np
import pytest

from benchmarks import low_rank_study, structured_quality
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


@pytest.mark.parametrize("host", ["lm", "digits"])
def test_low_rank_starts_no_larger_than_dense(host):
    found = {(n, f): c for n, f, c in structured_quality.variants(host, 10)}
    dense = structured_quality.initial_std(found["dense", 1.0])
    for fraction in structured_quality.VARIANTS:
        assert 0.4 * dense < structured_quality.initial_std(found["low_rank", fraction]) < dense


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


def test_effective_rank_and_norm():
    """Of the matrices of one step's model, against those put there: equal singular values."""
    run = Run(low_rank_study.config_of("spectral_ones", "none", 0.0, 16, 4))
    found = low_rank_study.spectra(run.phases[0], run.start())
    np.testing.assert_allclose([found["effective_rank"], found["norm"]], [16, 4], rtol=1e-4)
