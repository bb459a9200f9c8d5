"""Two models in one phase: the copy of the model stays as it was, and the student follows it."""

import json
import shutil

import numpy as np
import pytest
import tiny

from configs import common
from efficient.errors import UserError
from efficient.objectives.distillation import divergence
from efficient.training import loop
from efficient.training.run import Run

TAUGHT = {
    "surgery": [{"name": "companion"}, {"name": "lottery_ticket", "at": "blocks/.*", "rate": 0.5}],
    "objective": {"name": "distillation", "weight": 0.9, "temperature": 3.0},
}


def config(**fields):
    every = {"checkpoint_every": 1, "keep_checkpoints": 9, "eval_batches": 1}
    return tiny.config(common.phase(2), common.phase(2, **TAUGHT), depth=1, **every | fields)


def test_divergence_against_numpy():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 7))
    q, p = (np.exp(a / 3) / np.exp(a / 3).sum(-1, keepdims=True) for a in (teacher, student))
    expected = (q * np.log(q / p)).sum(-1)
    found = divergence(np.float32(teacher), np.float32(student), 3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected.min() > 1e-3
    np.testing.assert_allclose(divergence(teacher, teacher, 3.0), 0, atol=1e-6)


@pytest.mark.slow
def test_the_teacher_is_the_model_before_and_stays_and_a_resumed_run_has_it_too(tmp_path):
    folder = tmp_path / "run"
    loop.train(config(), str(folder))
    before, last = tiny.checkpoint(folder, 2), tiny.checkpoint(folder, 4)
    held = {p.split("/", 2)[2]: a for p, a in last.items() if p.startswith("state/teacher/")}
    trained = {p.split("/", 1)[1]: a for p, a in before.items() if p.startswith("params/")}
    tiny.same(held, trained)
    assert np.abs(last["params/embed/table"] - trained["embed/table"]).max() > 1e-4
    assert not any("teacher" in p for p in last if p.startswith(("params/", "optimizer/")))
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / str(step))
    loop.train(config(), str(folder))
    tiny.same(tiny.checkpoint(folder), last)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    apart = [row["divergence"] for row in rows if row["step"] > 2]
    assert len(apart) == 3 and min(apart) > 1e-6  # half of the student's weights are gone


def test_an_objective_without_its_teacher_is_refused_before_anything_is_trained(tmp_path):
    phase = common.phase(2, objective={"name": "distillation", "teacher": "master"})
    with pytest.raises(UserError, match=r"has no 'master'; begin .*'called': 'master'"):
        loop.train(tiny.config(phase), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    twice = [{"name": "companion"}, {"name": "companion"}]
    with pytest.raises(UserError, match="has a 'teacher' already"):
        Run(tiny.config(common.phase(2, surgery=twice)))
