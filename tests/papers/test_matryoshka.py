"""Matryoshka representations against NumPy, and what prefixes are worth on digits."""

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
from efficient.objectives.matryoshka import nested_sizes, prefix_logits
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope

WIDTH, SIZES = 32, [2, 4, 8, 16, 32]
HEADS = {"at": "head", "use": "matryoshka_heads", "sizes": SIZES}


class Host(nnx.Module):
    """Pixels -> 64 hidden units -> features [B, width] -> logits."""

    def __init__(self, scope, width=WIDTH):
        self.hidden = scope.linear("hidden", 64, 64, True)
        self.out = scope.linear("out", 64, width, True)
        self.head = scope.linear("head", width, 10, True)

    def features(self, batch, context):
        x = batch["image"].reshape(-1, 64)
        return self.out(jax.nn.relu(self.hidden(x, context)), context), {}

    def logits(self, h, context):
        return self.head(h, context).astype(jnp.float32)


def host(rules=(), width=WIDTH):
    return Host(Scope(Rules(rules)), width)


def objective(name="matryoshka", **arguments):
    return registry.find(name, "objective").build(**arguments)


@functools.cache
def digits(split):
    source = data_lib.make_source("digits", split)
    rows = [source[i] for i in range(len(source))]
    return {name: np.stack([row[name] for row in rows]) for name in ("image", "label")}


def draw(model, seed=0):
    arrays = model_lib.init(model, jax.random.key(seed))
    noise = jax.random.normal(jax.random.key(9), (10,))
    return {path: a + 0.1 * noise if "head/bias" in path else a for path, a in arrays.items()}


@functools.cache
def trained(kind, width=WIDTH, steps=250):
    """Features and heads of the held-out and training digits after full-batch Adam."""
    model = host([HEADS] if kind == "mrl" else (), width)
    sizes = {"sizes": SIZES} if kind == "mrl_e" else {}
    loss = objective(**sizes) if kind != "plain" else objective("classification")
    adam, batch = optax.adam(3e-3), jax.tree.map(jnp.asarray, digits("train"))

    def step(carry, _):
        arrays, state = carry
        fn = lambda a: loss(model_lib.bind(model, a), batch, Context())[0]  # noqa: E731
        updates, state = adam.update(jax.grad(fn)(arrays), state)
        return (optax.apply_updates(arrays, updates), state), None

    arrays = model_lib.init(model, jax.random.key(0))
    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0][0])
    arrays = run((arrays, adam.init(arrays)))
    features = {
        split: np.asarray(model_lib.bind(model, arrays).features(digits(split), Context())[0])
        for split in ("train", "eval")
    }
    return jax.tree.map(np.asarray, arrays), features


def accuracy(kind, size, width=WIDTH):
    """Held-out accuracy of the first `size` features with that prefix's head, in NumPy."""
    arrays, features = trained(kind, width)
    suffix = f"_{size}" if kind == "mrl" else ""
    kernel, bias = arrays[f"head/kernel{suffix}"], arrays[f"head/bias{suffix}"]
    logits = features["eval"][:, :size] @ kernel[:size] + bias
    return np.mean(logits.argmax(-1) == digits("eval")["label"])


def numpy_loss(logits, label, weight):
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(label)), label]
    return (losses * weight).sum() / weight.sum()


@pytest.mark.parametrize("kind", ["mrl", "mrl_e"])
@pytest.mark.parametrize("importance", [None, [0.5, 1.0, 2.0, 3.0, 4.0]], ids=["ones", "given"])
def test_loss_against_numpy(kind, importance):
    model = host([HEADS] if kind == "mrl" else ())
    arrays, rng = draw(model), np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(6, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 6),
        "weight": np.array([1, 1, 0, 1, 0.5, 1], np.float32),
    }
    bound = model_lib.bind(model, arrays)
    sizes = None if kind == "mrl" else SIZES
    loss, metrics = objective(sizes=sizes, importance=importance)(bound, batch, Context())
    h = np.asarray(bound.features(batch, Context())[0], np.float64)
    wanted = 0.0
    for m, c in zip(SIZES, importance or [1.0] * 5, strict=True):
        suffix = f"_{m}" if kind == "mrl" else ""
        kernel = np.asarray(arrays[f"head/kernel{suffix}"], np.float64)
        logits = h[:, :m] @ kernel[:m] + np.asarray(arrays[f"head/bias{suffix}"], np.float64)
        one = numpy_loss(logits, batch["label"], batch["weight"])
        np.testing.assert_allclose(metrics[f"loss_{m}"], one, rtol=1e-5)
        hits = ((logits.argmax(-1) == batch["label"]) * batch["weight"]).sum() / 4.5
        np.testing.assert_allclose(metrics[f"accuracy_{m}"], hits, rtol=1e-5)
        wanted += c * one
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["loss_32"])
    np.testing.assert_allclose(bound.logits(h.astype(np.float32), Context()), logits, rtol=1e-4)


def test_gradient_of_the_shared_head_against_closed_form():
    """d loss / d W = sum_m (z with features m.. zeroed)^T (softmax - onehot) / B, in float64."""
    rng = np.random.default_rng(0)
    h, kernel, label = rng.normal(size=(5, 8)), rng.normal(size=(8, 4)), np.array([0, 1, 2, 3, 0])
    wanted = np.zeros((8, 4))
    for m in (2, 4, 8):
        z = np.where(np.arange(8) < m, h, 0.0)
        p = np.exp(z @ kernel)
        wanted += z.T @ (p / p.sum(-1, keepdims=True) - np.eye(4)[label]) / 5

    def loss(kernel):
        outs = prefix_logits(jnp.asarray(h, jnp.float32), kernel, None, [2, 4, 8])
        return sum(-jnp.mean(jax.nn.log_softmax(o)[jnp.arange(5), label]) for o in outs)

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(kernel, jnp.float32)), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["mrl", "mrl_e"])
def test_prefixes_beat_those_of_a_plain_model(kind):
    for size, margin in ((4, 0.3), (8, 0.15)):
        assert accuracy(kind, size) > accuracy("plain", size) + margin
    assert accuracy(kind, 8) > 0.9
    assert accuracy(kind, 32) > accuracy("plain", 32) - 0.015


def test_prefixes_rival_features_trained_at_that_size():
    for size in (4, 8, 16):
        assert accuracy("mrl", size) > accuracy("plain", size, width=size) - 0.03


def test_short_prefixes_shortlist_well():
    """Nearest neighbours: 8 of 32 features propose 10, and all features choose among them."""
    _, features = trained("mrl")
    train, held_out = features["train"], features["eval"]
    labels, wanted = digits("train")["label"], digits("eval")["label"]

    def distances(size):
        a, b = held_out[:, :size], train[:, :size]
        return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)

    full = distances(32)
    best = np.mean(labels[full.argmin(1)] == wanted)
    shortlist = distances(8).argsort(1)[:, :10]
    chosen = np.take_along_axis(full, shortlist, 1).argmin(1)
    found = labels[np.take_along_axis(shortlist, chosen[:, None], 1)[:, 0]]
    assert best > 0.93
    assert np.mean(found == wanted) > best - 0.01


def test_shared_head_costs_what_a_plain_head_costs():
    plain, nested = host(), host([HEADS])
    shapes = model_lib.abstract(plain)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }

    def flops(model, loss):
        fn = lambda a, b: loss(model_lib.bind(model, a), b, Context())[0]  # noqa: E731
        return count_flops(fn, model_lib.abstract(model), batch)

    base = flops(plain, objective("classification"))
    assert flops(plain, objective(sizes=SIZES)) == base
    more = sum(SIZES[:-1]) * 10
    assert flops(nested, objective()) == base + 2 * 4 * more
    count = lambda arrays: sum(a.size for a in arrays.values())  # noqa: E731
    assert count(model_lib.abstract(nested)) == count(shapes) + more + 10 * (len(SIZES) - 1)


def test_sizes():
    assert nested_sizes(64) == [8, 16, 32, 64]
    assert nested_sizes(100, first=25) == [25, 50, 100]
    assert nested_sizes(70) == [8, 16, 32, 64, 70]
    assert nested_sizes(4) == [4]


def test_bad_sizes_are_refused():
    bound = model_lib.bind(host(), draw(host()))
    batch = {"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.zeros(2, np.int32)}
    for arguments in ({"sizes": [8, 4, 32]}, {"sizes": [8]}, {"importance": [1.0]}, {"first": 0}):
        with pytest.raises(UserError, match="matryoshka"):
            objective(**arguments)(bound, batch, Context())
    nested = model_lib.bind(host([HEADS]), draw(host([HEADS])))
    with pytest.raises(UserError, match="set them there"):
        objective(sizes=[8, 32])(nested, batch, Context())
    with pytest.raises(UserError, match="sizes must grow"):
        host([HEADS | {"sizes": [8, 16]}])


@pytest.mark.slow
def test_zero_and_large_features_stay_finite():
    model = host([HEADS])
    for scale in (0.0, 1e5):
        arrays = {path: a * scale for path, a in draw(model).items()}
        batch = {"image": np.ones((2, 8, 8, 1), np.float32), "label": np.zeros(2, np.int32)}
        fn = lambda a, b=batch: objective()(model_lib.bind(model, a), b, Context())[0]  # noqa: E731
        value, grads = jax.value_and_grad(fn)(arrays)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in grads.values())
