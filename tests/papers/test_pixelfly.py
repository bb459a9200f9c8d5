"""Pixelfly: its pattern from butterfly factors, the first-order claim, its budget, its layer."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.linears.block_sparse import BlockSparse, random_mask
from efficient.linears.pixelfly import Pixelfly, best_butterfly, flat_butterfly, rank_for
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from pallas_kernels.attention import patterns


def factor(n, index, entries=None):
    """A butterfly factor: 2x2 blocks of diagonals, so that indices 2^index apart meet."""
    stride = 2**index
    matrix = np.zeros((n, n))
    for start in range(0, n, 2 * stride):
        for i in range(start, start + stride):
            pair = [i, i + stride]
            matrix[np.ix_(pair, pair)] = 1.0 if entries is None else entries(i)
    return matrix


@pytest.mark.parametrize(
    ("rows", "columns", "size", "factors"),
    [(8, 8, 8, 3), (8, 8, 8, 1), (16, 16, 16, 2), (4, 16, 4, 2), (16, 8, 4, 1), (24, 6, 2, 1)],
)
def test_pattern_is_the_sum_of_butterfly_factors(rows, columns, size, factors):
    """Summed factors of ones, entries repeated over the rectangle: as the authors' code has it."""
    total = sum(factor(size, index) for index in range(factors)) > 0
    stretched = np.kron(total, np.ones((rows // size, columns // size))) > 0
    mask = flat_butterfly(rows, columns, size, factors)
    np.testing.assert_array_equal(mask.live, stretched)
    assert mask.density == (factors + 1) / size


def test_pattern_where_the_size_does_not_divide():
    """Every row and column of blocks is live somewhere, and cells are at most one block apart."""
    live = flat_butterfly(12, 20, 8, 2).live
    assert live.any(0).all() and live.any(1).all()
    cells = flat_butterfly(8, 8, 8, 2).live
    for p in range(12):
        for q in range(20):
            assert live[p, q] == cells[p * 8 // 12, q * 8 // 20]


def test_attention_has_the_same_pattern():
    for blocks, factors in ((8, 3), (16, 2)):
        mask = patterns.flat_butterfly(blocks * 4, block=4, factors=factors)
        np.testing.assert_array_equal(
            mask.table()[0], flat_butterfly(blocks, blocks, blocks, factors).live
        )


def residual_product(n, block, scale, rng):
    """The product of I + scale F_i over all strides of n blocks, and the sum, by entries."""
    log = n.bit_length() - 1
    product, total = np.eye(n * block), np.eye(n * block)
    for index in range(log):
        blocks = rng.normal(size=(n, n, block, block)) / np.sqrt(2 * block)
        live = factor(n, index)[..., None, None]
        matrix = (live * blocks).swapaxes(1, 2).reshape(n * block, -1)
        product = product @ (np.eye(n * block) + scale * matrix)
        total = total + scale * matrix
    return product, total


def outside(matrix, mask, block):
    """Of a matrix, what the nearest one of the pattern leaves out, in Frobenius norm."""
    live = np.kron(mask.live, np.ones((block, block)))
    return np.linalg.norm(matrix * (1 - live))


def test_flat_butterfly_is_the_product_to_first_order():
    """Halving the factors quarters the error; a random pattern of equal density misses most."""
    n, block = 16, 3
    errors = []
    for scale in (0.02, 0.01, 0.005):
        product, total = residual_product(n, block, scale, np.random.default_rng(0))
        mask = flat_butterfly(n, n, n, 4)
        first_order = np.linalg.norm(total - np.eye(n * block))
        assert outside(total, mask, block) == 0
        errors.append((np.linalg.norm(product - total), outside(product, mask, block)))
        rival = random_mask(n, n, mask.density, 0)
        assert outside(product - np.eye(n * block), rival, block) > 0.5 * first_order
        assert errors[-1][1] < 4 * scale * first_order
    for of_half, of_whole in zip(errors[1:], errors[:-1], strict=True):
        np.testing.assert_allclose(np.divide(of_whole, of_half), 4.0, rtol=0.05)


def layer(technique, in_features, out_features, bias=False, **arguments):
    return technique(Scope(Rules()), in_features, out_features, bias, **arguments)


def residual_of_fit(rank, target, block):
    """What the nearest layer of this rank that L-BFGS finds leaves of a matrix, Frobenius norm."""
    n = target.shape[0] // block
    module = layer(Pixelfly, *target.shape, block=block, size=n, factors=4, rank=rank)
    start, unravel = jax.flatten_util.ravel_pytree(model_lib.init(module, jax.random.key(0)))
    identity = jnp.eye(len(target))

    @jax.jit
    @jax.value_and_grad
    def loss(flat):
        return jnp.sum((model_lib.bind(module, unravel(flat))(identity, Context()) - target) ** 2)

    found = scipy.optimize.minimize(
        lambda flat: tuple(np.asarray(v, np.float64) for v in loss(jnp.asarray(flat, jnp.float32))),
        np.asarray(start, np.float64),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000},
    )
    return found.fun**0.5


def test_low_rank_adds_what_the_pattern_cannot_have():
    """A matrix of the pattern plus one of rank 1: layers of rank 0 and 1 are fitted to it."""
    n, block = 16, 3
    rng = np.random.default_rng(1)
    _, total = residual_product(n, block, 0.1, rng)
    target = total + np.outer(rng.normal(size=n * block), rng.normal(size=n * block))
    sparse_alone = outside(target, flat_butterfly(n, n, n, 4), block)
    rank_alone = np.sqrt((np.linalg.svd(target, compute_uv=False)[1:] ** 2).sum())
    np.testing.assert_allclose(residual_of_fit(0, target, block), sparse_alone, rtol=1e-4)
    assert residual_of_fit(1, target, block) < 1e-2 * min(sparse_alone, rank_alone)


def count(module, *left_out):
    shapes = model_lib.abstract(module)
    return sum(int(np.prod(s.shape)) for n, s in shapes.items() if n not in left_out)


@pytest.mark.parametrize("density", [0.15, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("sizes", "block"), [((512, 2048), 16), ((768, 192), 6)])
def test_budget_is_kept_and_used(sizes, block, density):
    """Within one rank of the budget, at least a quarter of it low rank, and no denser butterfly."""
    module = layer(Pixelfly, *sizes, density=density, block=block)
    whole, step = sizes[0] * sizes[1], sum(sizes)
    used = count(module, "gamma")
    assert density * whole - step < used <= density * whole
    low = module.u.shape[1] * step
    assert low >= 0.25 * density * whole - step
    grid = [n // block for n in sizes]
    for size in (2, 4, 8, 16, 32):
        for factors in range(1, size.bit_length()):
            if size <= min(grid):
                other = flat_butterfly(*grid, size, factors).density
                assert other <= module.mask.density or other > 0.75 * density


def test_budget_prefers_the_largest_of_equals():
    """Density 1 / 8 is size 32 with strides 1, 2 and 4, not size 16 with stride 1."""
    assert best_butterfly(32, 32, 1 / 8) == (32, 3)
    assert best_butterfly(32, 128, 1.0) == (2, 1)
    assert rank_for(768, 3072, 0.052084 * 768 * 3072) == 32


def test_numbers_of_the_authors_configs():
    """At 768 x 3072, in the order (16, 2), (16, 3), (16, 4), (8, 2), (8, 3), (32, 3)."""
    densities, shares = [], []
    for size, factors in ((16, 2), (16, 3), (16, 4), (8, 2), (8, 3), (32, 3)):
        named = {"size": size, "factors": factors, "rank": 32}
        module = layer(Pixelfly, 768, 3072, block=8, **named)
        used, low = count(module, "gamma"), count(module, "gamma", "blocks")
        densities.append(used / (768 * 3072))
        shares.append(low / used)
    expected = [0.2396, 0.3021, 0.3646, 0.4271, 0.5521, 0.1771]
    np.testing.assert_allclose(densities, expected, atol=1e-4)
    np.testing.assert_allclose((min(shares), max(shares)), (0.0943, 0.2941), atol=1e-4)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_parameters_and_flops_are_the_density(density):
    for technique in (Pixelfly, BlockSparse):
        module = layer(technique, 256, 512, density=density, block=8)
        parameters = count(module, "gamma")
        np.testing.assert_allclose(parameters / (256 * 512), density, rtol=0.06)
        shapes = model_lib.abstract(module)
        x = jax.ShapeDtypeStruct((7, 256), jnp.float32)
        apply = lambda v, x, m=module: model_lib.bind(m, v)(x, Context())  # noqa: E731
        counted = count_flops(apply, shapes, x)
        assert counted == 7 * module.flops() == 7 * 2 * parameters


def numpy_matrix(values, mask, block):
    """gamma B + (1 - gamma) U V in float64, block by block."""
    a = {n: np.asarray(v, np.float64) for n, v in values.items()}
    matrix = np.zeros([block * n for n in mask.shape])
    places = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask.live[i, j]]
    for (i, j), part in zip(places, a["blocks"], strict=True):
        matrix[i * block : (i + 1) * block, j * block : (j + 1) * block] = part
    return a["gamma"] * matrix + (1 - a["gamma"]) * a["u"] @ a["v"]


def test_layer_equals_numpy_value_and_gradient():
    module = layer(Pixelfly, 24, 40, bias=True, block=4, density=0.75)
    values = model_lib.init(module, jax.random.key(0))
    assert values["gamma"] == 0.5
    values |= {"gamma": jnp.float32(0.2), "bias": jnp.arange(40.0)}
    x, weight = (np.random.default_rng(i).normal(size=(5, n)) for i, n in ((1, 24), (2, 40)))

    def loss(values, x):
        y = model_lib.bind(module, values)(x, Context())
        return jnp.sum(y * weight), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(values, jnp.asarray(x, jnp.float32))
    w = numpy_matrix(values, module.mask, 4)
    np.testing.assert_allclose(y, x @ w + np.arange(40.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model_lib.bind(module, values).materialize(), w, atol=1e-6)
    dw = x.T @ weight  # W is linear in blocks and gamma, and in U with the others held
    for name in ("blocks", "u", "gamma"):
        change = np.random.default_rng(3).normal(size=values[name].shape)
        moved = values | {name: np.asarray(values[name], np.float64) + change}
        right = np.sum(dw * (numpy_matrix(moved, module.mask, 4) - w))
        np.testing.assert_allclose(np.sum(grads[name] * change), right, rtol=1e-4, atol=1e-4)


def test_initial_variance_is_that_of_the_authors():
    """Blocks as if dense and widened: 1 / (3 live inputs); U V of uniforms: 1 / 9."""
    module = layer(Pixelfly, 256, 256, density=0.25, block=16)
    values = model_lib.init(module, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (512, 256))
    apply = jax.jit(lambda v: model_lib.bind(module, v)(x, Context()))
    for gamma, variance in ((1.0, 1 / 3), (0.0, 1 / 9)):
        y = apply(values | {"gamma": jnp.float32(gamma)})
        np.testing.assert_allclose(jnp.var(y), variance, rtol=0.1)


def test_random_blocks_and_their_projection():
    module = layer(BlockSparse, 48, 32, density=0.3, block=8)
    assert module.mask.count == round(0.3 * 24)
    assert random_mask(6, 4, 0.3, 0) == module.mask != random_mask(6, 4, 0.3, 1)
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(48, 32)), jnp.float32)
    near = model_lib.bind(module, module.project(matrix)).materialize()
    live = np.kron(module.mask.live, np.ones((8, 8)))
    np.testing.assert_array_equal(near, matrix * live)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block": 7}, "block=7 does not divide 64 inputs and 96 outputs; .* is block=8"),
        ({"density": 0.0}, "density=0.0 must be above 0"),
        ({"density": 0.1, "block": 16}, "no butterfly of density 0.075, the sparsest has"),
        ({"block": 32, "density": 0.5, "size": 4, "factors": 1}, "size=4 must be a power of two"),
        ({"block": 8, "size": 8, "factors": 4}, "factors=4 must be from 1 to 3"),
        ({"size": 4}, "give size and factors together"),
        ({"rank": 65, "block": 8}, "rank=65 must be from 0 to 64"),
        ({"rank": 39, "block": 8}, "density=0.25 for a .* of 8 x 12 blocks; .* that fits is 0"),
        ({"rank": 39, "block": 8, "density": 0.5}, "rank=39 leaves too .* rank that fits is 9"),
        (
            {"rank": 39, "block": 8, "density": 0.1},
            "no butterfly of density 0.1, the sparsest has 0.25",
        ),
        ({"low_rank_share": 1.0}, "low_rank_share=1.0 must be from 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        layer(Pixelfly, 64, 96, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("density", [0.25, 0.3, 0.5, 0.9])
def test_the_rank_that_is_named_is_the_largest_that_fits(density):
    sizes = {"block": 8, "density": density}
    with pytest.raises(UserError, match="rank=64 leaves too little") as error:
        layer(Pixelfly, 64, 96, rank=64, **sizes)
    fits = int(str(error.value).rsplit(" ", 1)[1])
    assert count(layer(Pixelfly, 64, 96, rank=fits, **sizes), "gamma") <= density * 64 * 96
    with pytest.raises(UserError, match=f"rank={fits + 1} leaves .* fits is {fits}$"):
        layer(Pixelfly, 64, 96, rank=fits + 1, **sizes)
