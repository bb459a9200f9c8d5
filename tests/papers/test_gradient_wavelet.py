"""Adam on wavelet coefficients against a loop in float64 over an explicit Haar matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import gradient_wavelet as config
from efficient import registry
from efficient.errors import UserError
from efficient.optimizers.gradient_wavelet import haar, inverse_haar

UP = "blocks/0-1/channel/up/kernel"
SHAPES = {"embed/table": (8, 4), UP: (2, 12, 6), "blocks/2/mixer/q/kernel": (7, 5), "n/scale": (4,)}
STEPS = 4


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def decay_mask(params):
    return {path: "scale" not in path for path in params}


def build(learning_rate=0.02, **arguments):
    return registry.find("gwt_adam", "optimizer").build(learning_rate, decay_mask, **arguments)


def train(grads, transform):
    params, state, update = draw(0), transform.init(draw(0)), jax.jit(transform.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return {path: np.asarray(value) for path, value in params.items()}, state


def haar_matrix(length, level):
    """Rows of the transform of a zero-padded vector, coarse first, and the lengths of its parts.

    Built from the wavelets' definition: each row is constant on halves of an interval.
    """
    padded = length + -length % 2**level
    rows, ancestors, kept = [], [], []
    coarse = padded // 2**level
    for i in range(coarse):
        row = np.zeros(padded)
        row[i * 2**level : (i + 1) * 2**level] = 2 ** (-level / 2)
        rows.append(row), ancestors.append(i), kept.append(True)
    for k in range(level, 0, -1):
        for i in range(padded // 2**k):
            row, start = np.zeros(padded), i * 2**k
            row[start : start + 2 ** (k - 1)] = 2 ** (-k / 2)
            row[start + 2 ** (k - 1) : start + 2**k] = -(2 ** (-k / 2))
            rows.append(row), ancestors.append(i // 2 ** (level - k))
            kept.append(start < length)
    kept = np.array(kept)
    return np.stack(rows)[kept][:, :length], np.array(ancestors)[kept], coarse


def reference(x, grads, level, scale, growth, decay, eps=1e-6):
    """One layer in the authors' form: uncorrected moments, the correction in the step's size."""
    h, ancestors, coarse = haar_matrix(x.shape[0], level)
    m = v = np.zeros((coarse, x.shape[1]))
    last = None
    for t, g in enumerate(grads, start=1):
        w = h @ g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * w[:coarse], 0.99 * v + 0.01 * w[:coarse] ** 2
        correction = np.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        root = np.sqrt(v) + eps * np.sqrt(1 - 0.99**t)
        norm = np.linalg.norm(m / root)
        limit = max(norm / (last + 1e-8), growth) / growth if growth and last is not None else 1.0
        last = norm / limit
        normalized = np.concatenate([m, w[coarse:]]) / root[ancestors]
        x = x - 0.02 * (scale * correction / limit * (h.T @ normalized) + decay * x)
    return x


def adam(x, grads, decay):
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
        x = x - 0.02 * (u + decay * x)
    return x


@pytest.mark.parametrize(
    ("length", "level"), [(12, 2), (7, 1), (7, 2), (5, 3), (6, 0)], ids=lambda value: str(value)
)
def test_haar_is_the_matrix_and_is_inverted(length, level):
    x = np.random.default_rng(1).normal(size=(length, 3)).astype(np.float32)
    a, details = haar(jnp.asarray(x), level)
    h, _, coarse = haar_matrix(length, level)
    wanted = h @ x.astype(np.float64)
    assert a.shape[0] == coarse == -(-length // 2**level)
    np.testing.assert_allclose(np.concatenate([a, *details]), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inverse_haar(a, details, length), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"level": 2, "scale": 0.25}, {"level": 3, "scale": 2.0, "growth": None}],
    ids=str,
)
def test_against_the_equations(arguments):
    # Gradients of the first layer grow, so that its limiter acts and the other layer's does not.
    grads = [draw(i + 1) for i in range(STEPS)]
    for i, g in enumerate(grads):
        g[UP][0] *= 3.0**i
    got, _ = train(grads, build(b2=0.99, weight_decay=0.1, **arguments))
    rules = {"scale": 0.25, "growth": 1.01, **arguments}
    start = draw(0)
    for path, x in start.items():
        layers = [np.s_[0], np.s_[1]] if path == UP else [np.s_[...]]
        for at in layers:
            of_layer = [g[path][at] for g in grads]
            layer, decay = x[at].astype(np.float64), 0.1 * ("scale" not in path)
            if "blocks" in path:
                wanted = reference(layer, of_layer, decay=decay, **rules)
            else:
                wanted = adam(layer, of_layer, decay)
            np.testing.assert_allclose(got[path][at], wanted, rtol=3e-5, atol=3e-6, err_msg=path)


def test_level_0_is_adam_bit_for_bit():
    grads = [draw(i + 1) for i in range(STEPS)]
    ours, _ = train(grads, build(level=0, scale=1.0, growth=None, weight_decay=0.1))
    theirs, _ = train(grads, optax.adamw(0.02, eps=1e-6, weight_decay=0.1, mask=decay_mask))
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_state_shrinks_by_two_to_the_level():
    shapes = {UP: (2, 64, 16), "blocks/2/mixer/q/kernel": (32, 32)}
    params = draw(0, shapes)
    numbers = sum(x.size for x in params.values())
    adam_state = optax.scale_by_adam().init(params)
    assert sum(x.size for x in jax.tree.leaves((adam_state.mu, adam_state.nu))) == 2 * numbers
    for level in range(5):
        state = build(level=level).init(params)[0]
        assert sum(x.size for x in jax.tree.leaves((state.mu, state.nu))) == 2 * numbers // 2**level
        assert sum(x.size for x in jax.tree.leaves(state.norm)) == 3  # one a layer


def test_updates_have_full_rank():
    """Even where the moments' rank is at most 2: two coefficients of eight rows."""
    path, shape = "mixer/q/kernel", (8, 8)
    params, grads = draw(0, {path: shape}), draw(1, {path: shape})
    transform = build(level=2)
    updates, state = jax.jit(transform.update)(grads, transform.init(params), params)
    assert state[0].mu[path].shape == (2, 8)
    assert np.linalg.matrix_rank(updates[path]) == 8


def test_the_limiter_bounds_growth():
    """Of a constant gradient, m / (sqrt(v) + eps) grows by `growth` a step, not by the momentum's
    own growth; without details the layer moves by that times the bias correction."""
    params = {UP: draw(0)[UP]}
    grad = {UP: np.broadcast_to(np.float32([2.0, -3.0])[:, None, None], (2, 12, 6))}

    def moved(growth):
        transform = build(growth=growth)
        state, update, norms = transform.init(params), jax.jit(transform.update), []
        for _ in range(4):
            step, state = update(grad, state, params)
            norms.append(np.linalg.norm(step[UP], axis=(1, 2)))
        return np.array(norms)

    t = np.arange(1, 5)[:, None]
    correction = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    free, limited = moved(None), moved(1.01)
    np.testing.assert_allclose(free, np.broadcast_to(free[0], free.shape), rtol=1e-4)
    np.testing.assert_allclose(free[0], 0.02 * 0.25 * np.sqrt(12 * 6 / 2**2), rtol=1e-4)
    wanted = free[0] * 1.01 ** (t - 1) * correction / correction[0]
    np.testing.assert_allclose(limited, wanted, rtol=1e-4)


def test_zero_gradients_and_tiny_ones_stay_finite():
    zeros = {path: np.zeros_like(x) for path, x in draw(0).items()}
    tiny = {path: np.float32(1e-18) * x for path, x in draw(1).items()}
    transform = build()
    for grads in ([zeros, zeros], [zeros, draw(1)], [tiny, draw(1)]):
        final, _ = train(grads, transform)
        assert all(np.isfinite(x).all() for x in final.values())
    still, _ = train([zeros], transform)
    np.testing.assert_array_equal(still[UP], draw(0)[UP])


def test_bad_input():
    with pytest.raises(UserError, match="matches no trained matrix"):
        build(at="nothing").init(draw(0))
    with pytest.raises(UserError, match="level=-1"):
        build(level=-1)
    with pytest.raises(UserError, match="growth=0.5"):
        build(growth=0.5)


def test_config_names_the_optimizer():
    optimizer = config.get_config("smoke,level=1").phases[0]["optimizer"]
    assert optimizer["name"] == "gwt_adam" and optimizer["level"] == 1
    assert config.get_config("smoke,adamw").phases[0]["optimizer"]["name"] == "adamw"
