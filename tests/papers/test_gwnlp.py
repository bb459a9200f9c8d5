"""GradNormLoRP: the reparametrization, the projected optimizer, 8-bit moments, counted memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import gwnlp as gwnlp_config
from efficient import registry
from efficient.errors import UserError
from efficient.linears.dense import Dense
from efficient.model import bind, init
from efficient.optimizers.quantized import dequantize, dynamic_map, quantize
from efficient.scope import Context, Rules, Scope
from efficient.surgery.gwnlp import WeightNorm
from efficient.surgery.merge import Merge

UP = "blocks/0-1/channel/up/kernel"
SHAPES = {UP: (2, 6, 9), "blocks/2/mixer/q/kernel": (7, 5), "norm/scale": (4,)}
STEPS, PERIOD, RANK = 4, 2, 3


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def decay_mask(params):
    return {path: "scale" not in path for path in params}


def build(**arguments):
    return registry.find("gwnlp", "optimizer").build(0.02, decay_mask, **arguments)


def train(grads, transform, params):
    """Parameters after each step, and the optimizer's states."""
    state, update, seen = transform.init(params), jax.jit(transform.update), []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, state[0])))
    return seen


def layers(arrays):
    """Stacked layers under paths of their own."""
    first, second = arrays[UP]
    return {p: a for p, a in arrays.items() if p != UP} | {f"{UP}:0": first, f"{UP}:1": second}


def check_subspace(basis, singular):
    """Orthonormal, and of the span of the leading singular vectors."""
    np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, singular @ singular.T, atol=1e-4)


@pytest.mark.parametrize("sides", ["both", "shorter"])
def test_against_the_equations(sides):
    """In float64, with the signs of the singular vectors that the optimizer's state holds.

    eps is far above rounding: at a decomposition U^T G V is diagonal but for rounding errors, which
    Adam would blow up to its own size.
    """
    grads = [draw(i + 1) for i in range(STEPS)]
    rules = {"rank": RANK, "period": PERIOD, "scale": 0.5, "sides": sides, "b2": 0.99, "eps": 1e-3}
    seen = train(grads, build(weight_decay=0.1, **rules), draw(0))
    for path, x in layers(draw(0)).items():
        x, m, v = x.astype(np.float64), 0.0, 0.0
        matrix = x.ndim == 2
        for t, (params, state) in enumerate(seen, start=1):
            g = layers(grads[t - 1])[path].astype(np.float64)
            left, right = np.eye(x.shape[0]), np.eye(x.shape[-1])
            if matrix:
                source, at = (UP, (int(path[-1]),)) if ":" in path else (path, ())
                bases = {side: b[at].astype(np.float64) for side, b in state.bases[source].items()}
                shorter = "left" if x.shape[0] < x.shape[1] else "right"
                assert set(bases) == ({"left", "right"} if sides == "both" else {shorter})
                renewed = layers(grads[(t - 1) // PERIOD * PERIOD])[path].astype(np.float64)
                u, _, vt = np.linalg.svd(renewed)
                if "left" in bases:
                    left = bases["left"]
                    check_subspace(left, u[:, :RANK])
                if "right" in bases:
                    right = bases["right"]
                    check_subspace(right, vt[:RANK].T)
                g = left.T @ g @ right
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
            step = 0.5 * left @ r @ right.T if matrix else r
            x = x - 0.02 * (step + 0.1 * x * ("scale" not in path))
            got = layers(params)[path]
            np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5, err_msg=f"{path} {t}")


def test_bases_are_kept_between_decompositions():
    grads = [draw(i + 1) for i in range(3)]
    bases = [s.bases[UP]["left"] for _, s in train(grads, build(rank=RANK, period=2), draw(0))]
    np.testing.assert_array_equal(bases[0], bases[1])
    assert np.abs(bases[2] - bases[1]).max() > 0.1
    # One branch of two, also for stacked layers: no decomposition outside the conditional.
    transform = build(rank=RANK, period=2)
    jaxpr = jax.make_jaxpr(transform.update)(draw(1), transform.init(draw(0)), draw(0))
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("cond") == 2 and "svd" not in names


def test_the_dynamic_map():
    """By its description: signed, seven decades of 1, 2, ... 64 values each."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    assert len(set(signed)) == 256 and signed[127] == 0.0 and signed[-1] == 1.0
    positive = signed[128:-1]
    np.testing.assert_array_equal(signed[:127], -positive[::-1])
    for i in range(7):
        decade = positive[(positive > 10.0 ** (i - 7)) & (positive < 10.0 ** (i - 6))]
        assert len(decade) == 2**i
        np.testing.assert_allclose(np.diff(decade), 0.9 * 10.0 ** (i - 6) / 2**i, rtol=1e-4)
    assert signed[128] == np.float32(0.55e-6) and unsigned[1] == np.float32(3.25e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_quantization_takes_the_nearest_code(signed):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 150)) * 10.0 ** rng.uniform(-8, 2, (3, 150))).astype(np.float32)
    x = x if signed else np.abs(x)
    q = quantize(jnp.asarray(x), signed)
    got = np.asarray(dequantize(q, signed))
    assert q.codes.dtype == jnp.uint8 and q.codes.shape == x.shape and q.largest.shape == (2,)
    table = dynamic_map(signed).astype(np.float64)
    for block, back in zip(np.split(x.ravel(), [256]), np.split(got.ravel(), [256]), strict=True):
        largest = np.abs(block).max()
        distance = np.abs(block[:, None] / largest - table)
        nearest = table[np.argmin(distance, axis=1)]
        nearest = np.where((nearest == 0) & (block < 0), table[126], nearest)
        np.testing.assert_allclose(back, nearest * largest, rtol=1e-5)
    zero = quantize(jnp.zeros(300), signed)
    np.testing.assert_array_equal(dequantize(zero, signed), np.zeros(300))


def test_8_bit_moments_follow_32_bit_ones():
    shapes = {"blocks/0/mixer/q/kernel": (80, 90)}
    rng = np.random.default_rng(0)
    truth = rng.normal(size=shapes["blocks/0/mixer/q/kernel"])
    grads = [
        {p: (truth + g).astype(np.float32) for p, g in draw(i, shapes).items()} for i in (1, 2, 3)
    ]
    start = {p: np.zeros(s, np.float32) for p, s in shapes.items()}
    rules = {"rank": 70, "sides": "both"}
    (exact, _), (coarse, state) = (
        train(grads, build(bits=bits, **rules), start)[-1] for bits in (32, 8)
    )
    path = next(iter(shapes))
    assert state.mu[path].codes.dtype == np.uint8 and state.mu[path].codes.shape == (70, 70)
    error = np.linalg.norm(coarse[path] - exact[path]) / np.linalg.norm(exact[path])
    assert 1e-4 < error < 0.1


def test_state_memory():
    def of(shape, **arguments):
        params = {"blocks/0/mixer/q/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        state = jax.eval_shape(build(**arguments).init, params)[0]
        leaves = jax.tree.leaves((state.mu, state.nu, state.bases))
        return sum(a.size * a.dtype.itemsize for a in leaves)

    adam = 2 * 4 * 2048**2
    assert of((2048, 2048), rank=256) == 4 * (2 * 256**2 + 2 * 2048 * 256)
    eight = of((2048, 2048), rank=256, bits=8)
    assert eight == 2 * (256**2 + 4 * 256) + 4 * 2 * 2048 * 256
    assert round(100 * (1 - eight / adam), 1) == 87.1
    shorter = of((512, 2048), rank=128, sides="shorter", bits=8)
    assert shorter == 2 * (128 * 2048 + 4 * 1024) + 4 * 512 * 128
    assert of((6, 9), rank=3, bits=8) == of((6, 9), rank=3), "small arrays keep 32 bits"


def layer(seed=0, bias=True, **arguments):
    """A host of one dense layer of 6 inputs and 4 outputs, before and after surgery."""

    class Host(nnx.Module):
        def __init__(self):
            self.q = Dense(Scope(Rules(), "q"), 6, 4, bias)

    model = Host()
    before = init(model, jax.random.key(seed))
    if bias:
        before["q/bias"] = jnp.arange(4.0)
    after = nnx.clone(model)
    surgery = WeightNorm(at="q", rank=2, alpha=4.0, **arguments)
    surgery.apply(after)
    return model, before, after, surgery.convert(before, after, jax.random.key(1))


def test_the_matrix_is_weight_normalized():
    _, _, model, values = layer()
    values |= draw(3, {p: v.shape for p, v in values.items() if "lora" in p or "magnitude" in p})
    own = {p.removeprefix("q/"): np.float64(v) for p, v in values.items()}
    direction = own["base/kernel"] + 4.0 / 2 * own["lora_a"] @ own["lora_b"]
    matrix = own["magnitude"] * direction / np.linalg.norm(direction, axis=0)
    x = draw(4, {"x": (3, 6)})["x"]
    linear = bind(model, values).q
    np.testing.assert_allclose(linear.materialize(), matrix, rtol=1e-5, atol=1e-6)
    y = linear(jnp.asarray(x), Context())
    np.testing.assert_allclose(y, x @ matrix + own["base/bias"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(linear.materialize(), axis=0), np.abs(own["magnitude"]), rtol=1e-5
    )


@pytest.mark.parametrize("constant_norm", [False, True])
def test_gradients_of_the_parts(constant_norm):
    """dV = m / |V| (dW - V^ (V^ . dW)), without the second term where the norm is a constant."""
    _, _, model, values = layer(constant_norm=constant_norm)
    values |= draw(3, {p: v.shape for p, v in values.items() if "lora" in p or "magnitude" in p})
    own = {p.removeprefix("q/"): np.float64(v) for p, v in values.items()}
    dw = draw(5, {"w": (6, 4)})["w"]
    grads = jax.grad(lambda v: jnp.sum(bind(model, v).q.materialize() * dw))(values)
    direction = own["base/kernel"] + 2.0 * own["lora_a"] @ own["lora_b"]
    norm = np.linalg.norm(direction, axis=0)
    unit = direction / norm
    dm = np.sum(unit * dw, axis=0)
    dv = own["magnitude"] / norm * (dw - (0 if constant_norm else unit * dm))
    wanted = {
        "magnitude": dm,
        "lora_a": 2.0 * dv @ own["lora_b"].T,
        "lora_b": 2.0 * own["lora_a"].T @ dv,
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(grads[f"q/{name}"], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_the_function_is_kept_and_folds_back(bias):
    plain, before, model, values = layer(bias=bias)
    x = jnp.asarray(draw(4, {"x": (3, 6)})["x"])
    kept = bind(plain, before).q(x, Context())
    np.testing.assert_allclose(bind(model, values).q(x, Context()), kept, rtol=1e-5, atol=1e-6)
    values |= draw(3, {p: v.shape for p, v in values.items() if "lora" in p or "magnitude" in p})
    merge, folded = Merge(), nnx.clone(model)
    merge.apply(folded)
    arrays = merge.convert(values, folded, jax.random.key(2))
    assert sorted(arrays) == sorted(before) and isinstance(folded.q, Dense)
    y = bind(model, values).q(x, Context())
    np.testing.assert_allclose(bind(folded, arrays).q(x, Context()), y, rtol=1e-5, atol=1e-6)
    assert np.abs(y - kept).max() > 0.1


def test_zero_gradients_and_zero_columns_stay_finite():
    zeros = {path: np.zeros_like(x) for path, x in draw(0).items()}
    for params, _ in train([zeros, draw(1)], build(rank=RANK, bits=8, least=1), draw(0)):
        assert all(np.isfinite(x).all() for x in params.values())
    _, _, model, values = layer()
    values |= {"q/base/kernel": jnp.zeros((6, 4)), "q/magnitude": jnp.zeros(4)}
    grads = jax.grad(lambda v: jnp.sum(bind(model, v).q.materialize() ** 2))(values)
    assert all(np.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize(
    "arguments", [{"rank": 0}, {"period": 0}, {"sides": "bth"}, {"bits": 4}, {"at": "nothing"}]
)
def test_bad_input(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        build(**arguments).init(draw(0))
    with pytest.raises(UserError, match="rank"):
        WeightNorm(rank=0)


def test_config_adapts_after_pretraining():
    first, second = gwnlp_config.get_config("smoke,bits=8").phases
    assert not first["surgery"] and second["surgery"][0]["name"] == "gwnlp"
    assert second["optimizer"]["name"] == "gwnlp" and second["optimizer"]["bits"] == 8
    assert gwnlp_config.get_config("smoke,lora").phases[1]["surgery"][0]["name"] == "lora"
    assert gwnlp_config.get_config("smoke,pretrain").phases[0]["optimizer"]["name"] == "gwnlp"
