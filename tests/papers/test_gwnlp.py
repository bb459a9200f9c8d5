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
from efficient.model import abstract, bind, init
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


class Host(nnx.Module):
    """A model of one layer."""

    def __init__(self, q):
        self.q = q


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
    # A weight-normalized layer: V is the parameter and no state, magnitudes have two moments.
    layer = Host(Dense(Scope(Rules(), "q"), 2048, 2048, False))
    WeightNorm(at="q", rank=None).apply(layer)
    own = {f"mixer/{path}": shape for path, shape in abstract(layer).items()}
    assert {p: s.shape for p, s in own.items()} == {
        "mixer/q/base/kernel": (2048, 2048),
        "mixer/q/magnitude": (2048,),
    }
    state = jax.eval_shape(build(rank=256, bits=8).init, own)[0]
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state[1:]))
    assert size == eight + 2 * 4 * 2048
    assert round(100 * (1 - size / adam), 1) == 87.1
    assert round(100 * (1 - (size + 4 * 2048**2) / adam), 1) == 37.1, "with a copy of V"


def layer(seed=0, bias=True, **arguments):
    """A host of one dense layer of 6 inputs and 4 outputs, before and after surgery."""
    model = Host(Dense(Scope(Rules(), "q"), 6, 4, bias))
    before = init(model, jax.random.key(seed))
    if bias:
        before["q/bias"] = jnp.arange(4.0)
    after = nnx.clone(model)
    surgery = WeightNorm(at="q", **({"rank": 2, "alpha": 4.0} | arguments))
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


@pytest.mark.parametrize("sides", ["both", "shorter"])
@pytest.mark.parametrize("constant_norm", [False, True])
def test_weight_normalized_training_against_the_equations(constant_norm, sides):
    """Steps of V, m and the bias of y = x (m V / |V|) + b in float64, by gradients of its own.

    Singular vectors are NumPy's, with the signs of those in the optimizer's state.
    """
    _, before, model, values = layer(rank=None, constant_norm=constant_norm)
    assert set(values) == {"q/base/kernel", "q/base/bias", "q/magnitude"}
    data = [draw(10 + t, {"x": (8, 6), "y": (8, 4)}) for t in range(6)]

    def loss(values, x, y):
        return 0.5 * jnp.sum(jnp.square(bind(model, values).q(x, Context()) - y))

    rules = {"rank": 2, "period": 3, "scale": 0.5, "b2": 0.99, "eps": 1e-2, "at": "q/.*"}
    transform = build(sides=sides, **rules)
    state = transform.init(values)

    @jax.jit
    def step(values, state, x, y):
        updates, state = transform.update(jax.grad(loss)(values, x, y), state, values)
        return optax.apply_updates(values, updates), state

    v = np.float64(before["q/kernel"])
    m, b = np.linalg.norm(v, axis=0), np.arange(4.0)
    start, moments = m, {name: [0.0, 0.0] for name in "vmb"}

    def adam(name, g, t):
        first, second = moments[name]
        moments[name] = [0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g]
        first, second = moments[name][0] / (1 - 0.9**t), moments[name][1] / (1 - 0.99**t)
        return first / (np.sqrt(second) + 1e-2)

    for t, batch in enumerate(data, start=1):
        values, state = step(values, state, batch["x"], batch["y"])
        x, y = np.float64(batch["x"]), np.float64(batch["y"])
        norm = np.linalg.norm(v, axis=0)
        error = x @ (v / norm * m) + b - y
        dw = x.T @ error
        dm = np.sum(v / norm * dw, axis=0)
        dv = m / norm * (dw - (0 if constant_norm else v / norm * dm))
        if t % 3 == 1:
            u, _, wt = np.linalg.svd(dv)
            left, right = u[:, :2], wt[:2].T
            own = {s: np.float64(a) for s, a in state[0].bases["q/base/kernel"].items()}
            if "left" in own:
                left = left * np.sign(np.sum(left * own["left"], axis=0))
            if "right" in own:
                right = right * np.sign(np.sum(right * own["right"], axis=0))
        left_side = left if sides == "both" else np.eye(6)  # 4 outputs are the shorter side
        r = adam("v", left_side.T @ dv @ right, t)
        v = v - 0.02 * 0.5 * left_side @ r @ right.T
        m, b = m - 0.02 * adam("m", dm, t), b - 0.02 * adam("b", error.sum(0), t)
        wanted = {"q/base/kernel": v, "q/magnitude": m, "q/base/bias": b}
        for path, value in wanted.items():
            np.testing.assert_allclose(
                values[path], value, rtol=1e-4, atol=1e-5, err_msg=f"{path} {t}"
            )
    assert np.abs(m - start).min() > 0.01 and np.abs(v - before["q/kernel"]).max() > 0.01


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("bias", [False, True])
def test_the_function_is_kept_and_folds_back(bias, rank):
    plain, before, model, values = layer(bias=bias, rank=rank)
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
    with pytest.raises(UserError, match="rank must be at least 1, or None"):
        WeightNorm(rank=0)


def test_config_adapts_after_pretraining():
    first, second = gwnlp_config.get_config("smoke,bits=8").phases
    assert not first["surgery"] and second["surgery"][0]["name"] == "gwnlp"
    assert second["optimizer"]["name"] == "gwnlp" and second["optimizer"]["bits"] == 8
    assert gwnlp_config.get_config("smoke,lora").phases[1]["surgery"][0]["name"] == "lora"
    assert second["optimizer"]["rank"] == second["surgery"][0]["rank"] == 8
    second = gwnlp_config.get_config("smoke,rank=5").phases[1]
    assert second["optimizer"]["rank"] == second["surgery"][0]["rank"] == 5


def test_config_pretrains_weight_normalized_matrices():
    """After a phase without steps, whose matrices give the magnitudes."""
    first, second = gwnlp_config.get_config("smoke,pretrain").phases
    assert first["steps"] == 0 and not first["surgery"] and second["steps"] > 0
    (surgery,) = second["surgery"]
    assert surgery["name"] == "gwnlp" and surgery["rank"] is None
    assert second["optimizer"]["name"] == "gwnlp" and second["optimizer"]["rank"] == 64
    second = gwnlp_config.get_config("smoke,pretrain,plain,rank=16").phases[1]
    assert not second["surgery"] and second["optimizer"]["rank"] == 16
    for argument, words in (("pretrain,lora", "lora is for adapting"), ("plain", "add pretrain")):
        with pytest.raises(UserError, match=words):
            gwnlp_config.get_config(argument)
