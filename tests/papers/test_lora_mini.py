"""LoRA-Mini and LoRA: the update, what is trained, parameter ratios, folding into the base."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import lora_mini as lora_mini_config
from efficient.errors import UserError
from efficient.linears.dense import Dense
from efficient.model import bind, init, walk
from efficient.scope import Context, Rules, Scope
from efficient.surgery import lora, lora_mini
from efficient.surgery.common import carry, train_only
from efficient.surgery.ia3 import IA3
from efficient.surgery.lora import LoRA
from efficient.surgery.lora_mini import LoRAMini
from efficient.surgery.merge import Merge
from models.decoder import Decoder

KEY = jax.random.key(0)
BATCH = {"tokens": jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])}


def decoder(width=16, rules=()):
    rules = Rules([{"at": r".*/mixer", "use": "attention", "heads": 2, "bias": True}, *rules])
    return Decoder(Scope(rules), vocab_size=11, width=width, depth=2, max_length=8)


def operate(surgery, model, values):
    model = nnx.clone(model)
    surgery.apply(model)
    return model, getattr(surgery, "convert", carry)(values, model, KEY)


def adapted(surgery, width=16):
    """(model, values) before and after; the trained inner arrays are then made random."""
    model = decoder(width)
    values = init(model, KEY)
    return (model, values), operate(surgery, model, values)


def disturbed(values, at, seed=0):
    rng = np.random.default_rng(seed)
    new = {p: rng.standard_normal(v.shape).astype(np.float32) for p, v in values.items()}
    return values | {p: new[p] for p in values if re.fullmatch(at, p)}


def logits(model, values):
    return bind(model, values)(BATCH, Context())


@pytest.mark.parametrize("surgery", [LoRA(), LoRAMini(), LoRAMini(outer_std=1.0)])
def test_unchanged_at_the_start(surgery):
    before, after = adapted(surgery)
    np.testing.assert_array_equal(logits(*before), logits(*after))
    assert sum("base/kernel" in path for path in after[1]) == 4
    for path, array in before[1].items():  # a checkpoint of the base is carried over whole
        moved = re.sub(r"/(q|v)/(\w+)$", r"/\1/base/\2", path)
        np.testing.assert_array_equal(array, after[1][moved])


def test_update_is_the_product():
    """y = x W + b + (alpha / r) x A_out A_in B_in B_out, in float64 NumPy."""
    _, (model, values) = adapted(LoRAMini(rank=3, inner=5, alpha=6.0))
    values = disturbed(values, r".*/(a|b)_(in|out)|.*bias")
    linear = bind(model, values).blocks.blocks[1].mixer.q
    own = {k.removeprefix("blocks/1/mixer/q/"): np.float64(v) for k, v in values.items()}
    shapes = {name: own[name].shape for name in ("a_out", "a_in", "b_in", "b_out")}
    assert shapes == {"a_out": (16, 5), "a_in": (5, 3), "b_in": (3, 5), "b_out": (5, 16)}
    x = np.random.default_rng(1).standard_normal((7, 16))
    delta = 6.0 / 3 * own["a_out"] @ own["a_in"] @ own["b_in"] @ own["b_out"]
    expected = x @ (own["base/kernel"] + delta) + own["base/bias"]
    got = linear(jnp.asarray(x, jnp.float32), Context())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        linear.materialize(), own["base/kernel"] + delta, rtol=1e-4, atol=1e-4
    )
    assert np.linalg.matrix_rank(delta) == 3
    assert linear.flops() == 2 * (16 * 16 + 16 * 5 + 5 * 3 + 3 * 5 + 5 * 16)


def test_lora_update_is_the_product():
    _, (model, values) = adapted(LoRA(rank=3, alpha=6.0))
    values = disturbed(values, r".*/lora_(a|b)")
    linear = bind(model, values).blocks.blocks[0].mixer.v
    own = {k.removeprefix("blocks/0/mixer/v/"): np.float64(v) for k, v in values.items()}
    expected = own["base/kernel"] + 2.0 * own["lora_a"] @ own["lora_b"]
    np.testing.assert_allclose(linear.materialize(), expected, rtol=1e-5, atol=1e-5)
    y = linear(jnp.eye(16), Context()) - linear(jnp.zeros((1, 16)), Context())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert linear.flops() == 2 * (16 * 16 + 3 * (16 + 16))


def trained(entries, model):
    """Paths that a phase's `parameters` would train: the first rule that matches decides."""
    params = {p: v for p, v in walk(model) if isinstance(v, nnx.Param)}
    first = {p: next(e for e in entries if re.fullmatch(e["at"], p)) for p in params}
    return {p: v.shape for p, v in params.items() if first[p].get("train", True)}


def test_only_the_inner_matrices_are_trained():
    _, (model, values) = adapted(LoRAMini())
    paths = trained(train_only(lora_mini.TRAINED), model)
    assert {path.rsplit("/", 1)[1] for path in paths} == {"a_in", "b_in"} and len(paths) == 8

    def loss(part):
        return (logits(model, values | part) ** 2).mean()

    # Both gradients are alive after one step: B_in first, through it A_in.
    part = {p: values[p] for p in paths}
    for _ in range(2):
        grads = jax.grad(loss)(part)
        part = {p: part[p] - 0.1 * grads[p] for p in part}
    assert all(np.abs(g).max() > 0 for g in grads.values())


def test_two_zero_inner_matrices_would_never_learn():
    """Why this departs from the authors' initialization."""
    _, (model, values) = adapted(LoRAMini())
    part = {p: jnp.zeros_like(v) for p, v in values.items() if re.fullmatch(lora_mini.TRAINED, p)}
    grads = jax.grad(lambda part: (logits(model, values | part) ** 2).mean())(part)
    assert all(np.abs(g).max() == 0 for g in grads.values())


def test_twenty_times_fewer_parameters_than_lora():
    def count(surgery, at):
        _, (model, _) = adapted(surgery, width=64)
        return sum(int(np.prod(s)) for s in trained(train_only(at), model).values())

    mini = count(LoRAMini(rank=4, inner=3), lora_mini.TRAINED)
    plain = count(LoRA(rank=4), lora.TRAINED)
    assert mini == 4 * lora_mini.trained_parameters(4, 3)  # q and v of two layers
    assert plain == 4 * lora.trained_parameters(64, 64, 4)
    assert plain / mini == (64 + 64) / (3 + 3) > 20
    wide = lora.trained_parameters(768, 768, 8) / lora_mini.trained_parameters(8, 32)
    assert wide == 24


@pytest.mark.parametrize(
    ("surgery", "at"), [(LoRA(), lora.TRAINED), (LoRAMini(inner=9), lora_mini.TRAINED)]
)
def test_merge_is_exact(surgery, at):
    before, (model, values) = adapted(surgery)
    values = disturbed(values, at)
    plain, merged = operate(Merge(), model, values)
    assert sorted(merged) == sorted(before[1])
    changed = [p for p in merged if not np.array_equal(merged[p], before[1][p])]
    assert sorted(changed) == [f"blocks/{i}/mixer/{n}/kernel" for i in (0, 1) for n in "qv"]
    with jax.enable_x64(True):
        wide = {p: jnp.asarray(np.asarray(v), jnp.float64) for p, v in values.items()}
        plain, merged = operate(Merge(), model, wide)
        expected, start = logits(model, wide), logits(*before)
        assert np.abs(expected - start).max() > 0.1
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16)))
        for name in ("q", "v"):
            one = getattr(bind(model, wide).blocks.blocks[0].mixer, name)(x, Context())
            other = getattr(bind(plain, merged).blocks.blocks[0].mixer, name)(x, Context())
            # Exact but for the last bits of float64: the sums are in another order.
            np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)


def test_adapters_stack_and_merge():
    """LoRA around (IA)^3 around a dense layer folds in the order in which they were applied."""
    model = decoder()
    model, values = operate(IA3(), model, init(model, KEY))
    model, values = operate(LoRA(at=r".*/mixer/(k|v)"), model, values)
    values = disturbed(values, r".*/(lora_(a|b)|ia3)|.*bias")
    assert "blocks/0/mixer/k/base/base/kernel" in values
    plain, merged = operate(Merge(), model, values)
    assert isinstance(plain.blocks.blocks[0].mixer.k, Dense)
    np.testing.assert_allclose(logits(plain, merged), logits(model, values), rtol=1e-4, atol=1e-4)


def test_bad_input():
    with pytest.raises(UserError, match=r"'.\*/nothing' matches nothing"):
        LoRAMini(at=".*/nothing").apply(decoder())
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="matches no adapter"):
        Merge().apply(decoder())
    ternary = decoder(rules=[{"at": r".*/mixer/.*", "use": "bitlinear"}])
    LoRA().apply(ternary)
    with pytest.raises(UserError, match="wraps a BitLinear"):
        Merge().apply(ternary)


def test_config_adapts_after_pretraining():
    config = lora_mini_config.get_config("smoke")
    first, second = config.phases
    assert not first["surgery"] and second["surgery"][0]["name"] == "lora_mini"
    assert second["parameters"] == train_only(lora_mini.TRAINED)
    assert lora_mini_config.get_config("smoke,lora").phases[1]["surgery"][0]["name"] == "lora"
