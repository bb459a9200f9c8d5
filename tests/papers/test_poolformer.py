"""PoolFormer: the pool and the norm against NumPy, and the paper's parameters and MACs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import poolformer
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.mixers.pool import average_pool
from efficient.norms.group_norm import group_norm
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from models.vision import Vision

# Parameters in millions, GMACs at 224x224: the first and last in the authors' README; between, the
# parameters to the digit that the paper gives (11.9 and 21.4 for the first two).
REPORTED = {
    "s12": (12, 11.9, 1.8),
    "s24": (21, 21.4, 3.4),
    "s36": (31, 30.9, 5.0),
    "m36": (56, 56.2, 8.8),
    "m48": (73, 73.5, 11.6),
}


def numpy_pool(x, size):
    """The mean over the window around each token, token by token, minus the token."""
    out, reach = np.empty_like(x), size // 2
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            rows = slice(max(0, i - reach), i + reach + 1)
            cols = slice(max(0, j - reach), j + reach + 1)
            out[:, i, j] = x[:, rows, cols].mean(axis=(1, 2)) - x[:, i, j]
    return out


def pool(size=3):
    rules = Rules([{"at": "mixer", "use": "pool", "size": size}])
    return Scope(rules, grid=(3, 4)).mixer("mixer", 6, False)


@pytest.mark.parametrize(("grid", "size"), [((4, 5), 3), ((1, 3), 3), ((6, 2), 5), ((3, 3), 1)])
def test_pool_is_the_mean_of_the_window_that_exists_minus_x(grid, size):
    x = np.random.default_rng(0).normal(size=(2, *grid, 6))
    tokens = jnp.asarray(x.reshape(2, -1, 6), jnp.float32)
    y = pool(size)(tokens, Context(grid=grid))
    expected = numpy_pool(x, size).reshape(2, -1, 6)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_pool_is_its_transpose():
    size, grid = 3, (3, 4)
    identity = np.eye(12).reshape(12, *grid, 1)
    matrix = numpy_pool(identity, size).reshape(12, 12)  # row i: the pool of the i-th unit image
    weight = np.random.default_rng(1).normal(size=(1, 12, 1))
    mixer = pool(size)
    grad = jax.grad(lambda x: jnp.sum(mixer(x, Context(grid=grid)) * weight))(jnp.ones((1, 12, 1)))
    np.testing.assert_allclose(grad[0, :, 0], matrix @ weight[0, :, 0], rtol=1e-5, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    x = np.random.default_rng(2).normal(size=(1, 5, 5, 3)) + 100.0
    half = jnp.asarray(x, jnp.bfloat16)
    exact = average_pool(half.astype(jnp.float32), 3)
    pooled = average_pool(half, 3)
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))


def test_pool_has_no_parameters_and_refuses_what_has_no_grid():
    assert not model_lib.abstract(pool())
    x = jnp.ones((1, 5, 6))
    with pytest.raises(UserError, match="needs the grid"):
        pool()(x, Context())
    with pytest.raises(UserError, match="no place for a class token"):
        pool()(x, Context(grid=(2, 2)))
    with pytest.raises(UserError, match="must be odd"):
        pool(size=2)
    with pytest.raises(UserError, match="host is causal"):
        Scope(Rules([{"at": "mixer", "use": "pool"}])).mixer("mixer", 6, True)
    with pytest.raises(UserError, match="mixer: 'pool' needs an image's grid of tokens"):
        Scope(Rules([{"at": "mixer", "use": "pool"}])).mixer("mixer", 6, False)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_is_over_tokens_and_channels_of_a_group(groups):
    rng = np.random.default_rng(3)
    x, scale, bias = rng.normal(size=(2, 7, 6)) + 5.0, rng.normal(size=6), rng.normal(size=6)
    expected = np.empty_like(x)
    for b in range(2):
        for g in range(groups):
            part = slice(g * 6 // groups, (g + 1) * 6 // groups)
            piece = x[b, :, part]
            expected[b, :, part] = (piece - piece.mean()) / np.sqrt(piece.var() + 1e-5)
    expected = expected * scale + bias
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, scale, bias)]
    y = group_norm(*arrays, groups, 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_refuses_sequences_and_uneven_groups():
    def norm(**arguments):
        rules = Rules([{"at": "norm", "use": "group_norm", **arguments}])
        return Scope(rules, grid=(2, 2)).norm("norm", 6)

    with pytest.raises(UserError, match="include later ones"):
        norm()(jnp.ones((1, 4, 6)), Context())
    with pytest.raises(UserError, match="does not divide into 4 groups"):
        norm(groups=4)


def numpy_block(x, v, grid):
    """A PoolFormer block: x + s1 * pool(norm(x)), then x + s2 * mlp(norm(x)); exact GELU."""

    def norm(x, name):
        mean, var = x.mean(axis=(1, 2), keepdims=True), x.var(axis=(1, 2), keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * v[f"{name}/scale"] + v[f"{name}/bias"]

    y = norm(x, "mixer_norm").reshape(x.shape[0], *grid, -1)
    x = x + v["mixer_scale"] * numpy_pool(y, 3).reshape(x.shape)
    y = norm(x, "channel_norm") @ v["channel/up/kernel"] + v["channel/up/bias"]
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
    y = y @ v["channel/down/kernel"] + v["channel/down/bias"]
    return x + v["channel_scale"] * y


def model(variant, image_size=224):
    config = poolformer.get_config(f"variant={variant}")
    arguments = {k: v for k, v in config.model.items() if k != "name"}
    sizes = {"image_size": image_size, "channels": 3, "num_classes": 1000}
    rules = Rules(config.rules)
    built = Vision(Scope(rules), **(arguments | sizes))
    rules.check_all_matched()
    return built


def test_block_of_the_config_equals_numpy():
    block = model("s12").stages[0].blocks.blocks[0]
    rng = np.random.default_rng(4)
    shapes = model_lib.abstract(block)
    values = {p: 0.2 * rng.normal(size=s.shape) for p, s in shapes.items()}
    x, grid = rng.normal(size=(2, 12, 64)), (3, 4)
    arrays = {p: jnp.asarray(a, jnp.float32) for p, a in values.items()}
    y = model_lib.bind(block, arrays)(jnp.asarray(x, jnp.float32), Context(grid=grid))[0]
    np.testing.assert_allclose(y, numpy_block(x, values, grid), rtol=1e-4, atol=1e-4)


def expected_parameters(depths, widths):
    """Counted by hand: convolutions, two norms, two layer scales and an MLP a block, the head."""
    total, channels = 0, 3
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        kernel = 7 if i == 0 else 3
        total += kernel**2 * channels * width + width
        mlp = (width * 4 * width + 4 * width) + (4 * width * width + width)
        total += depth * (2 * 2 * width + 2 * width + mlp)
        channels = width
    return total + 2 * channels + channels * 1000 + 1000


@pytest.mark.parametrize("variant", REPORTED)
def test_parameter_counts_of_the_five_models(variant):
    shapes = model_lib.abstract(model(variant))
    total = sum(math.prod(s.shape) for s in shapes.values())
    assert total == expected_parameters(*poolformer.VARIANTS[variant][:2])
    assert round(total / 1e6) == REPORTED[variant][0]
    assert round(total / 1e6, 1) == REPORTED[variant][1]


def test_parameter_counts_to_the_last_digit():
    def total(variant):
        return sum(math.prod(s.shape) for s in model_lib.abstract(model(variant)).values())

    assert (total("s12"), total("s24")) == (11_915_176, 21_388_968)


def macs(variant, image_size=224):
    built = model_lib.stack_alike(model(variant, image_size))
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)

    def forward(values, image):
        return model_lib.bind(built, values)({"image": image}, Context())

    return count_flops(forward, model_lib.abstract(built), image) / 2


def counted_by_hand(depths, widths, size=224):
    """(MACs that meet no padding, operations as fvcore counts them) of one image.

    fvcore, with which the authors counted, takes the padding of convolutions for work and adds five
    operations an element of every normalisation.
    """
    macs, as_fvcore, channels = 0, 0, 3
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        kernel, stride, pad = (7, 4, 2) if i == 0 else (3, 2, 1)
        out = (size + 2 * pad - kernel) // stride + 1
        taps = [0 <= stride * y + k - pad < size for y in range(out) for k in range(kernel)]
        macs += sum(taps) ** 2 * channels * width
        as_fvcore += (out * kernel) ** 2 * channels * width
        mlp = depth * out**2 * 2 * width * 4 * width
        norms = (2 * depth + (i == len(depths) - 1)) * out**2 * width
        macs, as_fvcore = macs + mlp, as_fvcore + mlp + 5 * norms
        size, channels = out, width
    return macs + channels * 1000, as_fvcore + channels * 1000


@pytest.mark.parametrize("variant", REPORTED)
def test_macs_of_the_five_models(variant):
    exact, as_fvcore = counted_by_hand(*poolformer.VARIANTS[variant][:2])
    assert macs(variant) == exact
    assert round(as_fvcore / 1e9, 1) == REPORTED[variant][2]


def test_macs_are_linear_in_tokens():
    """But for the edges, whose windows are padded; attention's would grow sixteenfold."""
    head = 512 * 1000
    small, large = macs("s12", 64) - head, macs("s12", 128) - head
    assert 4.0 <= large / small < 4.1


def test_drop_path_rises_linearly_with_depth():
    config = poolformer.get_config("variant=s12")
    scope = Scope(Rules(config.rules))
    sizes = {"image_size": 64, "channels": 3, "num_classes": 10}
    built = Vision(scope, stages=config.model.stages, **sizes)
    rates = [block.rate for stage in built.stages for block in stage.blocks.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 12), atol=1e-6)
