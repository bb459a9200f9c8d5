"""EL2N and GraNd against closed forms, the window, and what the scores find on digits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient import data as data_lib
from efficient import model as model_lib
from efficient import registry
from efficient.errors import UserError
from efficient.scope import Rules, Scope
from efficient.selection.data_diet import DataDiet, el2n, grand, member_trainer, window


class Regression(nnx.Module):
    """Softmax regression on the pixels, or with a hidden layer."""

    def __init__(self, scope, hidden=0):
        self.hidden = scope.linear("hidden", 64, hidden, True) if hidden else None
        self.head = scope.linear("head", hidden or 64, 10, True)

    def features(self, batch, context):
        x = batch["image"].reshape(-1, 64)
        return (x if self.hidden is None else jax.nn.relu(self.hidden(x, context))), {}

    def logits(self, h, context):
        return self.head(h, context).astype(jnp.float32)


class Digits:
    """The first 300 training digits; a tenth of the labels is replaced where `noisy`."""

    def __init__(self, noisy=False):
        self.source = data_lib.make_source("digits", "train")
        self.labels = np.array([self.source[i]["label"] for i in range(300)])
        self.noise = np.random.default_rng(0).permutation(300)[:30] if noisy else np.array([], int)
        self.labels[self.noise] = (
            self.labels[self.noise] + 1 + np.arange(len(self.noise)) % 9
        ) % 10

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.source[index]["image"], "label": self.labels[index]}


class Phase:
    """What of a phase the technique reads."""

    def __init__(self, model, steps):
        self.stacked, self.start, self.stop = model, 0, steps
        self.optimizer = optax.adam(3e-3)
        self.params = self.trained = frozenset(model_lib.is_param(model))


class Scoring:
    """What the loop gives a selection."""

    def __init__(self, hidden=0, steps=60, noisy=False, seed=0):
        model = Regression(Scope(Rules()), hidden)
        self.phase, self.source, self.batch_size = Phase(model, steps), Digits(noisy), 32
        self.objective = registry.find("classification", "objective").build()
        self.key = jax.random.key(seed)
        self.values = member_trainer(self)(0)

    def bind(self, values):
        return model_lib.bind(self.phase.stacked, values)

    def batches(self):
        for start in range(0, len(self.source), self.batch_size):
            rows = [self.source[i % 300] for i in range(start, start + self.batch_size)]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            index = np.arange(start, start + self.batch_size)
            yield batch | {"index": index, "weight": (index < 300).astype(np.float32)}


@functools.cache
def scoring(**arguments):
    return Scoring(**arguments)


def closed_form(s):
    """(EL2N, GraNd) of softmax regression in float64: the gradient is an outer product."""
    x = np.stack([s.source[i]["image"].reshape(-1) for i in range(300)]).astype(np.float64)
    w, b = (np.asarray(s.values[f"head/{n}"], np.float64) for n in ("kernel", "bias"))
    e = np.exp(x @ w + b)
    error = e / e.sum(-1, keepdims=True) - np.eye(10)[s.source.labels]
    size = np.linalg.norm(error, axis=1)
    return size, size * np.sqrt((x**2).sum(1) + 1)


def test_scores_of_softmax_regression_against_closed_form():
    s = scoring()
    wanted_el2n, wanted_grand = closed_form(s)
    got = DataDiet(score="el2n").scores(s)
    assert got.shape == (300,)
    np.testing.assert_allclose(got, wanted_el2n, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(DataDiet(score="grand").scores(s), wanted_grand, rtol=1e-4)


def test_kept_examples_are_those_of_the_highest_scores():
    s = scoring()
    wanted = np.sort(np.argsort(closed_form(s)[0])[-90:])
    np.testing.assert_array_equal(DataDiet(keep=0.3)(s), wanted)
    lower = DataDiet(keep=0.3, offset=0.5)(s)
    np.testing.assert_array_equal(lower, np.sort(np.argsort(closed_form(s)[0])[150:240]))


def test_grand_of_a_deeper_model_against_single_gradients():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4,)))}
    x = jnp.asarray(rng.normal(size=(11, 3)))

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["a"]) * params["b"]) ** 2

    wanted = []
    for row in x:
        g = jax.tree.leaves(jax.grad(loss)(params, row))
        wanted.append(np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in g)))
    np.testing.assert_allclose(grand(loss, params, x), wanted, rtol=1e-4)


def test_el2n_bounds_and_extremes():
    logits = jnp.array([[1e4, 0.0, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    got = el2n(logits, jnp.array([0, 0, 0]))
    np.testing.assert_allclose(got, [0.0, np.sqrt(2), np.sqrt(2 / 3)], rtol=1e-6, atol=1e-7)


def test_random_is_spread_evenly_and_ignores_the_model():
    s = scoring()
    kept = DataDiet(score="random", keep=0.5)(s)
    assert len(kept) == len(set(kept)) == 150
    assert 0.35 < np.mean(kept < 150) < 0.65
    overlap = len(set(kept) & set(DataDiet(keep=0.5)(s))) / 150
    assert 0.35 < overlap < 0.65


def test_window():
    scores = np.array([0.3, 0.1, 0.2, 0.5, 0.4])
    np.testing.assert_array_equal(window(scores, 0.4), [3, 4])
    np.testing.assert_array_equal(window(scores, 0.4, 0.0), [1, 2])
    np.testing.assert_array_equal(window(scores, 0.4, 0.2), [0, 2])
    np.testing.assert_array_equal(window(scores, 1.0), np.arange(5))
    np.testing.assert_array_equal(window(np.zeros(4), 0.5), [2, 3])


@pytest.mark.parametrize("score", ["el2n", "grand"])
def test_noisy_labels_score_highest(score):
    s = scoring(hidden=32, steps=60, noisy=True)
    scores = DataDiet(score=score).scores(s)
    noisy = np.isin(np.arange(300), s.source.noise)
    rank = scores.argsort().argsort() / 299
    assert rank[noisy].mean() > 0.85
    assert rank[noisy].mean() > rank[~noisy].mean() + 0.35


def correlation(a, b):
    return np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]


@pytest.mark.slow
def test_averaging_makes_scores_repeatable():
    first, second = scoring(hidden=32, steps=20, seed=1), scoring(hidden=32, steps=20, seed=2)
    single = [DataDiet().scores(s) for s in (first, second)]
    mean = [DataDiet(inits=6).scores(s) for s in (first, second)]
    assert correlation(*mean) > correlation(*single) + 0.15


def test_inits_are_averaged():
    s = scoring(hidden=32, steps=20, seed=1)
    train = member_trainer(s)
    other = train(1)
    assert not np.allclose(other["head/kernel"], s.values["head/kernel"])
    assert np.allclose(train(1)["head/kernel"], other["head/kernel"])
    alone = []
    for values in (s.values, other):
        copy = Scoring.__new__(Scoring)
        copy.__dict__.update(s.__dict__ | {"values": values})
        alone.append(DataDiet().scores(copy))
    np.testing.assert_allclose(DataDiet(inits=2).scores(s), np.mean(alone, axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"keep": 0.0}, {"keep": 1.1}, {"offset": 0.6}, {"offset": -0.1}, {"inits": 0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError, match="data_diet"):
        DataDiet(**arguments)


def test_scores_name_what_they_need_of_the_data():
    """By which a run refuses other data before it begins."""
    assert DataDiet().needs == ("label",)
    assert DataDiet(score="random").needs == ()
