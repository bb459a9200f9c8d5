"""Sparse spectral training: gradients, one optimizer against the equations, draws, memory, rank."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import sparse_spectral as spectral_config
from efficient import model as model_lib
from efficient import registry
from efficient.errors import UserError
from efficient.linears.sparse_spectral import SparseSpectral
from efficient.linears.spectral import SingularValues, gaussian_singular_values
from efficient.optimizers.sst_adam import draw_columns, layer_keys
from efficient.scope import Context, Rules, Scope

UP, Q = "blocks/0-1/channel/up", "blocks/2/mixer/q"
SIZES = {UP: (9, 6), Q: (5, 8)}  # inputs, outputs
INTERVAL, RANK, RATE, DECAY = 3, 2, 0.02, 0.1


def layer(in_features, out_features, bias=False, **arguments):
    return SparseSpectral(Scope(Rules(), "q"), in_features, out_features, bias, **arguments)


def draw(seed):
    """Layers of orthonormal U and V, two of them stacked, and two arrays of another kind."""
    rng = np.random.default_rng(seed)
    arrays = {"norm/scale": rng.normal(size=4), "embed/table": rng.normal(size=(3, 2))}
    for path, (rows, columns) in SIZES.items():
        stack = (2,) if path == UP else ()
        parts = np.linalg.svd(rng.normal(size=(*stack, rows, columns)), full_matrices=False)
        arrays |= {f"{path}/u": parts[0], f"{path}/s": parts[1]}
        arrays[f"{path}/v"] = np.swapaxes(parts[2], -1, -2)
    return {path: np.asarray(a, np.float32) for path, a in arrays.items()}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=a.shape).astype(np.float32) for p, a in draw(0).items()}


def decay_mask(params):
    return {path: "scale" not in path for path in params}


def build(learning_rate=RATE, **arguments):
    rules = {"rank": RANK, "interval": INTERVAL, "warmup": 2, "weight_decay": DECAY, "b2": 0.99}
    rules |= arguments
    return registry.find("sst_adam", "optimizer").build(learning_rate, decay_mask, **rules)


@functools.cache
def jitted():
    transform = build()
    return transform.init, jax.jit(transform.update)


def train(grads, params, state=None):
    """(parameters, state) after each step, as NumPy arrays."""
    init, update = jitted()
    state, seen = init(params) if state is None else state, []
    for g in grads:
        updates, state = update(g, state, params)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
        seen.append((params, jax.tree.map(np.asarray, state)))
    return seen


def unstacked(arrays):
    """Stacked layers under paths of their own."""
    out = {p: a for p, a in arrays.items() if not p.startswith(UP)}
    for path in set(arrays) - set(out):
        out |= {path.replace("0-1", str(i)): arrays[path][i] for i in range(2)}
    return out


def columns_of(state, path):
    """The columns of one layer, stacked or not."""
    if path in state.layers:
        return state.layers[path].columns
    return state.layers[UP].columns[int(path.split("/")[1])]


def matrix(arrays, path):
    u, s, v = (np.float64(arrays[f"{path}/{n}"]) for n in "usv")
    return (u * s) @ v.T


@pytest.mark.parametrize("shape", [(400, 400), (300, 600), (512, 128)])
def test_singular_values_are_those_of_a_gaussian_matrix(shape):
    drawn = np.linalg.svd(np.random.default_rng(0).normal(size=shape), compute_uv=False)
    values = gaussian_singular_values(*shape)
    assert values.shape == drawn.shape and (np.diff(values) < 0).all()
    np.testing.assert_allclose(values, drawn, atol=0.02 * drawn[0])
    np.testing.assert_allclose(np.sum(values**2), shape[0] * shape[1], rtol=2e-3)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_initial_matrix_is_gaussian(shape):
    module = layer(*shape)
    values = model_lib.init(module, jax.random.key(0))
    for name in "uv":
        basis = np.float64(values[name])
        np.testing.assert_allclose(basis.T @ basis, np.eye(64), atol=1e-5)
    w = np.asarray(model_lib.bind(module, values).materialize(), np.float64)
    np.testing.assert_allclose(w.var(), 1 / shape[0], rtol=0.01)
    np.testing.assert_allclose((w**4).mean() / w.var() ** 2, 3.0, rtol=0.1)
    other = model_lib.init(module, jax.random.key(1))
    assert np.abs(other["u"] - values["u"]).max() > 0.1


@pytest.mark.parametrize("enhanced", [True, False])
def test_value_and_gradients(enhanced):
    """G v_i and G^T u_i, times s_i unless enhanced; u_i^T G v_i; dx through W as it is."""
    module = layer(7, 5, bias=True, enhanced=enhanced)
    rng = np.random.default_rng(0)
    values = {p: rng.normal(size=v.shape).astype(np.float32) for p, v in model_lib.walk(module)}
    values["s"][1] = 0.0
    x, weight = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 5))

    def loss(values, x):
        y = model_lib.bind(module, values)(x, Context())
        return jnp.sum(y * weight), y

    grads = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (got, dx), y = grads(values, jnp.asarray(x, jnp.float32))
    wide = {p: a.astype(np.float64) for p, a in values.items()}
    w = (wide["u"] * wide["s"]) @ wide["v"].T
    g = np.einsum("bti,bto->io", x, weight)
    np.testing.assert_allclose(y, x @ w + wide["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, weight @ w.T, rtol=1e-4, atol=1e-5)
    scale = 1.0 if enhanced else wide["s"]
    np.testing.assert_allclose(got["u"], g @ wide["v"] * scale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["v"], g.T @ wide["u"] * scale, rtol=1e-4, atol=1e-4)
    diagonal = np.einsum("im,io,om->m", wide["u"], g, wide["v"])
    np.testing.assert_allclose(got["s"], diagonal, rtol=1e-4, atol=1e-4)


def test_projection_keeps_the_matrix():
    w = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    parts = SparseSpectral.project(jnp.asarray(w))
    np.testing.assert_allclose(model_lib.bind(layer(6, 9), parts).materialize(), w, atol=1e-5)


def test_against_the_equations():
    """Ten steps in float64: rounds of 9 and 12 steps, so one layer is decomposed and one is not."""
    grads = [gradients(i + 1) for i in range(10)]
    seen = train(grads, draw(0))
    grads = [unstacked(g) for g in grads]
    paths = [UP.replace("0-1", "0"), UP.replace("0-1", "1"), Q]
    moments = {}

    def adam(name, g, steps):
        m, v = moments.get(name, (0.0, 0.0))
        m, v = moments[name] = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        return (m / (1 - 0.9**steps)) / (np.sqrt(v / (1 - 0.99**steps)) + 1e-8)

    now = {p: np.float64(a) for p, a in unstacked(draw(0)).items()}
    for t, (params, state) in enumerate(seen):
        after, age = unstacked(params), t % INTERVAL
        for path in paths:
            at, g = columns_of(state, path), {n: np.float64(grads[t][f"{path}/{n}"]) for n in "usv"}
            period = INTERVAL * -(-len(now[f"{path}/s"]) // RANK)
            if age == 0:
                moments[f"{path}/u"] = moments[f"{path}/v"] = (0.0, 0.0)
            if t % period == 0:
                moments[f"{path}/s"] = (0.0, 0.0)
            warm = min(1.0, (age + 1) / 2)
            for n in "uv":
                x = now[f"{path}/{n}"]
                x[:, at] -= RATE * warm * adam(f"{path}/{n}", g[n][:, at], age + 1)
                x[:, at] /= np.linalg.norm(x[:, at], axis=0)
            s = now[f"{path}/s"]
            s = s - RATE * (adam(f"{path}/s", g["s"], t % period + 1) + DECAY * s)
            now[f"{path}/s"] = np.maximum(s, 0)
            if (t + 1) % period:
                for n in "usv":
                    want = now[f"{path}/{n}"]
                    np.testing.assert_allclose(after[f"{path}/{n}"], want, rtol=1e-4, atol=1e-5)
                continue
            np.testing.assert_allclose(matrix(after, path), matrix(now, path), atol=1e-5)
            now |= {f"{path}/{n}": np.float64(after[f"{path}/{n}"]) for n in "usv"}
            assert (np.diff(now[f"{path}/s"]) <= 0).all()
            for n in "uv":
                basis = now[f"{path}/{n}"]
                np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
        for path in ("norm/scale", "embed/table"):
            step = adam(path, np.float64(grads[t][path]), t + 1)
            now[path] = now[path] - RATE * (step + DECAY * now[path] * (path != "norm/scale"))
            np.testing.assert_allclose(after[path], now[path], rtol=1e-4, atol=1e-5)


def test_singular_values_do_not_become_negative():
    params = {p: 0.01 * a if p.endswith("/s") else a for p, a in draw(0).items()}
    grads = {p: np.ones_like(a) if p.endswith("/s") else 0 * a for p, a in params.items()}
    final = train([grads] * 3, params)[-1][0]
    assert all((final[f"{p}/s"] == 0).any() and (final[f"{p}/s"] >= 0).all() for p in SIZES)
    assert all(np.isfinite(a).all() for a in final.values())


def test_decomposition_keeps_the_function():
    """Columns that are not orthogonal become so; without gradients W only decays."""
    params = draw(0)
    for path in params:
        if path.endswith(("/u", "/v")):
            x = params[path] + 0.1
            params[path] = x / np.linalg.norm(x, axis=-2, keepdims=True)
    zeros = {p: np.zeros_like(a) for p, a in params.items()}
    seen = [unstacked(p) for p, _ in train([zeros] * 9, params)]
    before, after = seen[7], seen[8]  # three iterations of two columns for five
    assert np.abs(before[f"{Q}/u"].T @ before[f"{Q}/u"] - np.eye(5)).max() > 0.05
    np.testing.assert_allclose(after[f"{Q}/u"].T @ after[f"{Q}/u"], np.eye(5), atol=1e-5)
    np.testing.assert_allclose(after[f"{Q}/v"].T @ after[f"{Q}/v"], np.eye(5), atol=1e-5)
    wanted = (1 - RATE * DECAY) * matrix(before, Q)
    np.testing.assert_allclose(matrix(after, Q), wanted, atol=1e-5 * np.abs(wanted).max())


def inclusion(p, rank):
    """The probability that each item is among `rank` draws without replacement, by enumeration."""
    total = np.zeros(len(p))
    for order in itertools.permutations(range(len(p)), rank):
        chance, left = 1.0, 1.0
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        total[list(order)] += chance
    return total


@pytest.mark.parametrize("rank", [1, 2])
def test_columns_are_drawn_by_their_singular_values(rank):
    s, count = np.array([4.0, 2.0, 1.0, 0.5, 0.0], np.float32), 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(jax.vmap(lambda key: draw_columns(key, jnp.asarray(s), rank))(keys))
    assert all(len(set(row)) == rank for row in drawn[:100].tolist())
    share = np.bincount(drawn.ravel(), minlength=5) / count
    wanted = inclusion((1 / 5 + s / s.sum()) / 2, rank)
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(share, wanted, atol=5 * np.sqrt(0.25 / count))
    assert wanted[0] > 2 * wanted[4] > 0


def test_columns_change_by_iteration_seed_and_layer_alone():
    grads = [gradients(i + 1) for i in range(7)]
    stacked = [s for _, s in train(grads, draw(0))]
    single = train([unstacked(g) for g in grads], unstacked(draw(0)))
    for (_, alone), together in zip(single, stacked, strict=True):
        for path in alone.layers:
            np.testing.assert_array_equal(alone.layers[path].columns, columns_of(together, path))
    sets = [tuple(np.sort(s.layers[Q].columns)) for s in stacked]
    assert sets[0] == sets[1] == sets[2] and sets[3] == sets[5] and len(set(sets)) > 1
    keys = [layer_keys(Q, seed, jnp.int32(0)) for seed in range(8)]
    of_seeds = {tuple(np.sort(draw_columns(k, jnp.ones(5), RANK)).tolist()) for k in keys}
    assert len(of_seeds) > 1
    up = stacked[0].layers[UP].columns
    assert any(set(up[0]) != set(s.layers[UP].columns[1]) for s in stacked)


def test_other_columns_stay_to_the_last_bit():
    params = draw(0)
    (after, state), *_ = train([gradients(1)], params)
    held = np.setdiff1d(np.arange(5), state.layers[Q].columns)
    for n in "uv":
        np.testing.assert_array_equal(after[f"{Q}/{n}"][:, held], params[f"{Q}/{n}"][:, held])
        moved = after[f"{Q}/{n}"] - params[f"{Q}/{n}"]
        assert (np.abs(moved[:, state.layers[Q].columns]).max(axis=0) > 1e-3).all()
    assert (after[f"{Q}/s"] != params[f"{Q}/s"]).all()


def test_resuming_is_exact():
    grads = [gradients(i + 1) for i in range(14)]
    whole = train(grads, draw(0))
    again = train(grads[5:], *whole[4])
    for path, value in whole[-1][0].items():
        np.testing.assert_array_equal(again[-1][0][path], value, err_msg=path)


def test_state_memory():
    """Moments of r columns a side and of s, and the numbers of the columns."""

    def size(rank):
        shapes = {"u": (768, 768), "s": (768,), "v": (3072, 768)}
        params = {f"q/{n}": jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
        state = jax.eval_shape(build(rank=rank).init, params).layers
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))

    assert size(64) == 4 * (2 * 64 * (768 + 3072) + 2 * 768 + 64)
    adam = 4 * 2 * 768 * 3072
    assert round(100 * size(64) / adam, 1) == 10.5
    assert size(768) == 4 * (2 * 768 * (768 + 3072) + 2 * 768 + 768)


def descend(loss, params, transform, steps):
    """Losses of `steps` steps and the gradient at the start."""

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = transform.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, transform.init(params))
    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, None, steps))(carry)
    return np.asarray(losses), jax.grad(loss)(params)


def test_reaches_a_full_rank_target_that_low_rank_cannot():
    """Two columns at a time, against the best matrix of rank two (Eckart and Young)."""
    target = np.random.default_rng(0).normal(size=(12, 16)) / 4
    module = layer(12, 16)
    params = {f"q/{n}": a for n, a in model_lib.init(module, jax.random.key(0)).items()}

    def loss(params):
        own = {p.removeprefix("q/"): a for p, a in params.items()}
        y = model_lib.bind(module, own)(jnp.eye(12), Context())
        return jnp.sum((y - target) ** 2)

    rules = {"rank": 2, "interval": 10, "warmup": 0, "weight_decay": 0.0}
    schedule = optax.cosine_decay_schedule(0.03, 600)
    losses, _ = descend(loss, params, build(schedule, **rules), 600)
    floor = np.sum(np.linalg.svd(target, compute_uv=False)[2:] ** 2)
    assert floor > 4 and losses[-1] < 1e-3 * floor


def test_no_saddle_point_at_zero():
    """At W = 0 low-rank factors have no gradient at all; s, and the vectors, have."""
    target = jnp.asarray(np.random.default_rng(0).normal(size=(12, 16)), jnp.float32)
    factors = {"down": jnp.zeros((12, 2)), "up": jnp.zeros((2, 16))}
    saddle = jax.grad(lambda p: jnp.sum((p["down"] @ p["up"] - target) ** 2))(factors)
    assert not any(np.any(g) for g in saddle.values())
    for enhanced in (True, False):
        module = layer(12, 16, enhanced=enhanced)
        params = model_lib.init(module, jax.random.key(0)) | {"s": jnp.zeros(12)}

        def loss(params, module=module):
            y = model_lib.bind(module, params)(jnp.eye(12), Context())
            return jnp.sum((y - target) ** 2)

        grads = jax.grad(loss)(params)
        assert (np.abs(grads["s"]) > 0).all()
        assert np.any(grads["u"]) == np.any(grads["v"]) == enhanced


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank and interval must be 1 or more"),
        ({"interval": 0}, "rank and interval must be 1 or more"),
        ({"warmup": 4}, "warmup=4 must be from 0 to interval=3"),
        ({"at": "nothing"}, "at='nothing' matches no trained u, s and v"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(UserError, match=words):
        build(**arguments).init(draw(0))


def test_config_trains_the_same_shapes():
    sparse = spectral_config.get_config("smoke")
    assert sparse.rules[0]["use"] == "sparse_spectral"
    assert sparse.phases[0]["optimizer"]["name"] == "sst_adam"
    dense = spectral_config.get_config("smoke,mode=dense")
    assert all(rule["use"] != "sparse_spectral" for rule in dense.rules)
    low = spectral_config.get_config("mode=low_rank")
    assert low.rules[0]["rank"] == spectral_config.get_config().phases[0]["optimizer"]["rank"]
    assert [rule["init_std"] for rule in low.rules[:2]] == [0.02 / 8**0.5, 0.02]
    assert low.rules[0]["init"] == low.rules[1]["init"] == "spectral"
    assert SingularValues(4, 4, 0.5)(None, (4,), jnp.float32).shape == (4,)
