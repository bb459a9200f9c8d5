"""Multi-sample dropout: the average it claims to be, its cost, and what it does to noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient import model as model_lib
from efficient import registry
from efficient.errors import UserError
from efficient.objectives.multi_sample_dropout import dropout_samples
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from models.vision import Vision

CLASSES, WIDTH = 10, 16


def objective(name="multi_sample_dropout", **arguments):
    return registry.find(name, "objective").build(**arguments)


def vision(width=WIDTH, depth=1):
    stage = {"width": width, "depth": depth, "kernel": 4, "stride": 4}
    return Vision(Scope(Rules()), image_size=8, channels=1, num_classes=CLASSES, stages=[stage])


def draw(model):
    arrays = model_lib.init(model, jax.random.key(0))
    bias = 0.1 * jax.random.normal(jax.random.key(7), arrays["head/bias"].shape)
    return arrays | {"head/bias": bias}


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, CLASSES, size))}


def training(seed=0):
    return Context(rng=jax.random.key(seed), train=True)


def test_dropout_samples_are_masks_of_their_own():
    h = jax.random.normal(jax.random.key(1), (64, 128)) + 3.0
    dropped = np.asarray(dropout_samples(h, jax.random.key(0), 0.25, 5))
    kept = dropped != 0
    np.testing.assert_allclose(
        dropped[kept], np.broadcast_to(h / 0.75, kept.shape)[kept], rtol=1e-6
    )
    assert abs(kept.mean() - 0.75) < 0.01
    both = [np.mean(kept[i] & kept[j]) for i in range(5) for j in range(i)]
    np.testing.assert_allclose(both, 0.75**2, atol=0.02)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.slow
def test_against_the_explicit_average(samples):
    """Each sample's loss by itself, in float64 NumPy, from the masks drawn with the same key."""
    model, batch, rate = vision(), batch_of(6), 0.5
    batch["weight"] = jnp.array([1.0, 1.0, 0.5, 1.0, 0.0, 1.0])
    arrays, context = draw(model), training()
    bound = model_lib.bind(model, arrays)
    h = bound.features(batch, context)[0]
    key = context.key("objective/multi_sample_dropout")
    kept = np.asarray(dropout_samples(jnp.ones_like(h), key, rate, samples)) > 0
    kernel, bias = (np.asarray(arrays[f"head/{n}"], np.float64) for n in ("kernel", "bias"))
    losses, hits = [], []
    for mask in kept:
        logits = (np.asarray(h, np.float64) * mask / (1 - rate)) @ kernel + bias
        chosen = logits[np.arange(6), batch["label"]]
        losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
        hits.append(logits.argmax(-1) == np.asarray(batch["label"]))
    weight = np.asarray(batch["weight"], np.float64)
    loss, metrics = objective(samples=samples, rate=rate)(bound, batch, context)
    np.testing.assert_allclose(loss, (np.mean(losses, 0) * weight).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    accuracy = (np.mean(hits, 0) * weight).sum() / weight.sum()
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-5)
    assert metrics["weight"] == weight.sum()


@pytest.mark.slow
def test_gradient_is_the_average_of_the_samples():
    model, batch = vision(), batch_of(4)
    arrays, context = draw(model), training()
    key = context.key("objective/multi_sample_dropout")
    masks = dropout_samples(jnp.ones((4, WIDTH)), key, 0.5, 3)

    def one(arrays, mask):
        bound = model_lib.bind(model, arrays)
        logits = bound.logits(bound.features(batch, context)[0] * mask, context)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]])

    def all_at_once(arrays):
        return objective(samples=3, rate=0.5)(model_lib.bind(model, arrays), batch, context)[0]

    singles = [jax.grad(one)(arrays, mask) for mask in masks]
    got = jax.grad(all_at_once)(arrays)
    for path in got:
        wanted = np.mean([np.asarray(s[path], np.float64) for s in singles], axis=0)
        np.testing.assert_allclose(got[path], wanted, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_evaluation_drops_nothing():
    model, batch = vision(), batch_of(4)
    bound = model_lib.bind(model, draw(model))
    wanted = objective("classification", label_smoothing=0.1)(bound, batch, Context())
    for context in (Context(), Context(rng=jax.random.key(0))):
        got = objective(label_smoothing=0.1)(bound, batch, context)
        np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
        np.testing.assert_allclose(got[1]["accuracy"], wanted[1]["accuracy"])
    train = objective()(bound, batch, training())[0]
    assert abs(train - objective("classification")(bound, batch, Context())[0]) > 1e-3


def test_eight_samples_cost_little():
    model, batch = vision(width=64, depth=4), batch_of(8)

    def flops(samples):
        def loss(arrays, batch):
            context = training()
            return objective(samples=samples)(model_lib.bind(model, arrays), batch, context)[0]

        return count_flops(jax.grad(loss), model_lib.abstract(model), batch)

    one, eight = flops(1), flops(8)
    # The head is a product forward and two backward for each of the seven samples more.
    assert eight - one == 7 * 3 * 2 * 8 * 64 * CLASSES
    assert eight < 1.03 * one


def test_gradient_noise_falls_as_one_over_m():
    """Variance over masks of the head's gradient, at features that stay as they are."""
    model, batch = vision(), batch_of(4)
    arrays = draw(model)

    def gradient(seed, samples):
        def loss(kernel):
            bound = model_lib.bind(model, arrays | {"head/kernel": kernel})
            return objective(samples=samples)(bound, batch, Context(rng=seed, train=True))[0]

        return jax.grad(loss)(arrays["head/kernel"])

    seeds = jax.random.split(jax.random.key(3), 200)
    noise = {
        m: np.asarray(jax.jit(jax.vmap(lambda s, m=m: gradient(s, m)))(seeds)).var(axis=0).sum()
        for m in (1, 8)
    }
    assert noise[1] > 0
    # The ratio of two variances of 200 draws has a standard deviation of 0.14 for one number, and
    # less for a sum of many; noise that fell as the root of m would give 2.8.
    np.testing.assert_allclose(noise[1] / noise[8], 8.0, rtol=0.2)


def test_large_features_stay_finite():
    model, batch = vision(), batch_of(4)
    arrays = {path: a * 1e4 if "head" in path else a for path, a in draw(model).items()}
    for scale in (0.0, 1e4):
        scaled = batch | {"image": batch["image"] * scale}
        loss = objective()(model_lib.bind(model, arrays), scaled, training())[0]
        assert np.isfinite(loss)


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"rate": 1.0}, {"rate": -0.1}], ids=str)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UserError):
        objective(**arguments)
