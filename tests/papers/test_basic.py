"""BASIC: exact gradients of a contrastive loss over a batch that memory holds only a part of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import configs.basic
from efficient import data as data_lib
from efficient import model as model_lib
from efficient.data import captions
from efficient.errors import UserError
from efficient.objectives.contrastive import Contrastive, pair_loss
from efficient.planning.flops import flop_count
from efficient.scope import Context
from efficient.training.plan import plan_config
from efficient.training.run import Run

B, E, S = 12, 5, 3.0


def reference(x, y, weight):
    """Loss of the pairs of weight 1 and its derivatives by x, y and the scale, in float64.

    With S = s x y^T, P its softmax along rows and Q along columns, the derivative by S is
    (P + Q - 2 I) / 2n.
    """
    real = weight > 0
    n, xs, ys = real.sum(), x[real], y[real]
    scores = S * xs @ ys.T
    rows = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    columns = np.exp(scores) / np.exp(scores).sum(axis=0, keepdims=True)
    loss = -(np.log(np.diag(rows)) + np.log(np.diag(columns))).mean() / 2
    d = (rows + columns - 2 * np.eye(n)) / (2 * n)
    dx, dy = np.zeros_like(x), np.zeros_like(y)
    dx[real], dy[real] = S * d @ ys, S * d.T @ xs
    return loss, dx, dy, (d * (xs @ ys.T)).sum()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_loss_and_its_derivatives_are_those_of_the_equations(pieces, padding):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(B, E)) for _ in range(2))
    weight = (np.arange(B) < B - padding).astype(np.float64)

    def loss(x, y, scale):
        x, y = (a.reshape(pieces, -1, E) for a in (x, y))
        weights = weight.reshape(pieces, -1)
        losses, _ = pair_loss(x, y, scale, jnp.asarray(weights) if padding else None)
        return (losses * weights).sum() / weights.sum()

    with jax.enable_x64():
        value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, y, S)
    # `cross_entropy` computes in float32
    for got, wanted in zip((value, *grads), reference(x, y, weight), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_the_nearest_text_is_found_across_pieces():
    x = np.eye(B, dtype=np.float32)
    order = np.random.default_rng(1).permutation(B)
    for pieces in (1, 4):
        parts = (a.reshape(pieces, -1, B) for a in (x, x[order]))
        _, nearest = pair_loss(*parts, 1.0)
        np.testing.assert_array_equal(order[np.asarray(nearest).ravel()], np.arange(B))


@pytest.fixture(scope="module")
def small():
    """(model, arrays, a batch of 32 pairs) of the smoke configuration."""
    run = Run(configs.basic.get_config("smoke"), jax.devices()[:1])
    model = run.phases[0].stacked
    batch = tiny.batches(run, 1)[0]
    return model, model_lib.init(model, jax.random.key(0)), {n: a[:32] for n, a in batch.items()}


def value_and_grad(model, microbatches):
    objective = Contrastive(microbatches=microbatches)

    def loss(arrays, batch):
        context = Context(rng=jax.random.key(1), train=True)
        return objective(model_lib.bind(model, arrays), batch, context)

    return jax.value_and_grad(loss, has_aux=True)


def test_gradients_are_those_of_the_whole_batch(small):
    model, arrays, batch = small
    (value, metrics), grads = jax.jit(value_and_grad(model, 1))(arrays, batch)
    (cut, cut_metrics), cut_grads = jax.jit(value_and_grad(model, 4))(arrays, batch)
    np.testing.assert_allclose(cut, value, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(cut_metrics[name], metrics[name], rtol=1e-6, err_msg=name)
    size = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
    assert size > 0.1
    for path, grad in grads.items():
        # That of the keys' biases is zero but for rounding.
        np.testing.assert_allclose(cut_grads[path], grad, rtol=1e-4, atol=1e-6 * size, err_msg=path)


@pytest.mark.slow
def test_accumulated_gradients_are_of_another_loss(small):
    model, arrays, batch = small
    (value, _), grads = jax.jit(value_and_grad(model, 4))(arrays, batch)
    part = jax.jit(value_and_grad(model, 1))
    parts = [part(arrays, {n: a[i::4] for n, a in batch.items()}) for i in range(4)]
    assert np.mean([p[0][0] for p in parts]) < value - 1.0  # log 4 fewer nats
    mean = jax.tree.map(lambda *g: sum(g) / 4, *[p[1] for p in parts])
    size = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
    error = np.sqrt(sum(np.square(mean[p] - grads[p]).sum() for p in grads))
    assert error > 0.1 * size


def large():
    """Abstract arguments of a model and a batch of which activations are nearly all memory."""
    config = configs.basic.get_config("smoke")
    config.batch_size = 256
    run = Run(config, jax.devices()[:1])
    return run.phases[0].stacked, run.phases[0].shapes, run.abstract_batch()


def test_memory_is_that_of_a_microbatch():
    model, arrays, batch = large()

    def temporaries(microbatches):
        compiled = jax.jit(value_and_grad(model, microbatches)).lower(arrays, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 4


def test_the_price_is_one_more_forward_pass():
    model, arrays, batch = large()

    def forward(arrays, batch):
        return model_lib.bind(model, arrays).embeddings(batch, Context())

    embed = flop_count(forward, arrays, batch).total
    similarities = 2 * 2 * len(batch["image"]) ** 2 * model.text_head.kernel.shape[-1]
    whole = flop_count(value_and_grad(model, 1), arrays, batch)
    cut = flop_count(value_and_grad(model, 8), arrays, batch)
    assert whole.recomputed == 0
    assert cut.recomputed == cut.total - whole.total == embed + similarities
    assert cut.total / whole.total == pytest.approx(4 / 3, rel=0.02)


@pytest.mark.slow
def test_a_mesh_contrasts_the_pairs_of_all_devices():
    config = configs.basic.get_config("smoke,microbatches=2")
    config.batch_size = 16
    states, metrics = tiny.states(config, 2)
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    others, other_metrics = tiny.states(config, 2, jax.devices()[:8])
    for one, other in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-4)
    moments = [path for path in states[-1] if "/mu/" in path]
    assert len(moments) > 20
    for path in moments:
        atol = 1e-4 * np.abs(states[-1][path]).max() + 1e-8
        np.testing.assert_allclose(others[-1][path], states[-1][path], atol=atol, err_msg=path)


@pytest.mark.slow
def test_devices_exchange_embeddings_and_sums_alone():
    """In the program for eight v5e, each with its rows of the microbatch and of similarities."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    config = configs.basic.get_config("smoke,microbatches=2")
    config.batch_size, config.mesh = 256, {"data": 8}
    plan = plan_config(config, "v5e:2x4")
    width = config.model.embedding
    gathers = [c.payload for c in plan.collectives if c.kind == "all-gather" for _ in range(c.runs)]
    # Embeddings, rounded to bfloat16 as a product in float32 rounds by default, and labels.
    assert sorted(gathers) == [4 * 256, 2 * 256 * width, 2 * 256 * width]
    assert {c.kind for c in plan.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_captions_name_what_the_image_shows():
    for split in ("train", "eval"):
        source = data_lib.make_source("captions", split, train_size=50, eval_size=50)
        for i in range(50):
            example = source[i]
            words = [captions.WORDS[t] for t in example["tokens"] if t != captions.FILL]
            named = [captions.DIGITS.index(w) for w in words if w in captions.DIGITS]
            assert named == [int(d) for d in f"{example['label']:03d}"]
            assert example["label"] in captions.triples_of(split)
            assert example["image"].shape == (8, 24, 1)
    assert not set(captions.triples_of("train")) & set(captions.triples_of("eval"))


def refused(config) -> str:
    with pytest.raises(UserError) as error:
        run = Run(config, jax.devices()[:1])
        run.flops(run.phases[0])
    return str(error.value)


def test_what_would_change_the_loss_is_refused():
    config = configs.basic.get_config("smoke")
    config.accumulate = 4
    assert "microbatches=4" in refused(config)
    config = configs.basic.get_config("smoke,microbatches=5")
    assert "64 pairs does not divide into objective.microbatches=5" in refused(config)
    config = tiny.config()
    config.phases = [{**config.phases[0], "objective": {"name": "contrastive"}}]
    assert "dual_encoder" in refused(config)
    with pytest.raises(UserError, match="at least 1"):
        dataclasses.replace(Contrastive(), microbatches=0)
