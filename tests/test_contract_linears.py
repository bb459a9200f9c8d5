"""What every linear technique promises; a new one joins by a row in `ROWS` and one in `FLOPS`.

Beside being called, a linear has `materialize()`, the matrix W [I, O] of y = prepare(x) W + b, and
`flops()`, the operations of its products for one token. `prepare` is the identity unless the
technique has a method of that name (quantized activations). One that rounds declares
`straight_through=True`, since its gradient is not that of its function. One that is no matrix
(token-parameter attention) has no `materialize`; the test of its paper checks its values.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from efficient import registry
from efficient.errors import UserError
from efficient.model import bind, init, walk
from efficient.scope import Context, Rules, Scope, call

# technique -> arguments to test it with, for 16 inputs and 24 outputs
ROWS: dict[str, list[dict]] = {
    "dense": [{}, {"init_std": 0.1}],
    "bitlinear": [{}, {"measure": "mean"}, {"norm": False}],
    "block_diagonal": [{"blocks": 4}, {"blocks": 2, "permute": "both"}],
    "block_sparse": [{"block": 4, "density": 0.4}],
    "butterfly": [
        {"block": 4, "pad": True},
        {"block": 2, "products": 2, "increasing": False, "pad": True},
        {"pad": True},
    ],
    "low_rank": [{"rank": 5}, {"rank": 5, "init": "spectral"}],
    "matryoshka_heads": [{"sizes": [4, 16]}],
    "monarch": [{"blocks": 4}, {"blocks": 3}],
    "pattention": [{"tokens": 20, "key_std": 1.0}],
    "pixelfly": [{"block": 4, "density": 0.75}, {"block": 2, "size": 8, "factors": 1, "rank": 0}],
    "sparse_spectral": [{}, {"enhanced": False, "init_std": 0.1}],
    "tensor_train": [{"rank": 5}, {"in_shape": [2, 8], "out_shape": [6, 4], "ranks": [7]}],
}
# technique -> operations of the products of each row for one token
FLOPS: dict[str, list[int]] = {
    "dense": [768, 768],
    "bitlinear": [768, 768, 768],
    "block_diagonal": [192, 384],
    "block_sparse": [320],  # 10 of the 24 blocks, 0.4 of which are 9.6
    "butterfly": [1024, 2048, 1024],  # two stacks of 16 features, all factors as one 16 x 16 matrix
    "low_rank": [400, 400],
    "matryoshka_heads": [768],
    "monarch": [320, 504],
    "pattention": [1600],
    "pixelfly": [544, 192],  # 12 blocks of 16 entries and a rank of 2; 24 blocks of 4
    "sparse_spectral": [1280, 1280],
    "tensor_train": [3136, 4032],
}
# technique -> parameters that a plain call does not read
NOT_READ = {"matryoshka_heads": r".*_4"}  # heads of prefixes, which serve an objective
NO_MATRIX = {"pattention"}
CASES = [  # `make test-slow` checks the second rows of a technique, and the first without a bias
    pytest.param(
        name,
        arguments,
        bias,
        id=f"{name}-{i}-{'bias' if bias else 'no_bias'}",
        marks=[pytest.mark.slow] * (i > 0 or not bias),
    )
    for name, rows in ROWS.items()
    for i, arguments in enumerate(rows)
    for bias in (False, True)[i > 0 :]
]
EVERY = pytest.mark.parametrize(("name", "arguments", "bias"), CASES)
FIRST = pytest.mark.parametrize(
    ("name", "arguments", "bias"), [case for case in CASES if not case.marks]
)
INPUTS, OUTPUTS, CONTEXT = 16, 24, Context()


def build(name, arguments, bias) -> nnx.Module:
    technique = registry.find(name, "linear")
    registry.check_arguments(technique, arguments, "ROWS")
    return technique.build(Scope(Rules(), "linear"), INPUTS, OUTPUTS, bias, **arguments)


def arrays_of(module, seed=0):
    """Initial arrays with noise on the parameters, so that none is zero."""
    arrays = init(module, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return {
        path: arrays[path] + 0.1 * rng.standard_normal(variable.shape).astype(np.float32)
        if isinstance(variable, nnx.Param)
        else arrays[path]
        for path, variable in walk(module)
    }


def inputs(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, INPUTS)), jnp.float32)


def function(module):
    """(arrays, x) -> y."""
    return lambda arrays, x: call(bind(module, arrays), x, CONTEXT)[0]


def params_of(module, arrays):
    return {p: arrays[p] for p, v in walk(module) if isinstance(v, nnx.Param)}


def test_every_linear_has_a_row():
    missing = [t.name for t in registry.techniques("linear") if t.name not in ROWS.keys() & FLOPS]
    assert not missing, (
        f"add rows for {', '.join(missing)} to ROWS and FLOPS in tests/test_contract_linears.py"
    )


@pytest.mark.parametrize("factor", [None, 0.3])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dense", {}),
        ("block_sparse", {"block": 16, "density": 0.5}),
        ("butterfly", {"block": 8}),
        ("butterfly", {"block": 4, "products": 2}),
        ("monarch", {"blocks": 4}),
        ("monarch", {"blocks": 16}),
        ("pixelfly", {"block": 16, "density": 0.25}),
        ("pixelfly", {"block": 16, "size": 8, "factors": 1, "rank": 0}),
    ],
)
def test_init_std_is_the_root_mean_square_of_the_matrix(name, arguments, factor):
    """And without it the default that the docstring names, times 256^1/2; of 8 draws."""
    default = {"monarch": 1 / 3, "block_sparse": 3**-0.5}.get(name, 1.0)
    if name == "pixelfly":
        default = 3**-0.5 if arguments.get("rank") == 0 else 1 / 3
    std = (factor or default) / 16
    given = {} if factor is None else {"init_std": std}
    technique = registry.find(name, "linear")
    module = technique.build(Scope(Rules(), "linear"), 256, 512, False, **arguments, **given)
    draws = [bind(module, init(module, jax.random.key(i))).materialize() for i in range(8)]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(draws))), std, rtol=0.05)


@EVERY
def test_value_is_that_of_the_materialized_matrix(name, arguments, bias):
    module = build(name, arguments, bias)
    arrays = arrays_of(module)
    x = inputs(2, 3)
    bound = bind(module, arrays)
    prepare = getattr(bound, "prepare", lambda x: x)
    at_zero = np.asarray(bound(jnp.zeros((1, INPUTS)), CONTEXT), np.float64)
    assert np.any(at_zero) == bias
    if getattr(bound, "bias", None) is not None:
        np.testing.assert_array_equal(at_zero[0], bound.bias[...])
    if name in NO_MATRIX:
        assert not hasattr(bound, "materialize")
        return
    matrix = np.asarray(bound.materialize(), np.float64)
    assert matrix.shape == (INPUTS, OUTPUTS)
    expected = np.asarray(prepare(x), np.float64) @ matrix + at_zero
    y = jax.jit(function(module))(arrays, x)
    assert y.shape == (2, 3, OUTPUTS) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "near"),
    [
        ("block_diagonal", "blocks=5", "blocks=4"),
        ("block_sparse", "block=0", "block=1"),
        ("pixelfly", "block=7", "block=8"),
    ],
)
def test_blocks_that_do_not_divide_are_refused_with_the_nearest_that_do(name, given, near):
    argument, value = given.split("=")
    words = f"{name}: {given} does not divide 16 inputs and 24 outputs; .* does is {near}$"
    with pytest.raises(UserError, match=words):
        build(name, {argument: int(value)}, False)


def dot_flops(jaxpr) -> int:
    """Multiplications and additions of a jaxpr's dot products, counted here.

    Of a choice by platform those of the default, where a zero is never multiplied for speed.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[axis] for axis in contract]))
        platforms = equation.params.get("branches_platforms")
        if platforms is not None:
            total += dot_flops(equation.params["branches"][platforms.index(None)].jaxpr)
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


@EVERY
def test_flops_are_those_of_the_program_and_of_the_table(name, arguments, bias):
    module = build(name, arguments, bias)
    jaxpr = jax.make_jaxpr(function(module))(arrays_of(module), inputs(5))
    flops = FLOPS[name][ROWS[name].index(arguments)]
    assert module.flops() == flops and dot_flops(jaxpr.jaxpr) == 5 * flops


@EVERY
def test_gradient(name, arguments, bias):
    module = build(name, arguments, bias)
    arrays = arrays_of(module)
    apply, x = function(module), inputs(4)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((4, OUTPUTS)), jnp.float32)

    def loss(params, x):
        return (apply(arrays | params, x) * weight).sum()

    params = params_of(module, arrays)
    grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    for path, gradient in {**grads, "x": dx}.items():
        assert np.isfinite(gradient).all(), path
        read = not re.fullmatch(NOT_READ.get(name, ""), path)
        assert np.any(gradient) == read, f"{path}: gradient {np.abs(gradient).max()}"
    if registry.find(name, "linear").declares.get("straight_through"):
        return
    with jax.enable_x64(True):
        wide = {p: jnp.asarray(np.asarray(a), jnp.float64) for p, a in params.items()}
        x = jnp.asarray(np.asarray(x), jnp.float64)
        check_grads(loss, (wide, x), order=1, modes=["rev"], eps=1e-4, atol=1e-6, rtol=1e-6)


def relative_bf16_error(module, arrays, x) -> float:
    """Of the output in bfloat16 against float32, on values that bfloat16 can hold."""
    arrays = {p: a.astype(jnp.bfloat16) for p, a in arrays.items()}
    x = x.astype(jnp.bfloat16)
    wide = {p: a.astype(jnp.float32) for p, a in arrays.items()}
    exact = np.asarray(function(module)(wide, x.astype(jnp.float32)))
    low = function(module)(arrays, x)
    assert low.dtype == jnp.bfloat16
    error = np.asarray(low, np.float32) - exact
    return float(np.sqrt((error**2).mean() / (exact**2).mean()))


@EVERY
def test_bfloat16_error_is_near_that_of_a_dense_layer(name, arguments, bias):
    module, dense = build(name, arguments, bias), build("dense", {}, bias)
    x = inputs(64)
    allowed = 4 * relative_bf16_error(dense, arrays_of(dense), x)
    assert 0 < allowed < 0.05
    assert relative_bf16_error(module, arrays_of(module), x) <= allowed


@FIRST
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_zero_and_large_inputs_are_finite(name, arguments, bias, size):
    module = build(name, arguments, bias)
    arrays = arrays_of(module)
    params = params_of(module, arrays)

    def total(params, x):
        y = function(module)(arrays | params, x)
        return y.sum(), y

    grads, y = jax.grad(total, argnums=(0, 1), has_aux=True)(params, size * inputs(3))
    for array in jax.tree.leaves((grads, y)):
        assert np.isfinite(array).all()


@FIRST
def test_under_vmap_and_checkpoint(name, arguments, bias):
    module = build(name, arguments, bias)
    arrays, x, apply = arrays_of(module), inputs(4, 3), function(module)
    expected = apply(arrays, x)
    assert np.abs(expected).max() > 0
    mapped = jax.vmap(apply, in_axes=(None, 0))(arrays, x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)

    def gradient(apply):
        params = params_of(module, arrays)
        return jax.grad(lambda p: (apply(arrays | p, x) ** 2).sum())(params)

    for path, array in gradient(jax.checkpoint(apply)).items():
        np.testing.assert_allclose(array, gradient(apply)[path], rtol=1e-4, atol=1e-4)


@EVERY
def test_eight_devices_equal_one(name, arguments, bias):
    module = build(name, arguments, bias)
    arrays, x, apply = arrays_of(module), inputs(16, 3), jax.jit(function(module))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    y = apply(replicated, sharded)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 3, OUTPUTS)}
    np.testing.assert_allclose(y, apply(arrays, x), rtol=1e-5, atol=1e-6)
