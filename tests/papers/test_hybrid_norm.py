"""HybridNorm: the block against NumPy in float64, where the norms sit, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.scope import Context, Rules, Scope

B, T, D, HEADS, KV = 2, 5, 8, 4, 2
ATTENTION = {"at": r".*/mixer", "use": "attention", "heads": HEADS, "kv_heads": KV}


def block(pre_norm=False, rules=(ATTENTION,), wiring="hybrid_norm", width=D, causal=True):
    scope = Scope(Rules(list(rules)), "blocks/0", grid=None if causal else (4, 4))
    arguments = {"pre_norm": pre_norm} if wiring == "hybrid_norm" else {}
    filled = Rules([{"at": "w", "use": wiring, **arguments}]).rules[0]
    return filled.technique.build(scope, width, causal, **arguments)


def draw(module, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    shapes = model_lib.abstract(module)
    return {p: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype) for p, s in shapes.items()}


def inputs(seed=1, scale=1.0, length=T):
    x = scale * np.random.default_rng(seed).normal(size=(B, length, D))
    return jnp.asarray(x, jnp.float32)


def run(module, values, x):
    return model_lib.bind(module, values)(x, Context())[0]


def numpy_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def numpy_qkv_attention(x, v):
    """Causal attention, head by head and query by query, with norms after the projections."""
    size = D // HEADS
    out = np.zeros_like(x)
    for n in range(HEADS):
        shared = n // (HEADS // KV)
        own, kv = slice(n * size, (n + 1) * size), slice(shared * size, (shared + 1) * size)
        q = numpy_norm(x @ v["mixer/q/kernel"][:, own], v["mixer/q_norm/scale"])
        k = numpy_norm(x @ v["mixer/k/kernel"][:, kv], v["mixer/k_norm/scale"])
        u = numpy_norm(x @ v["mixer/v/kernel"][:, kv], v["mixer/v_norm/scale"])
        for t in range(x.shape[1]):
            logits = np.einsum("bh,bsh->bs", q[:, t], k[:, : t + 1]) / np.sqrt(size)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, t, own] = np.einsum("bs,bsh->bh", weights, u[:, : t + 1])
    return out @ v["mixer/out/kernel"]


def numpy_mlp(x, v):
    hidden = x @ v["channel/up/kernel"]
    inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    return (0.5 * hidden * (1 + np.tanh(inner))) @ v["channel/down/kernel"]


def numpy_block(x, values, pre_norm):
    v = {p: np.asarray(a, np.float64) for p, a in values.items()}
    x = np.asarray(x, np.float64)
    if pre_norm:
        y = x + numpy_qkv_attention(numpy_norm(x, v["mixer_norm/scale"]), v)
        return y + numpy_mlp(numpy_norm(y, v["channel_norm/scale"]), v)
    h = numpy_norm(x + numpy_qkv_attention(x, v), v["channel_norm/scale"])
    return h + numpy_mlp(h, v)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_block_equals_numpy(pre_norm):
    module = block(pre_norm)
    values, x = draw(module), inputs()
    expected = numpy_block(x, values, pre_norm)
    np.testing.assert_allclose(run(module, values, x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pre_norm", [False, True])
def test_gradient_equals_finite_differences_of_numpy(pre_norm):
    module = block(pre_norm)
    values, x = draw(module), inputs()
    weights = np.random.default_rng(7).normal(size=x.shape)
    grads = jax.grad(lambda v: jnp.sum(run(module, v, x) * weights))(values)
    rng = np.random.default_rng(8)
    for path, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = {p: np.asarray(a, np.float64) for p, a in values.items()}
            moved[path] = moved[path] + step * direction
            sides.append(np.sum(numpy_block(x, moved, pre_norm) * weights))
        expected = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(np.sum(grad * direction), expected, rtol=1e-3, atol=1e-3)


def test_slots_are_rms_norms_of_one_head_and_there_is_no_pre_norm():
    shapes = {p: s.shape for p, s in model_lib.abstract(block()).items()}
    for name in ("q_norm", "k_norm", "v_norm"):
        assert shapes[f"mixer/{name}/scale"] == (D // HEADS,)
    assert "mixer_norm/scale" not in shapes and shapes["channel_norm/scale"] == (D,)
    assert "mixer_norm/scale" in model_lib.abstract(block(pre_norm=True))


def test_output_is_the_normalised_stream_where_the_ffn_is_zero():
    module = block()
    values = draw(module) | {"channel/down/kernel": jnp.zeros((4 * D, D))}
    values["channel_norm/scale"] = jnp.ones(D)
    for scale in (1e-2, 1.0, 1e3):
        y = run(module, values, inputs(scale=scale))
        np.testing.assert_allclose(np.mean(np.square(y), axis=-1), 1.0, rtol=2e-2)


@pytest.mark.parametrize("scale", [1e-3, 10.0, 1e4])
def test_mixer_does_not_feel_the_scale_of_its_projections(scale):
    """The point of normalising q, k and v: weights that grow change nothing."""
    module = block()
    values, x = draw(module), inputs()
    grown = dict(values)
    for name in "qkv":
        grown[f"mixer/{name}/kernel"] = 1e3 * scale * values[f"mixer/{name}/kernel"]
    base = {
        p: 1e3 * a if p.endswith(("q/kernel", "k/kernel", "v/kernel")) else a
        for p, a in values.items()
    }
    np.testing.assert_allclose(run(module, grown, x), run(module, base, x), rtol=1e-3, atol=1e-3)


def test_decoding_one_token_at_a_time_gives_the_same():
    module = block()
    values, x = draw(module), inputs()
    bound = model_lib.bind(module, values)
    state = bound.init_state(B, T, jnp.float32)
    step = jax.jit(lambda x, s: model_lib.bind(module, values).step(x, s, Context()))
    out = []
    for t in range(T):
        y, state = step(x[:, t : t + 1], state)
        out.append(y)
    expected = run(module, values, x)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), expected, rtol=1e-4, atol=1e-5)


def gradient_norms(wiring, depth=12, width=32):
    """The norm of the loss's gradient at the input of each block, at initialization."""
    rules = [{"at": r".*/mixer", "use": "attention", "heads": 4}]
    module = block(rules=rules, wiring=wiring, width=width)
    layers = [model_lib.init(module, jax.random.key(i)) for i in range(depth)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = jax.random.normal(jax.random.key(99), (4, 16, width))
    target = jax.random.normal(jax.random.key(98), x.shape)

    def loss(offsets):
        def one(x, layer):
            values, offset = layer
            return run(module, values, x + offset), None

        y, _ = jax.lax.scan(one, x, (stacked, offsets))
        y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True))  # the model's final norm
        return jnp.mean((y - target) ** 2)

    grads = jax.jit(jax.grad(loss))(jnp.zeros((depth, *x.shape)))
    return np.sqrt(np.sum(np.square(grads), axis=(1, 2, 3)))


@pytest.mark.slow
def test_gradients_are_more_even_over_depth_than_with_pre_norm():
    hybrid, pre = gradient_norms("hybrid_norm"), gradient_norms("pre_norm")
    assert np.isfinite(hybrid).all() and hybrid.min() > 0
    assert 1.5 * hybrid.max() / hybrid.min() < pre.max() / pre.min()


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_zero_and_large_inputs(scale):
    module = block()
    values, x = draw(module), inputs(scale=scale)
    value, grads = jax.value_and_grad(lambda v: jnp.sum(run(module, v, x)))(values)
    assert np.isfinite(value) and all(bool(jnp.isfinite(g).all()) for g in grads.values())


def test_a_mixer_without_the_slots_is_refused():
    with pytest.raises(UserError, match="no q_norm or k_norm or v_norm slot"):
        block(rules=[{"at": ".*/mixer", "use": "pool"}], causal=False)


def test_a_rule_of_the_config_chooses_the_norm():
    rules = [ATTENTION, {"at": ".*/mixer/._norm", "use": "layer_norm"}]
    shapes = model_lib.abstract(block(rules=rules))
    assert "mixer/v_norm/bias" in shapes
