"""Token-parameter attention: its equation, growth that keeps the function, what new pairs learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tokenformer as tokenformer_config
from efficient.channels.tokenformer import TokenFormer
from efficient.errors import UserError
from efficient.linears.pattention import Pattention, token_weights
from efficient.model import bind, init, walk
from efficient.scope import Context, Rules, Scope
from efficient.surgery.common import carry
from efficient.surgery.grow_tokens import GrowTokens
from efficient.surgery.lora import LoRA
from models.decoder import Decoder

KEY = jax.random.key(0)
BATCH = {"tokens": jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])}


def theta(x, keys, scale_tokens):
    """The normalized, activated scores in float64, one number at a time."""
    out = np.zeros((len(x), len(keys)))
    for i, row in enumerate(x):
        scores = [float(sum(a * b for a, b in zip(row, key, strict=True))) for key in keys]
        norm = math.sqrt(sum(s * s for s in scores))
        for j, s in enumerate(scores):
            z = s / norm * math.sqrt(scale_tokens)
            out[i, j] = z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return out


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("scale_tokens", [7, 3])
def test_against_the_equation(scale_tokens):
    x, keys, values = draw(5, 4), draw(7, 4, seed=1), draw(7, 6, seed=2)
    module = Pattention(Scope(Rules(), "q"), 4, 6, False, tokens=scale_tokens)
    module.grow(7)
    bound = bind(module, {"keys": jnp.asarray(keys), "values": jnp.asarray(values)})
    wanted = theta(x, keys, scale_tokens) @ values.astype(np.float64)
    got = bound(jnp.asarray(x), Context())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert module.flops() == 2 * 7 * (4 + 6)
    # The scale of tokens and of keys is taken out by the norm.
    scaled = bind(module, {"keys": jnp.asarray(100 * keys), "values": jnp.asarray(values)})
    np.testing.assert_allclose(scaled(jnp.asarray(0.01 * x), Context()), got, rtol=1e-4, atol=1e-5)


def decoder():
    rules = [
        {"at": r".*/mixer", "use": "attention", "heads": 2},
        {"at": r".*/mixer/(q|k|v|out)", "use": "pattention"},
        {"at": r".*/channel", "use": "tokenformer"},
    ]
    return Decoder(Scope(Rules(rules)), vocab_size=11, width=8, depth=2, max_length=8)


@pytest.fixture(scope="module")
def grown():
    """A model with keys of size 1, and the same grown by half."""
    model = decoder()
    values = {p: 50 * v if p.endswith("keys") else v for p, v in init(model, KEY).items()}
    after, surgery = nnx.clone(model), GrowTokens(factor=1.5)
    surgery.apply(after)
    return (model, values), (after, surgery.convert(values, after, KEY))


def loss(model, values):
    return jnp.mean(bind(model, values)(BATCH, Context()) ** 2)


def test_every_projection_is_tokenized():
    model = decoder()
    shapes = {p: v.shape for p, v in walk(model)}
    for name in ("q", "k", "v", "out"):
        assert shapes[f"blocks/1/mixer/{name}/keys"] == (8, 8)
        assert shapes[f"blocks/1/mixer/{name}/values"] == (8, 8)
    assert shapes["blocks/0/channel/attend/keys"] == (32, 8)
    assert shapes["blocks/0/channel/attend/values"] == (32, 8)
    assert not any("kernel" in path and "blocks" in path for path in shapes)


def test_growth_keeps_the_function(grown):
    """In float64, to its last bits: only the order of sums may change."""
    (before, old), (after, new) = grown
    assert new["blocks/0/channel/attend/keys"].shape == (48, 8)
    assert not np.any(new["blocks/0/mixer/q/keys"][8:])
    assert np.all(np.std(new["blocks/0/mixer/q/values"][8:], axis=1) > 0.05)
    for path, array in old.items():
        np.testing.assert_array_equal(new[path][: len(array)], array, err_msg=path)
    with jax.enable_x64(True):
        old, new = (
            {p: jnp.asarray(np.asarray(v), jnp.float64) for p, v in arrays.items()}
            for arrays in (old, new)
        )
        wanted = bind(before, old)(BATCH, Context())
        got = bind(after, new)(BATCH, Context())
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)
        assert np.std(wanted) > 0.03
    # With the present number of tokens in the scale the weights would differ.
    x, keys = jnp.asarray(draw(3, 4)), jnp.asarray(np.pad(draw(6, 4, seed=1), ((0, 3), (0, 0))))
    held, present = token_weights(x, keys, 6), token_weights(x, keys, 9)
    np.testing.assert_allclose(held[:, :6], token_weights(x, keys[:6], 6), rtol=1e-6)
    assert np.abs(present - held).max() > 0.1


def test_values_that_are_appended_are_fresh(grown):
    """No row of the appended values is one of the first draw."""
    _, (after, new) = grown
    values = np.asarray(new["blocks/0/channel/attend/values"])
    gaps = np.abs(values[:, None] - values[None]).max(axis=-1) + np.eye(len(values))
    assert gaps.min() > 1e-3
    again, surgery = nnx.clone(after), GrowTokens(factor=1.5)
    surgery.apply(again)
    third = np.asarray(surgery.convert(new, again, KEY)["blocks/0/channel/attend/values"])
    gaps = np.abs(third[:, None] - third[None]).max(axis=-1) + np.eye(len(third))
    assert third.shape == (72, 8) and gaps.min() > 1e-3


def test_new_pairs_are_trained(grown):
    """New keys have a gradient at once, new values once the keys have moved."""
    _, (after, new) = grown
    slope = jax.jit(jax.grad(lambda values: loss(after, values)))
    grads = slope(new)
    # Where there is no second token, v alone passes attention; out and the channel always do.
    for path in ("blocks/0/mixer/v", "blocks/1/mixer/out", "blocks/0/mixer/q"):
        assert np.all(np.abs(grads[f"{path}/keys"][8:]).max(axis=1) > 0), path
        assert not np.any(grads[f"{path}/values"][8:])
    moved = {p: v - 0.1 * grads[p] for p, v in new.items()}
    assert np.all(np.abs(slope(moved)["blocks/0/mixer/v/values"][8:]).max(axis=1) > 0)
    # The gradient of a key of zeros is half of sqrt(n) / ||s|| (dy . v) x.
    x, keys, values = draw(1, 4), np.pad(draw(6, 4, seed=1), ((0, 2), (0, 0))), draw(8, 5, seed=2)
    dy = draw(1, 5, seed=3)
    got = jax.grad(lambda k: jnp.sum(token_weights(jnp.asarray(x), k, 6) @ values * dy))(keys)
    norm = np.linalg.norm(x.astype(np.float64) @ keys.T)
    wanted = 0.5 * math.sqrt(6) / norm * (dy @ values[6:].T).T * x
    np.testing.assert_allclose(got[6:], wanted, rtol=1e-5, atol=1e-6)


def test_values_of_zero_would_never_learn(grown):
    """Why only the keys start at zero."""
    _, (after, new) = grown
    zero = {p: v.at[8:].set(0) if p.endswith("v/values") else v for p, v in new.items()}
    grads = jax.jit(jax.grad(lambda values: loss(after, values)))(zero)
    for name in ("keys", "values"):
        assert not np.any(grads[f"blocks/0/mixer/v/{name}"][8:])


def test_bad_input():
    with pytest.raises(UserError, match="tokens=0"):
        Pattention(Scope(Rules(), "q"), 4, 6, False, tokens=0)
    with pytest.raises(UserError, match="tokens=0 must be at least 1"):
        TokenFormer(Scope(Rules(), "channel"), 4, tokens=0)
    for factor in (1, 0.5, math.nan, math.inf):
        with pytest.raises(UserError, match=f"factor={factor} must be a number above 1"):
            GrowTokens(factor=factor)
    with pytest.raises(UserError, match="matches nothing"):
        GrowTokens(at="embed").apply(decoder())
    with pytest.raises(UserError, match="matches nothing"):
        LoRA().apply(decoder())  # it is no matrix


def test_only_what_matches_grows():
    model, surgery = decoder(), GrowTokens(at=r".*/channel/.*", factor=2)
    values = init(model, KEY)
    surgery.apply(model)
    new = surgery.convert(values, model, KEY)
    assert {p: v.shape for p, v in new.items()} == {p: v.shape for p, v in walk(model)}
    assert new["blocks/0/channel/attend/keys"].shape == (64, 8)
    assert new["blocks/0/mixer/q/keys"].shape == (8, 8)
    untouched = carry(values, decoder(), KEY)
    np.testing.assert_array_equal(new["blocks/0/mixer/q/keys"], untouched["blocks/0/mixer/q/keys"])


def test_config_grows_in_mid_training():
    first, second = tokenformer_config.get_config("smoke").phases
    assert not first["surgery"] and second["surgery"] == [{"name": "grow_tokens", "factor": 2}]
    config = tokenformer_config.get_config("smoke,scratch")
    assert len(config.phases) == 1 and config.rules[0]["tokens"] == 2 * config.model["width"]
