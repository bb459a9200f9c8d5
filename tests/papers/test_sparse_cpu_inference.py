"""Sparse 8-bit inference: pruning, quantization and the product against integers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import sparse_cpu_inference as sparse_config
from efficient.channels.mlp import MLP
from efficient.errors import UserError
from efficient.linears.dense import Dense
from efficient.linears.sparse_int8 import (
    SparseInt8,
    integer_columns,
    live_blocks,
    pack,
    quantized,
    sparse_int8_matmul,
    unpack,
)
from efficient.model import abstract, bind
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from efficient.surgery.sparse_int8 import BlockPrune, PrunedLinear, ToSparseInt8

# (inputs, outputs, block, live blocks of a column)
SHAPES = [(24, 32, (4, 16), 2), (24, 30, (1, 5), 7), (32, 16, (8, 4), 1), (12, 12, (3, 12), 4)]
EVERY = pytest.mark.parametrize(("inputs", "outputs", "block", "live"), SHAPES)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blocks_of(matrix, block):
    """[R, C, p, q] of a matrix, by slices."""
    (p, q), (rows, columns) = block, matrix.shape
    return np.array(
        [[matrix[i : i + p, j : j + q] for j in range(0, columns, q)] for i in range(0, rows, p)]
    )


def pruned_by_hand(matrix, block, live):
    """The mask of entries: of every column of blocks the `live` of largest summed size."""
    sums = np.abs(np.float64(blocks_of(matrix, block))).sum((2, 3))
    mask = np.zeros(matrix.shape, bool)
    for c in range(sums.shape[1]):
        for r in sorted(range(sums.shape[0]), key=lambda r, c=c: -sums[r, c])[:live]:
            mask[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]] = True
    return mask


@EVERY
def test_pruned_blocks_are_the_smallest(inputs, outputs, block, live):
    kernel = draw(inputs, outputs)
    mask = np.asarray(live_blocks(jnp.asarray(kernel), block, live))
    assert (mask.sum(0) == live).all()
    whole = np.kron(mask, np.ones(block, bool))
    np.testing.assert_array_equal(whole, pruned_by_hand(kernel, block, live))


@EVERY
def test_quantization_of_output_channels(inputs, outputs, block, live):
    """Within half a step of each channel's own scale; live blocks round trip, others are zero."""
    kernel = draw(inputs, outputs) * np.geomspace(0.01, 100, outputs, dtype=np.float32)
    mask = live_blocks(jnp.asarray(kernel), block, live)
    blocks, places, scale = pack(jnp.asarray(kernel), mask, block)
    assert blocks.dtype == jnp.int8 and blocks.shape == (
        outputs // block[1],
        block[1],
        live,
        block[0],
    )
    kept = np.float64(kernel) * np.kron(np.asarray(mask), np.ones(block))
    np.testing.assert_allclose(scale, np.abs(kept).max(0) / 127, rtol=1e-6)
    levels = np.asarray(unpack(blocks, places, inputs // block[0]), np.int64)
    assert (np.abs(levels).max(0) == 127).all() and not levels[kept == 0].any()
    error = np.abs(levels * np.float64(scale) - kept)
    assert (error <= 0.5001 * np.float64(scale)).all() and error.max() > 0
    np.testing.assert_array_equal(np.diff(places, axis=1) > 0, True)


def integers(*shape, seed, extreme=False):
    rng = np.random.default_rng(seed)
    if extreme:  # all of one sign, so that sums are as large as they can be
        return np.full(shape, 127, np.int8)
    return rng.integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "live", "block"),
    [(6, 3, 2, (4, 8)), (12, 2, 9, (256, 4)), (1, 2, 1, (2100, 3))],
)
def test_integer_sums_are_exact(rows, columns, live, block, extreme):
    """Against 64-bit integers; sums of 2,304 terms of 127^2 are odd and above 2^24."""
    rng = np.random.default_rng(0)
    blocks = integers(columns, block[1], live, block[0], seed=1, extreme=extreme)
    places = np.stack([np.sort(rng.permutation(rows)[:live]) for _ in range(columns)])
    x = integers(5, rows * block[0], seed=2, extreme=extreme)
    w = np.zeros((rows * block[0], columns * block[1]), np.int64)
    for c in range(columns):
        for k, r in enumerate(places[c]):
            at = np.s_[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            w[at] = blocks[c, :, k].T
    if extreme:
        x[0, 0] = 126  # an odd sum, and one of 127^2 - 127 less
    wanted = np.int64(x) @ w
    arrays = (jnp.asarray(x), jnp.asarray(blocks), jnp.asarray(places, jnp.int32))
    got = jax.jit(lambda *a: integer_columns(*a, lambda c, total: total))(*arrays)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got).reshape(w.shape[1], -1).T, wanted)
    if extreme and block[0] > 100:
        assert wanted.max() > 2**24 and (wanted % 2).any()


ACTIVATED = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def sum_by_hand(x, blocks, places, scale, rows):
    """x W in float64, W of live blocks, with the tokens of x in 8 bits."""
    of_token = np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    levels = np.round(x / of_token).astype(np.int64)
    weights = np.int64(unpack(blocks, places, rows))
    return (levels @ weights) * np.float64(of_token) * np.float64(scale)


@pytest.mark.parametrize("activation", ACTIVATED)
def test_epilogue_against_numpy(activation):
    inputs, outputs, block, live = SHAPES[0]
    kernel, bias, x = draw(inputs, outputs), draw(outputs, seed=1), draw(2, 3, inputs, seed=2)
    mask = live_blocks(jnp.asarray(kernel), block, live)
    blocks, places, scale = pack(jnp.asarray(kernel), mask, block)
    got = sparse_int8_matmul(
        jnp.asarray(x), blocks, places, scale, jnp.asarray(bias), activation=activation
    )
    y = sum_by_hand(x, blocks, places, scale, inputs // block[0]) + bias
    np.testing.assert_allclose(got, ACTIVATED[activation](y), rtol=1e-5, atol=1e-5)
    dense = ACTIVATED[activation](x @ (kernel * np.kron(mask, np.ones(block))) + bias)
    error = np.linalg.norm(got - dense) / np.linalg.norm(dense)
    assert 1e-4 < error < 0.02


def test_zeros_and_large_numbers_are_finite():
    kernel = draw(8, 4)
    kernel[:, 1] = 0
    blocks, places, scale = pack(jnp.asarray(kernel), jnp.ones((2, 1), bool), (4, 4))
    for size in (0.0, 1e30):
        y = np.asarray(sparse_int8_matmul(size * jnp.ones((2, 8)), blocks, places, scale))
        assert np.isfinite(y).all() and not y[:, 1].any() and np.any(y) == bool(size)
    levels, of_zero = quantized(jnp.zeros((2, 3)), axis=-1)
    assert not np.any(levels) and (np.asarray(of_zero) == 1).all()


def test_bytes_and_flops_are_those_of_live_blocks():
    layer = SparseInt8(64, 96, True, (4, 16), 3)
    sizes = {p: s.size * s.dtype.itemsize for p, s in abstract(layer).items()}
    assert sizes == {"blocks": 6 * 3 * 64, "places": 4 * 6 * 3, "scale": 4 * 96, "bias": 4 * 96}
    x = jax.ShapeDtypeStruct((7, 64), jnp.float32)
    shapes = abstract(layer)
    counted = count_flops(lambda v, x: bind(layer, v)(x, Context()), shapes, x)
    assert counted == 7 * layer.flops() == 7 * 2 * 3 / 16 * 64 * 96


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, m: (k, m.at[0, 0].set(~m[0, 0])), "columns have from [12] to [23] live blocks"),
        (
            lambda k, m: (k, jnp.ones((6, 3), bool)),
            r"\[6, 3\] of blocks \[4, 16\] .* 6 x 2 of them",
        ),
        (lambda k, m: (k, jnp.ones((1, 1), bool)), r"\[1, 1\] of blocks .* kernel \[24, 32\]"),
        (lambda k, m: (k[:22], m), r"kernel \[22, 32\], which has 5.5 x 2 of them"),
        (
            lambda k, m: (k.at[3, 4].set(jnp.nan), m),
            r"the kernel has 1 value\(s\) that are not fin",
        ),
    ],
)
def test_bad_masks_and_kernels_are_not_packed(change, words):
    kernel = jnp.asarray(draw(24, 32))
    mask = live_blocks(kernel, (4, 16), 2)
    with pytest.raises(UserError, match=f"^sparse_int8: .*{words}") as error:
        pack(*change(kernel, mask), (4, 16))
    assert "\n" not in str(error.value)


def test_unknown_activation_is_refused():
    packed = pack(jnp.ones((4, 4)), jnp.ones((1, 1), bool), (4, 4))
    with pytest.raises(UserError, match="unknown activation 'gleu'; did you mean 'gelu'"):
        sparse_int8_matmul(jnp.ones((2, 4)), *packed, activation="gleu")


class Host(nnx.Module):
    """Two dense layers, with and without a bias."""

    def __init__(self):
        self.q = Dense(Scope(Rules(), "q"), 24, 32, True)
        self.k = Dense(Scope(Rules(), "k"), 24, 48, False)


def start():
    shapes = {"q/kernel": (24, 32), "q/bias": (32,), "k/kernel": (24, 48)}
    return {p: jnp.asarray(draw(*s, seed=i)) for i, (p, s) in enumerate(shapes.items())}


def operate(values, model, surgery):
    model = nnx.clone(model)
    surgery.apply(model)
    new = surgery.convert(values, model, jax.random.key(0))
    assert {p: a.shape for p, a in new.items()} == {p: s.shape for p, s in abstract(model).items()}
    return new, model


def test_prune_train_prune_quantize():
    """Twice pruned, with weights changed in between; what went first stays out."""
    values = start()
    once, model = operate(values, Host(), BlockPrune(at="q|k", sparsity=0.5))
    x = jnp.asarray(draw(5, 24, seed=9))
    first = pruned_by_hand(np.asarray(values["q/kernel"]), (4, 16), 3)
    y = bind(model, once).q(x, Context())
    wanted = x @ (values["q/kernel"] * first) + values["q/bias"]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    once["q/base/kernel"] = once["q/base/kernel"] + jnp.asarray(draw(24, 32, seed=8))
    twice, model = operate(once, model, BlockPrune(at=".*", sparsity=0.8))
    kernel = np.asarray(once["q/base/kernel"]) * first
    second = pruned_by_hand(kernel, (4, 16), 1)
    assert isinstance(model.q, PrunedLinear) and model.q.live == 1
    np.testing.assert_array_equal(bind(model, twice).q.materialize(), kernel * second)
    last, model = operate(twice, model, ToSparseInt8())
    assert isinstance(model.k, SparseInt8) and last["q/blocks"].dtype == jnp.int8
    matrix = bind(model, last).q.materialize()
    step = np.abs(kernel * second).max(0) / 127
    assert (np.abs(matrix - kernel * second) <= 0.5001 * step).all()
    np.testing.assert_array_equal(last["q/bias"], values["q/bias"])
    whole = x @ (kernel * second) + values["q/bias"]
    error = np.abs(bind(model, last).q(x, Context()) - whole).max()
    assert 0 < error < 0.05 * np.abs(whole).max()


def test_gradients_stop_at_the_mask():
    values, model = operate(start(), Host(), BlockPrune(at="q", sparsity=0.5))

    def loss(values):
        return jnp.sum(bind(model, values).q(jnp.ones((2, 24)), Context()) ** 2)

    grads = jax.grad(loss, allow_int=True)(values)["q/base/kernel"]
    mask = np.kron(np.asarray(values["q/mask"]), np.ones((4, 16), bool))
    assert not np.any(grads[~mask]) and (np.asarray(grads)[mask] != 0).all()


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("name", ["q", "k"])
def test_layer_and_its_gradient_against_numpy(name, activation, jit):
    """Bias (of q, k has none) and activation after the sum of integers; the rounding is passed."""
    values, model = operate(start(), Host(), BlockPrune(at="q|k", sparsity=0.5))
    values, model = operate(values, model, ToSparseInt8())
    x, outputs = draw(2, 3, 24, seed=2), {"q": 32, "k": 48}[name]
    weight = draw(2, 3, outputs, seed=1)
    has_bias, none = name == "q", np.zeros(outputs)

    def layer(x, bias):
        arrays = values | ({"q/bias": bias} if has_bias else {})
        return getattr(bind(model, arrays), name)(x, Context(), activation=activation)

    def gradients(x, bias):
        return jax.grad(lambda *a: jnp.sum(layer(*a) * weight), argnums=(0, 1))(x, bias)

    bias = values["q/bias"] if has_bias else jnp.zeros(outputs)
    arrays = [values[f"{name}/{part}"] for part in ("blocks", "places", "scale")]
    sums = sum_by_hand(x, *arrays, 6) + np.float64(bias if has_bias else none)
    act, step = ACTIVATED[activation], 1e-6
    run = (lambda f: jax.jit(f)) if jit else (lambda f: f)
    np.testing.assert_allclose(run(layer)(x, bias), act(sums), rtol=1e-5, atol=1e-5)
    dx, d_bias = run(gradients)(jnp.asarray(x), bias)
    dy = weight * (act(sums + step) - act(sums - step)) / (2 * step)
    matrix = np.float64(getattr(bind(model, values), name).materialize())
    np.testing.assert_allclose(dx, dy @ matrix.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_bias, dy.sum((0, 1)) * has_bias, rtol=1e-4, atol=1e-5)


def equations(jaxpr, within=()):
    """(name, names of the calls and loops around it, its outputs' dtypes) of every equation."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, within, [v.aval.dtype for v in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, (*within, name))


def test_the_feed_forward_block_fuses_bias_and_activation():
    """One loop a layer, with the biases and the GELU inside; in training GELU stands outside."""

    class Block(nnx.Module):
        def __init__(self):
            self.channel = MLP(Scope(Rules(), "channel"), 24, hidden=32, bias=True)

    model = Block()
    shapes = {path: s.shape for path, s in abstract(model).items()}
    values = {p: jnp.asarray(draw(*s, seed=i)) for i, (p, s) in enumerate(shapes.items())}
    values, model = operate(values, model, BlockPrune(at=".*", sparsity=0.5, block=[4, 8]))
    values, model = operate(values, model, ToSparseInt8())
    x = jnp.asarray(draw(2, 3, 24, seed=9))

    def run(x, train):
        return bind(model, values).channel(x, Context(train=train))

    for train in (False, True):
        found = list(equations(jax.make_jaxpr(lambda x, t=train: run(x, t))(x).jaxpr))
        loops = [around for name, around, _ in found if name == "scan"]
        assert len(loops) == 2 and not any("scan" in around for around in loops)
        integer = [
            around for name, around, dtypes in found if (name, dtypes) == ("dot_general", ["int32"])
        ]
        assert len(integer) == 2 and all("scan" in around for around in integer)
        (gelu,) = (around for name, around, _ in found if name == "tanh")
        assert ("scan" in gelu) == (not train)
        sums = [around for name, around, _ in found if name in ("add", "add_any")]
        outside = [around for around in sums if "scan" not in around]
        assert bool(outside) == train, "only the unfused GELU adds outside"
    fused, unfused = run(x, False), run(x, True)
    np.testing.assert_allclose(fused, unfused, rtol=1e-5, atol=1e-5)
    assert np.abs(fused).max() > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0 must be from 0 to below 1"),
        ({"block": [4]}, r"block=\[4\] must be two numbers"),
        ({"block": [5, 16]}, "blocks of 5 inputs do not divide the 24 of k; .* have 4"),
        ({"block": [4, 20]}, "blocks of 20 outputs do not divide the 48 of k; .* have 16"),
        ({"at": "v"}, "matches nothing"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(UserError, match=words):
        BlockPrune(**({"at": ".*"} | arguments)).apply(Host())


def test_order_of_surgeries_is_checked():
    with pytest.raises(UserError, match="matches nothing"):
        ToSparseInt8().apply(Host())
    values, model = operate(start(), Host(), BlockPrune(at=".*", sparsity=0.8))
    for arguments in ({"sparsity": 0.5}, {"sparsity": 0.9, "block": [2, 16]}):
        with pytest.raises(UserError, match=r"blocks \[4, 16\] left; go on with"):
            BlockPrune(at=".*", **arguments).apply(nnx.clone(model))


def test_config_prunes_twice_and_quantizes():
    dense, once, twice, last = sparse_config.get_config().phases
    assert (dense["steps"], once["steps"], twice["steps"], last["steps"]) == (600, 100, 100, 0)
    assert [p["surgery"][0].get("sparsity") for p in (once, twice, last)] == [0.4, 0.8, None]
    assert len(sparse_config.get_config("dense").phases) == 1
