"""Monarch: explicit permutations and block-diagonals, the projection, and the surgeries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.linears.monarch import (
    Monarch,
    monarch_matrix,
    monarch_multiply,
    monarch_project,
    monarch_shapes,
)
from efficient.linears.monarch_members import (
    circular_convolution,
    fourier,
    hadamard,
    transposed,
)
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from efficient.surgery.monarch import DenseToMonarch, MonarchToDense
from models.decoder import Decoder

# (in, out, blocks): square with b = sqrt(n), fewer blocks, wide, narrow, nothing divides.
SHAPES = [(16, 16, 4), (16, 16, 2), (8, 24, 4), (24, 8, 2), (13, 18, 4), (18, 13, 4), (10, 10, 3)]


def factors(in_features, out_features, blocks, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in monarch_shapes(in_features, out_features, blocks)]


def block_diagonal(blocks):
    rows, cols = (sum(b.shape[axis] for b in blocks) for axis in (0, 1))
    out, row, col = np.zeros((rows, cols)), 0, 0
    for block in blocks:
        out[row : row + block.shape[0], col : col + block.shape[1]] = block
        row, col = row + block.shape[0], col + block.shape[1]
    return out


def transposition(rows, cols):
    """The permutation matrix that reads a vector as [rows, cols] and gives it as [cols, rows]."""
    matrix = np.zeros((rows * cols, rows * cols))
    for i in range(rows):
        for j in range(cols):
            matrix[j * rows + i, i * cols + j] = 1.0
    return matrix


def dense_monarch(right, left, in_features, out_features):
    """M = P L P^T R for column vectors, cut to its shape; returned as W = M^T."""
    blocks, _, inner = right.shape
    r = block_diagonal([b.T for b in right])
    l_factor = block_diagonal([b.T for b in left])
    into = transposition(inner, blocks)  # the inner vector, read as [inner, blocks], transposed
    out_of = transposition(blocks, left.shape[2])
    m = out_of @ l_factor @ into @ r
    return m[:out_features, :in_features].T


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES)
def test_equals_explicit_permutations_and_block_diagonals(in_features, out_features, blocks):
    right, left = factors(in_features, out_features, blocks)
    w = dense_monarch(right, left, in_features, out_features)
    x = np.random.default_rng(1).normal(size=(2, 3, in_features))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, right, left)]
    y = monarch_multiply(*arrays, out_features)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
    made = monarch_matrix(*arrays[1:], in_features, out_features)
    np.testing.assert_allclose(made, w, rtol=1e-4, atol=1e-4)


def test_square_with_sqrt_n_blocks_is_the_definition():
    """M = P L P^T R where one symmetric P transposes a b x b matrix."""
    right, left = factors(25, 25, 5)
    p = transposition(5, 5)
    np.testing.assert_array_equal(p, p.T)
    m = p @ block_diagonal([b.T for b in left]) @ p.T @ block_diagonal([b.T for b in right])
    arrays = [jnp.asarray(a, jnp.float32) for a in (right, left)]
    np.testing.assert_allclose(monarch_matrix(*arrays, 25, 25), m.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES[2:6])
def test_gradients_equal_those_of_the_dense_matrix(in_features, out_features, blocks):
    right, left = factors(in_features, out_features, blocks)
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(4, in_features)), rng.normal(size=(4, out_features))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, right, left)]

    def loss(x, right, left):
        return jnp.sum(monarch_multiply(x, right, left, out_features) * weight)

    dx, d_right, d_left = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    w = dense_monarch(right, left, in_features, out_features)
    np.testing.assert_allclose(dx, weight @ w.T, rtol=1e-4, atol=1e-4)
    # The matrix is linear in each factor: dloss/dfactor = <x^T weight, W(unit, other factor)>.
    dw = x.T @ weight
    for grad, index in ((d_right, 0), (d_left, 1)):
        direction = rng.normal(size=grad.shape)
        pair = [right, left]
        pair[index] = direction
        expected = np.sum(dw * dense_monarch(*pair, in_features, out_features))
        np.testing.assert_allclose(np.sum(grad * direction), expected, rtol=1e-3, atol=1e-3)


def numpy_best_residual(w, blocks):
    """The least squared error: the tail singular values of every slice of the true matrix."""
    in_features, out_features = w.shape
    (_, rows, inner), _ = monarch_shapes(in_features, out_features, blocks)
    error = 0.0
    for k in range(blocks):
        for out in range(blocks):
            shared = sum((k * inner + i) % blocks == out for i in range(inner))
            piece = w[k * rows : (k + 1) * rows, out::blocks]
            error += np.sum(np.linalg.svd(piece, compute_uv=False)[shared:] ** 2)
    return error


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES)
def test_projection_is_optimal(in_features, out_features, blocks):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(in_features, out_features))
    right, left = monarch_project(jnp.asarray(w, jnp.float32), blocks)
    right, left = np.asarray(right, np.float64), np.asarray(left, np.float64)

    def error(right, left):
        return np.sum((dense_monarch(right, left, in_features, out_features) - w) ** 2)

    best = error(right, left)
    np.testing.assert_allclose(best, numpy_best_residual(w, blocks), rtol=1e-4)
    assert 0 < best < np.sum(w**2)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            moved = [a + size * rng.normal(size=a.shape) for a in (right, left)]
            assert error(*moved) > best - 1e-4


@pytest.mark.parametrize(("in_features", "out_features", "blocks"), SHAPES)
def test_projection_recovers_monarch_matrices(in_features, out_features, blocks):
    w = dense_monarch(*factors(in_features, out_features, blocks), in_features, out_features)
    pair = monarch_project(jnp.asarray(w, jnp.float32), blocks)
    assert [p.shape for p in pair] == list(monarch_shapes(in_features, out_features, blocks))
    again = monarch_matrix(*pair, in_features, out_features)
    np.testing.assert_allclose(again, w, rtol=1e-3, atol=1e-4 * np.abs(w).max())


@pytest.mark.parametrize("root", [2, 4, 8])
def test_dft_is_monarch_after_a_permutation(root):
    n = root * root
    at = np.arange(n)
    dft = np.exp(-2j * np.pi * np.outer(at, at) / n) / np.sqrt(n)
    permutation = at.reshape(root, root).T.reshape(-1)
    w = jnp.asarray(dft[:, permutation].T, jnp.complex64)
    right, left = monarch_project(w, root)
    x = np.random.default_rng(3).normal(size=(5, n)).astype(np.complex64)
    y = monarch_multiply(jnp.asarray(x[:, permutation]), right, left, n)
    np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-4)
    if root > 2:  # without the permutation it is none
        right, left = monarch_project(jnp.asarray(dft, jnp.complex64), root)
        assert np.abs(monarch_matrix(right, left, n, n) - dft).max() > 0.01


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
def test_fourier_factors(m):
    n = m * m
    right, left = fourier(m)
    assert right.shape == left.shape == (m, m, m)
    w = dense_monarch_complex(right, left)
    at = np.arange(n)
    dft = np.exp(-2j * np.pi * np.outer(at, at) / n)
    np.testing.assert_allclose(transposed(np.eye(n)) @ w, dft, atol=1e-11)


def dense_monarch_complex(right, left):
    """`dense_monarch` of the real and imaginary parts, in each of which it is linear."""
    n = right.shape[0] * right.shape[1]
    parts = [(right.real, left.real, 1), (right.imag, left.imag, -1)]
    parts += [(right.real, left.imag, 1j), (right.imag, left.real, 1j)]
    return sum(unit * dense_monarch(r, f, n, n) for r, f, unit in parts)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_hadamard_factors(m):
    n = m * m
    w = dense_monarch(*hadamard(m), n, n)
    i = np.arange(n)
    bits = np.array([[bin(a & b).count("1") for b in i] for a in i])
    np.testing.assert_array_equal(w, (-1.0) ** bits)
    for wrong, near in ((3, 2), (0, 1), (7, 8), (9, 8)):
        with pytest.raises(UserError, match=f"m={wrong} must be a power.* nearest is {near}$"):
            hadamard(wrong)


@pytest.mark.parametrize("m", [3, 8])
def test_circular_convolution(m):
    n = m * m
    x, h = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(2, n), (n,)]))
    y = circular_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(h, jnp.float32))
    rolled = np.stack([np.roll(x, t, axis=-1) for t in range(n)])  # x[(f - t) mod n]
    np.testing.assert_allclose(y, np.einsum("t,tbf->bf", h, rolled), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="10 points are no square; the nearest that works is 9"):
        circular_convolution(jnp.zeros(10), jnp.zeros(10))
    for wrong in (1, (m - 1) ** 2, n - 1, (m + 1) ** 2):
        with pytest.raises(UserError, match=rf"h has {wrong} points, x {n}; cut h to {n} or pad"):
            circular_convolution(jnp.zeros((2, n)), jnp.zeros(wrong))


def layer(in_features, out_features, blocks, bias=False):
    return Monarch(Scope(Rules()), in_features, out_features, bias, blocks=blocks)


@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (64, 256), (256, 64)])
def test_parameters_and_flops_are_two_over_blocks_of_dense(in_features, out_features, blocks):
    module = layer(in_features, out_features, blocks)
    shapes = model_lib.abstract(module)
    parameters = sum(int(np.prod(s.shape)) for s in shapes.values())
    inner = min(in_features, out_features) // blocks
    assert parameters == inner * (in_features + out_features)
    if in_features == out_features:
        assert parameters * blocks == 2 * in_features * out_features
    x = jax.ShapeDtypeStruct((7, in_features), jnp.float32)
    counted = count_flops(lambda v, x: model_lib.bind(module, v)(x, Context()), shapes, x)
    assert counted == 7 * module.flops() == 7 * 2 * parameters


def test_square_root_of_n_blocks_have_n_to_the_three_halves_parameters():
    for root in (8, 16, 32):
        shapes = monarch_shapes(root**2, root**2, root)
        assert sum(int(np.prod(s)) for s in shapes) == 2 * root**3


def test_bias_scale_of_output_and_bfloat16():
    module = layer(96, 64, 4, bias=True)
    values = model_lib.init(module, jax.random.key(0)) | {"bias": jnp.full(64, 3.0)}
    x = jax.random.normal(jax.random.key(1), (256, 96))
    apply = jax.jit(lambda v, x: model_lib.bind(module, v)(x, Context()))
    y = apply(values, x)
    expected = x @ dense_monarch(*(np.asarray(values[n]) for n in ("right", "left")), 96, 64) + 3.0
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # Each factor draws with variance 1 / (3 fan-in), so the two divide the variance by nine; over
    # 60 draws of the factors the standard deviation of this was 0.021 of it.
    np.testing.assert_allclose(jnp.std(y - 3.0), 1 / 3, rtol=0.07)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), values)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    x_half = x.astype(jnp.bfloat16)
    error = jnp.abs(apply(half, x_half).astype(jnp.float32) - expected).max()
    naive = jnp.abs(apply(rounded, x_half.astype(jnp.float32)) - expected).max()
    assert apply(half, x_half).dtype == jnp.bfloat16
    assert error < 4 * naive + 4 * 2**-8 * jnp.abs(expected).max()


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_zero_and_large_inputs(scale):
    right, left = (jnp.asarray(f, jnp.float32) for f in factors(12, 12, 3))
    y = monarch_multiply(scale * jnp.ones((2, 12)), right, left, 12)
    assert bool(jnp.isfinite(y).all())
    projected = monarch_project(scale * jnp.ones((12, 12)), 3)
    assert all(bool(jnp.isfinite(a).all()) for a in projected)


def test_too_many_blocks_are_refused():
    for blocks, near in ((9, 6), (7, 6), (0, 1), (-1, 1)):
        words = f"blocks={blocks} must be between 1 and .* 6 inputs and 8 .* nearest is {near}$"
        with pytest.raises(UserError, match=words):
            layer(6, 8, blocks)
        with pytest.raises(UserError, match=words):
            monarch_project(jnp.ones((6, 8)), blocks)
    assert [f.shape for f in monarch_project(jnp.ones((6, 8)), 6)] == [(6, 1, 1), (6, 1, 2)]


TOKENS = {"tokens": jnp.asarray(np.random.default_rng(4).integers(0, 11, (2, 6)))}


def decoder(rules):
    sizes = {"vocab_size": 11, "width": 12, "depth": 2, "max_length": 6}
    return Decoder(Scope(Rules(rules)), **sizes)


def logits(model, values):
    return jax.jit(lambda v: model_lib.bind(model, v)(TOKENS, Context()))(values)


def draw(module, seed=0):
    rng = np.random.default_rng(seed)
    shapes = model_lib.abstract(module)
    return {p: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype) for p, s in shapes.items()}


def test_reverse_sparsification_keeps_the_function():
    rule = {"at": r"blocks/.*/(q|out|up|down)", "use": "monarch", "blocks": 3, "bias": True}
    model = decoder([{"at": ".*/mixer", "use": "attention", "heads": 2}, rule])
    values = draw(model)
    before = logits(model, values)
    surgery = MonarchToDense()
    surgery.apply(model)
    new = surgery.convert(values, model, jax.random.key(0))
    assert set(new) == set(model_lib.abstract(model))
    assert new["blocks/1/channel/up/kernel"].shape == (12, 48)
    assert not any(p.endswith(("right", "left")) for p in new)
    np.testing.assert_array_equal(new["blocks/0/mixer/k/kernel"], values["blocks/0/mixer/k/kernel"])
    np.testing.assert_allclose(logits(model, new), before, rtol=1e-4, atol=1e-4)


def test_dense_to_monarch_projects_every_matched_layer():
    model = decoder([{"at": r"blocks/.*/(up|down)", "use": "dense", "bias": True}])
    values = draw(model)
    surgery = DenseToMonarch(at=r"blocks/\d+/channel/(up|down)", blocks=2)
    surgery.apply(model)
    new = surgery.convert(values, model, jax.random.key(0))
    assert set(new) == set(model_lib.abstract(model))
    for name in ("up", "down"):
        path = f"blocks/1/channel/{name}"
        w = np.asarray(values[f"{path}/kernel"], np.float64)
        pair = (np.asarray(new[f"{path}/{part}"], np.float64) for part in ("right", "left"))
        error = np.sum((dense_monarch(*pair, *w.shape) - w) ** 2)
        np.testing.assert_allclose(error, numpy_best_residual(w, 2), rtol=1e-4)
        np.testing.assert_array_equal(new[f"{path}/bias"], values[f"{path}/bias"])
    assert bool(jnp.isfinite(logits(model, new)).all())


def test_a_matrix_that_is_not_finite_is_not_projected():
    model = decoder([{"at": r"blocks/.*/(up|down)", "use": "dense", "bias": True}])
    values = draw(model)
    path = "blocks/1/channel/up"
    values[f"{path}/kernel"] = values[f"{path}/kernel"].at[3, 4].set(jnp.nan)
    surgery = DenseToMonarch(at=r"blocks/\d+/channel/(up|down)", blocks=2)
    surgery.apply(model)
    with pytest.raises(UserError, match=f"dense_to_monarch: {path}/kernel has 1 value"):
        surgery.convert(values, model, jax.random.key(0))


def test_surgery_at_no_layer_is_refused():
    with pytest.raises(UserError, match="matches nothing"):
        MonarchToDense().apply(decoder([]))
