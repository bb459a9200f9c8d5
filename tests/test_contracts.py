"""What every technique that fills a slot of a host must keep. A technique joins by a row.

Each row puts the technique in a small host by a rule and checks it there, as users meet it:
gradients reach it, one device equals eight, bfloat16 stays near, extreme inputs stay finite,
nothing leaks from the future or between packed documents, decoding token by token equals the
parallel form, and a checkpoint brings back the same bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import models
from efficient import model as model_lib
from efficient import registry
from efficient.checkpoints.checkpoint import Checkpointer
from efficient.objectives.likelihood import Classification, NextToken
from efficient.scope import Context, Rules, Scope
from efficient.training.step import cast

B, T, V, D = 8, 24, 32, 16  # batch, length, vocabulary, width
MIXER, CHANNEL, BLOCK = r".*blocks/\d+/mixer", r".*blocks/\d+/channel", r".*blocks/\d+"
NORM = r"(.*/)?(mixer|channel|final)_norm"

# (kind, name): the rules to try it with. Linears have a contract of their own.
ROWS: dict[tuple[str, str], list[dict]] = {
    ("mixer", "attention"): [
        {"at": MIXER, "heads": 4, "kv_heads": 2, "rope": 100.0, "bias": True},
        {"at": MIXER, "heads": 2, "window": 5, "softcap": 3.0},
    ],
    ("mixer", "block_sparse_attention"): [
        {"at": MIXER, "heads": 2, "block": 2, "factors": 2, "global_blocks": 1, "rope": 100.0}
    ],
    ("mixer", "lm_infinite"): [
        {"at": MIXER, "heads": 4, "kv_heads": 2, "window": 7, "sinks": 3, "rope": 100.0}
    ],
    ("mixer", "longgen"): [
        {"at": MIXER, "heads": 2, "window": 5, "stride": 3, "block": 2, "rope": 100.0}
    ],
    ("mixer", "s2_attention"): [
        {"at": MIXER, "heads": 4, "kv_heads": 2, "stride": 3, "block": 2, "rope": 100.0}
    ],
    ("mixer", "pool"): [{"at": MIXER}],
    ("mixer", "raft"): [{"at": MIXER, "raft": 2}],
    ("channel", "mlp"): [{"at": CHANNEL, "hidden": 24, "activation": "silu", "bias": True}],
    ("channel", "glu"): [{"at": CHANNEL, "hidden": 24}],
    ("channel", "mini_sequence"): [{"at": CHANNEL, "pieces": 3}],
    ("channel", "tokenformer"): [{"at": CHANNEL, "tokens": 24}],
    ("norm", "rms_norm"): [{"at": NORM}, {"at": NORM, "zero_centered": True}],
    ("norm", "layer_norm"): [{"at": NORM}],
    ("norm", "identity"): [{"at": "final_norm"}],
    ("norm", "group_norm"): [{"at": NORM}],
    ("wiring", "pre_norm"): [{"at": BLOCK}, {"at": BLOCK, "layer_scale": 0.1}],
    ("wiring", "post_norm"): [{"at": BLOCK}],
    ("wiring", "sandwich_norm"): [{"at": BLOCK}],
    ("wiring", "hybrid_norm"): [{"at": BLOCK}],
    ("wiring", "ladder_residual"): [{"at": BLOCK}],
    ("embedding", "table"): [{"at": "embed"}, {"at": "embed", "scale_by_width": True}],
    ("embedding", "compositional"): [{"at": "embed"}],
    ("position", "learned"): [{"at": "position"}],
    ("position", "no_position"): [{"at": "position"}],
}
# What these add to the mixer that they are subclasses of is little, as is a technique's second row:
# `make test-slow` runs them.
SUBCLASSES = {"block_sparse_attention", "lm_infinite", "longgen", "s2_attention"}
CASES = [(kind, name, rule) for (kind, name), rules in ROWS.items() for rule in rules]
LABELS = [f"{kind}-{name}-{i}" for i, (kind, name, _) in enumerate(CASES)]


def test_every_technique_has_a_row():
    kinds = {kind for kind, _ in ROWS}
    registered = {(t.kind, t.name) for t in registry.techniques() if t.kind in kinds}
    registered = {key for key in registered if not key[1].startswith("test_")}
    assert registered == set(ROWS), "add a row for the new technique, or take the stale one out"


@dataclasses.dataclass(frozen=True)
class Case:
    """A host with the technique in it, its arrays, and the loss of a batch."""

    technique: registry.Technique
    model: object
    arrays: dict
    batch: dict
    images: bool

    def loss(self, arrays, batch):
        objective = Classification() if self.images else NextToken()
        model = model_lib.bind(self.model, arrays)
        context = Context(rng=jax.random.key(1), progress=0.5, train=True)
        return objective(model, batch, context)[0]

    def logits(self, arrays, batch):
        model = model_lib.bind(self.model, arrays)
        return model.logits(model.features(batch, Context())[0], Context())

    @functools.cached_property
    def value_and_grad(self):
        return jax.jit(jax.value_and_grad(self.loss))


def _is_slow(kind, name, rule):
    return name in SUBCLASSES or rule is not ROWS[kind, name][0]


MARKED = [pytest.param(case, marks=[pytest.mark.slow] * _is_slow(*case)) for case in CASES]


@pytest.fixture(scope="module", params=MARKED, ids=LABELS)
def case(request):
    kind, name, rule = request.param
    technique = registry.find(name, kind)
    images = technique.declares.get("grid", False)
    rules = Rules([{"use": name, **rule}])
    scope = Scope(rules)
    generator = np.random.default_rng(0)
    if images:
        stages = [{"width": D, "depth": 2, "kernel": 2, "stride": 2}]
        host = models.host("vision")(
            scope, image_size=(8, 8), channels=1, num_classes=V, stages=stages
        )
        batch = {
            "image": generator.random((B, 8, 8, 1), np.float32),
            "label": generator.integers(V, size=B),
        }
    else:
        host = models.host("decoder")(scope, vocab_size=V, width=D, depth=2, max_length=T)
        tokens = generator.integers(V, size=(B, T + 1))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    rules.check_all_matched()
    model = model_lib.stack_alike(host)
    arrays = jax.jit(lambda key: model_lib.init(model, key))(jax.random.key(0))
    return Case(technique, model, arrays, jax.tree.map(jnp.asarray, batch), images)


def test_every_parameter_gets_a_gradient(case):
    loss, grads = case.value_and_grad(case.arrays, case.batch)
    assert np.isfinite(loss)
    for path, grad in grads.items():
        if model_lib.is_param(case.model)[path]:
            assert np.isfinite(grad).all(), path
            assert np.abs(grad).max() > 0, path


def test_gradient_is_the_slope_of_the_loss(case):
    """Along a random direction; the reference is the loss itself at two points."""
    _, grads = case.value_and_grad(case.arrays, case.batch)
    generator = np.random.default_rng(2)
    direction = {p: generator.standard_normal(v.shape) for p, v in case.arrays.items()}
    norm = np.sqrt(sum(float((d**2).sum()) for d in direction.values()))
    loss = jax.jit(case.loss)
    step = 0.02

    def at(scale):
        moved = {p: v + scale / norm * direction[p] for p, v in case.arrays.items()}
        return float(loss(moved, case.batch))

    slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    expected = sum(float((grads[p] * direction[p]).sum()) for p in grads) / norm
    size = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    # Random directions meet the gradient at about size / sqrt(parameters); float32 loss noise
    # over the step bounds the absolute error.
    count = sum(v.size for v in case.arrays.values())
    assert abs(slope - expected) < 2e-4 + 0.05 * size / np.sqrt(count)


@pytest.mark.slow
def test_eight_devices_equal_one(case):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    one = case.value_and_grad(case.arrays, case.batch)
    eight = case.value_and_grad(
        jax.device_put(case.arrays, everywhere), jax.device_put(case.batch, spread)
    )
    np.testing.assert_allclose(eight[0], one[0], rtol=2e-6)
    for path, grad in one[1].items():
        scale = float(jnp.abs(grad).max())
        np.testing.assert_allclose(eight[1][path], grad, atol=2e-5 * scale + 1e-9, err_msg=path)


@pytest.mark.slow
def test_bfloat16_stays_near_and_extremes_stay_finite(case):
    full, _ = case.value_and_grad(case.arrays, case.batch)
    half, _ = case.value_and_grad(cast(case.arrays, jnp.bfloat16), case.batch)
    assert abs(float(half) - float(full)) < 0.03 * float(full)
    for scale in (0.0, 1e4):
        extreme = dict(case.arrays)
        for path in extreme:
            if path.startswith(("embed/", "stages/0/patch/")):
                extreme[path] = extreme[path] * scale
        loss, grads = case.value_and_grad(extreme, case.batch)
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in grads.values())


def test_the_future_and_other_documents_stay_hidden(case):
    if case.images:
        pytest.skip("images have no order of tokens")
    logits = jax.jit(case.logits)
    middle = T // 2
    changed = case.batch["tokens"].at[:, middle].add(1) % V
    before = logits(case.arrays, case.batch)
    after = logits(case.arrays, case.batch | {"tokens": changed})
    np.testing.assert_array_equal(after[:, :middle], before[:, :middle])
    assert np.abs(after[:, middle] - before[:, middle]).max() > 0
    if case.technique.declares.get("segments") is False:
        return
    ids = jnp.where(jnp.arange(T) < middle, 1, 2) * jnp.ones((B, 1), jnp.int32)
    positions = jnp.arange(T) % middle * jnp.ones((B, 1), jnp.int32)
    packed = {"segment_ids": ids, "positions": positions}
    whole = logits(case.arrays, case.batch | packed)
    alone = logits(case.arrays, {"tokens": case.batch["tokens"][:, middle:]})
    scale = float(jnp.abs(alone).max())
    np.testing.assert_allclose(whole[:, middle:], alone, atol=1e-5 * scale)


def test_decoding_equals_the_parallel_form(case):
    if case.images or case.technique.declares.get("decode") is False:
        pytest.skip("images have no next token, or the technique declares decode=False")

    def decode(arrays, tokens):
        model = model_lib.bind(case.model, arrays)

        def step(state, token):
            logits, state = model.step(token[:, None], state, Context())
            return state, logits

        return jax.lax.scan(step, model.init_state(B, T), tokens.T)[1].swapaxes(0, 1)

    parallel = case.logits(case.arrays, case.batch)
    one_by_one = jax.jit(decode)(case.arrays, case.batch["tokens"])
    scale = float(jnp.abs(parallel).max())
    np.testing.assert_allclose(one_by_one, parallel, atol=1e-5 * scale)


def test_a_checkpoint_brings_back_the_same_bits(case, tmp_path):
    target = {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in case.arrays.items()}
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, case.arrays, {}, wait=True)
        restored, _ = checkpoints.restore(target)
    for path, value in case.arrays.items():
        np.testing.assert_array_equal(restored[path], value, err_msg=path)
