"""Mini-sequences: the values and gradients of the whole, in less memory."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import configs.mini_sequence
from efficient import model as model_lib
from efficient import registry
from efficient.channels.mini_sequence import MiniSequence, over_pieces
from efficient.errors import UserError
from efficient.scope import Buffer, Context, Rules, Scope, buffer
from efficient.training.plan import plan_config
from models.decoder import Decoder

B, D, V = 2, 16, 50


def objective(name, **arguments):
    return registry.find(name, "objective").build(**arguments)


def decoder(rules=(), **arguments):
    settings = {"vocab_size": V, "width": D, "depth": 1, "max_length": 64} | arguments
    return Decoder(Scope(Rules(rules)), **settings)


def draw(model, seed=0):
    return model_lib.init(model, jax.random.key(seed))


def batch_of(length, seed=0, weights=True):
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, V, (B, length)) for name in ("tokens", "targets")}
    if weights:
        batch["weights"] = rng.integers(0, 2, (B, length)).astype(np.float32)
        batch["weight"] = np.array([1.0, 0.5], np.float32)
    return jax.tree.map(jnp.asarray, batch)


def value_and_grads(model, loss, arrays, batch):
    def fn(arrays):
        value, metrics = loss(model_lib.bind(model, arrays), batch, Context(train=True))
        return value, metrics

    return jax.jit(jax.value_and_grad(fn, has_aux=True))(arrays)


def assert_trees_close(got, wanted, rtol=2e-5, atol=1e-6):
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("length", "pieces", "tied"), [(12, 4, True), (13, 4, False), (5, 16, True), (12, 1, False)]
)
def test_loss_and_gradients_are_those_of_the_whole(length, pieces, tied):
    model = decoder(tied=tied, logit_softcap=20.0)
    arrays, batch = draw(model), batch_of(length)
    whole = objective("next_token", z_loss=0.1)
    cut = objective("mini_sequence_loss", z_loss=0.1, pieces=pieces)
    (value, metrics), grads = value_and_grads(model, whole, arrays, batch)
    (cut_value, cut_metrics), cut_grads = value_and_grads(model, cut, arrays, batch)
    np.testing.assert_allclose(cut_value, value, rtol=1e-6)
    assert_trees_close(cut_metrics, metrics, rtol=1e-6)
    assert_trees_close(cut_grads, grads)


def test_loss_against_numpy():
    """Mean over weighted tokens of -log softmax and of the squared normalizer, in float64."""
    model = decoder(tied=False)
    arrays, batch = draw(model), batch_of(11)
    (value, metrics), _ = value_and_grads(
        model, objective("mini_sequence_loss", z_loss=0.1, pieces=3), arrays, batch
    )
    bound = model_lib.bind(model, arrays)
    h = np.asarray(bound.features(batch, Context())[0], np.float64)
    logits = h @ np.asarray(arrays["head/kernel"], np.float64)
    normalizer = np.log(np.exp(logits).sum(axis=-1))
    targets = np.asarray(batch["targets"])
    losses = normalizer - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"] * batch["weight"][:, None], np.float64)
    loss = (losses * weights).sum() / weights.sum()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    hits = (logits.argmax(-1) == targets) * weights
    np.testing.assert_allclose(metrics["accuracy"], hits.sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], weights.sum(), rtol=1e-6)
    z = (normalizer**2 * weights).sum() / weights.sum()
    np.testing.assert_allclose(value, loss + 0.1 * z, rtol=1e-5)


@pytest.mark.parametrize(
    ("of", "length", "pieces"), [("mlp", 12, 4), ("glu", 13, 4), ("mlp", 3, 8), ("mlp", 1, 4)]
)
def test_channel_is_that_of_the_whole(of, length, pieces):
    rules = [
        {"at": r"blocks/\d+/channel", "use": "mini_sequence", "of": of, "pieces": pieces}
        | {"arguments": {"hidden": 24}}
    ]
    cut = decoder(rules)
    whole = decoder([{"at": r"blocks/\d+/channel", "use": of, "hidden": 24}])
    arrays, batch = draw(cut), batch_of(length)
    loss = objective("next_token")
    (value, _), grads = value_and_grads(cut, loss, arrays, batch)
    plain = {path.replace("/base/", "/"): a for path, a in arrays.items()}
    (whole_value, _), whole_grads = value_and_grads(whole, loss, plain, batch)
    np.testing.assert_allclose(value, whole_value, rtol=1e-6)
    assert_trees_close({p.replace("/base/", "/"): g for p, g in grads.items()}, whole_grads)


def test_scanned_blocks_and_decoding():
    rules = [{"at": r"blocks/\d+/channel", "use": "mini_sequence", "pieces": 3}]
    single = decoder(rules, depth=3, scan_from=2)
    stacked = model_lib.stack_alike(single)
    assert any("0-2" in path for path, _ in model_lib.walk(stacked))
    arrays, batch = draw(stacked), batch_of(7)
    logits = model_lib.bind(stacked, arrays)(batch, Context())
    state = stacked.init_state(B, 7)
    step_one = jax.jit(lambda t, s: model_lib.bind(stacked, arrays).step(t, s, Context()))
    for t in range(7):
        step, state = step_one(batch["tokens"][:, t : t + 1], state)
        np.testing.assert_allclose(step, logits[:, t], rtol=1e-4, atol=1e-5)


def temporaries(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


class Head(nnx.Module):
    """A host that is its head alone."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def features(self, batch, context):
        return batch["h"], {}

    def logits(self, h, context):
        return h @ self.kernel[...]


def test_memory_of_the_loss_falls_with_pieces():
    """A vocabulary 32 times the width: 16 pieces need less than a fifth of the temporaries."""
    length, width, vocabulary = 512, 64, 2048

    def loss(pieces, kernel, h, targets):
        loss = objective("mini_sequence_loss", pieces=pieces) if pieces else objective("next_token")
        return loss(Head(kernel), {"h": h, "targets": targets}, Context())[0]

    shapes = [
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((4, length, width), jnp.float32),
        jax.ShapeDtypeStruct((4, length), jnp.int32),
    ]
    size = {
        pieces: temporaries(jax.grad(lambda *a, p=pieces: loss(p, *a), (0, 1)), *shapes)
        for pieces in (0, 4, 16)
    }
    logits = 4 * length * vocabulary * 4
    assert size[0] >= logits
    assert size[4] < 0.5 * size[0]
    assert size[16] < 0.2 * size[0]
    assert size[16] < logits / 4


def test_memory_of_the_channel_falls_with_pieces():
    """A hidden width 16 times the width: 16 pieces need less than a third of the temporaries."""
    length, width, hidden = 1024, 32, 512

    def temporary(pieces):
        rule = {"arguments": {"hidden": hidden}, "pieces": pieces}
        module = MiniSequence(Scope(Rules()), width, **rule)
        x = jax.ShapeDtypeStruct((4, length, width), jnp.float32)

        def loss(arrays, x):
            y, _ = model_lib.call(model_lib.bind(module, arrays), x, Context())
            return jnp.sum(y**2)

        return temporaries(jax.grad(loss, (0, 1)), model_lib.abstract(module), x)

    size = {pieces: temporary(pieces) for pieces in (1, 4, 16)}
    assert size[1] >= 4 * length * hidden * 4
    assert size[4] < 0.6 * size[1]
    assert size[16] < 0.33 * size[1]


@pytest.mark.slow
def test_parameters_travel_once_however_many_the_pieces():
    """Fully sharded over four chips, as a TPU's compiler schedules it."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")

    def sent(pieces):
        config = configs.mini_sequence.get_config(f"length=256,pieces={pieces}")
        config.model.depth, config.data.name, config.mesh.data = 1, "copying", 1
        config.mesh.fsdp = 4
        by_kind = collections.Counter()
        for one in plan_config(config, "v5e:2x2").collectives:
            by_kind[one.kind] += one.wire
        return by_kind

    few, many = sent(2), sent(8)
    assert few["all-gather"] > 2**19
    for kind in ("all-gather", "reduce-scatter"):
        assert many[kind] <= 1.1 * few[kind]


def test_pieces_have_their_own_randomness_and_positions():
    class Noise(nnx.Module):
        def __call__(self, x, context):
            noise = jax.random.normal(context.key("noise"), x.shape)
            return x + noise + context.positions[..., None]

    module = MiniSequence(Scope(Rules()), D, pieces=2)
    module.base = Noise()
    positions = jnp.arange(8)[None].repeat(B, axis=0)
    context = Context(rng=jax.random.key(0), positions=positions, train=True)
    y, _ = module(jnp.zeros((B, 8, D)), context)
    y = np.asarray(y - positions[..., None])
    assert abs(np.mean(y)) < 0.5, "each piece was given its own positions"
    assert not np.allclose(y[:, :4], y[:, 4:])


class Counting(nnx.Module):
    """Counts calls, and reports the mean of its input."""

    def __init__(self):
        self.count = buffer((), None)

    def __call__(self, x, context):
        if context.train:
            self.count.set_value(self.count[...] + 1)
        return x, {"loss/mean": x.mean()}


def test_state_that_changes_is_refused_and_auxiliary_outputs_are_means():
    module = MiniSequence(Scope(Rules()), D, pieces=3)
    module.base = Counting()
    module.base.count = Buffer(jnp.zeros(()))
    x = jax.random.normal(jax.random.key(0), (B, 7, D))
    with pytest.raises(UserError, match="count"):
        module(x, Context(train=True))
    _, aux = module(x, Context())
    np.testing.assert_allclose(aux["loss/mean"], x.mean(), rtol=1e-5)


def test_over_pieces_visits_all_tokens_in_order():
    x = jnp.arange(2 * 7.0).reshape(2, 7)

    def piece(carry, index, x):
        return carry + x.sum(), x + 100 * index

    total, y = over_pieces(piece, jnp.zeros(()), x, 3)
    assert total == x.sum()
    np.testing.assert_array_equal((y - x) / 100, np.array([[0, 0, 0, 1, 1, 1, 2]] * 2))


@pytest.mark.slow
def test_bf16_error_is_that_of_the_whole():
    model = decoder(tied=False)
    arrays, batch = draw(model), batch_of(13)
    half = {path: a.astype(jnp.bfloat16) for path, a in arrays.items()}
    cut, whole = objective("mini_sequence_loss", pieces=4), objective("next_token")
    (exact, _), _ = value_and_grads(model, whole, arrays, batch)
    (naive, _), _ = value_and_grads(model, whole, half, batch)
    (ours, _), _ = value_and_grads(model, cut, half, batch)
    assert abs(ours - exact) <= 1.5 * abs(naive - exact) + 1e-5


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="pieces"):
        objective("mini_sequence_loss", pieces=0)
    with pytest.raises(UserError, match="pieces"):
        MiniSequence(Scope(Rules()), D, pieces=0)
