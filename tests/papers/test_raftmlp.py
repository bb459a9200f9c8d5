"""RaftMLP: the mixer against NumPy in float64, what a raft reaches, and costs beside MLP-Mixer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import raftmlp
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from models.vision import Vision

D = 8
GRIDS_AND_RAFTS = [((3, 4), 1), ((3, 4), 2), ((4, 2), 4), ((1, 3), 8)]


def raft_mixer(grid, raft, width=D, expansion=2, causal=False):
    rules = Rules([{"at": "mixer", "use": "raft", "raft": raft, "expansion": expansion}])
    return Scope(rules, grid=grid).mixer("mixer", width, causal)


def draw(module, seed=0, scale=0.5):
    """Random values of every array, norms' and biases' too, in float64."""
    rng = np.random.default_rng(seed)
    shapes = model_lib.abstract(module)
    return {p: scale * rng.normal(size=s.shape) for p, s in shapes.items()}


def inputs(grid, seed=1, batch=2, width=D):
    return np.random.default_rng(seed).normal(size=(batch, grid[0] * grid[1], width))


def run(module, values, x, grid):
    arrays = {p: jnp.asarray(a, jnp.float32) for p, a in values.items()}
    return model_lib.bind(module, arrays)(jnp.asarray(x, jnp.float32), Context(grid=grid))


def numpy_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def numpy_norm(x, scale, bias):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def numpy_branch(x, v, name, raft, vertical):
    """V(x) or H(x) for x [B, h, w, D]: line by line, raft by raft, number by number."""
    y = numpy_norm(x, v[f"{name}_norm/scale"], v[f"{name}_norm/bias"])
    batch, height, width, channels = x.shape
    lines, length = (width, height) if vertical else (height, width)
    apart, out = channels // raft, np.zeros_like(x)
    for b in range(batch):
        for line in range(lines):
            for first in range(apart):
                # The r channels of a raft lie D / r apart; each contributes a whole line.
                at = [
                    (b, *((k, line) if vertical else (line, k)), first + group * apart)
                    for group in range(raft)
                    for k in range(length)
                ]
                hidden = np.array([y[i] for i in at]) @ v[f"{name}_up/kernel"]
                hidden = numpy_gelu(hidden + v[f"{name}_up/bias"])
                mixed = hidden @ v[f"{name}_down/kernel"] + v[f"{name}_down/bias"]
                for i, value in zip(at, mixed, strict=True):
                    out[i] = value
    return out


def numpy_mixer(x, v, grid, raft):
    x = x.reshape(x.shape[0], *grid, -1)
    u = x + numpy_branch(x, v, "vertical", raft, True)
    y = u + numpy_branch(u, v, "horizontal", raft, False)
    return (y - x).reshape(x.shape[0], -1, x.shape[-1])


@pytest.mark.parametrize(("grid", "raft"), GRIDS_AND_RAFTS)
def test_mixer_equals_numpy(grid, raft):
    module = raft_mixer(grid, raft)
    values, x = draw(module), inputs(grid)
    expected = numpy_mixer(x, values, grid, raft)
    np.testing.assert_allclose(run(module, values, x, grid), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_gradients_equal_finite_differences_of_numpy():
    grid, raft = (3, 4), 2
    module = raft_mixer(grid, raft)
    values, x = draw(module), inputs(grid)
    weights = np.random.default_rng(7).normal(size=x.shape)

    def loss(values, x):
        return jnp.sum(run(module, values, x, grid) * weights)

    grads, grad_x = jax.grad(loss, argnums=(0, 1))(
        {p: jnp.asarray(a, jnp.float32) for p, a in values.items()}, jnp.asarray(x, jnp.float32)
    )
    rng, step = np.random.default_rng(8), 1e-6
    for path, grad in {**grads, "x": grad_x}.items():
        direction = rng.normal(size=grad.shape)
        sides = []
        for move in (step * direction, -step * direction):
            moved = {**values, "x": x}
            moved[path] = moved[path] + move
            sides.append(np.sum(numpy_mixer(moved.pop("x"), moved, grid, raft) * weights))
        expected = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(
            np.sum(np.asarray(grad, np.float64) * direction),
            expected,
            rtol=1e-4,
            atol=1e-5 * np.linalg.norm(grad) * np.linalg.norm(direction),
            err_msg=path,
        )


@pytest.mark.parametrize("raft", [1, 2, 4])
def test_a_channel_reaches_its_raft_and_no_other(raft):
    """One number of the normalised grid moves; only its column, row and raft may follow."""
    grid = (3, 4)
    module = raft_mixer(grid, raft)
    values = draw(module)
    for name in ("vertical_norm", "horizontal_norm"):
        setattr(module, name, lambda x, context: x)  # norms would spread it over all channels
        del values[f"{name}/scale"], values[f"{name}/bias"]
    x = inputs(grid, batch=1)
    moved = x.reshape(1, *grid, D).copy()
    moved[0, 1, 2, 5] += 1.0
    change = run(module, values, moved.reshape(x.shape), grid) - run(module, values, x, grid)
    change = np.abs(np.asarray(change).reshape(*grid, D)).max(axis=(0, 1))
    of_raft = np.arange(D) % (D // raft) == 5 % (D // raft)
    assert of_raft.sum() == raft
    assert (change[of_raft] > 1e-3).all()
    assert (change[~of_raft] == 0).all()


def test_vertical_branch_stays_in_its_column_and_horizontal_in_its_row():
    grid, raft = (3, 4), 2
    module = raft_mixer(grid, raft)
    for silent, reached in (("horizontal", np.s_[:, 2]), ("vertical", np.s_[1, :])):
        values = draw(module)
        values |= {p: 0 * values[p] for p in values if p.startswith(f"{silent}_down")}
        x = inputs(grid, batch=1)
        moved = x.reshape(1, *grid, D).copy()
        moved[0, 1, 2, 5] += 1.0
        change = run(module, values, moved.reshape(x.shape), grid) - run(module, values, x, grid)
        change = np.abs(np.asarray(change).reshape(*grid, D)).max(axis=-1)
        assert (change[reached] > 1e-3).all()
        change[reached] = 0
        assert (change == 0).all()


def mixer_token_parameters(tokens, expansion):
    """MLP-Mixer's token mixing: two layers with biases over all tokens of a channel."""
    hidden = expansion * tokens
    return tokens * hidden + hidden + hidden * tokens + tokens


@pytest.mark.parametrize(("raft", "expected"), [(1, 1_652), (2, 6_440), (4, 25_424)])
def test_parameters_against_mixer_token_mixing(raft, expected):
    shapes = model_lib.abstract(raft_mixer((14, 14), raft, width=768))
    norms = sum(math.prod(s.shape) for p, s in shapes.items() if "_norm/" in p)
    total = sum(math.prod(s.shape) for s in shapes.values())
    assert norms == 2 * 2 * 768
    assert total - norms == expected == 2 * mixer_token_parameters(14 * raft, 2)
    assert mixer_token_parameters(196, 2) == 154_252 > 6 * expected


@pytest.mark.parametrize("raft", [1, 2, 4])
def test_macs_against_mixer_token_mixing(raft):
    grid, width, expansion = (14, 14), 768, 2
    module = raft_mixer(grid, raft, width, expansion)
    x = jax.ShapeDtypeStruct((1, 196, width), jnp.float32)

    def forward(values, x):
        return model_lib.bind(module, values)(x, Context(grid=grid))

    macs = count_flops(forward, model_lib.abstract(module), x) / 2
    mixer = width * 2 * expansion * 196**2
    assert macs * 14 * 14 == mixer * raft * (14 + 14)


@pytest.mark.parametrize("variant", raftmlp.RAFTS)
def test_parameters_of_the_ablation_models(variant):
    """Counted by hand from the authors' modules: one more norm a block than a ViT, no positions."""
    config = raftmlp.get_config(f"variant={variant}")
    arguments = {k: v for k, v in config.model.items() if k != "name"}
    rules = Rules(config.rules)
    built = Vision(Scope(rules), **arguments, image_size=224, channels=3, num_classes=1000)
    rules.check_all_matched()
    token = 2 * mixer_token_parameters(14 * raftmlp.RAFTS[variant], 2)
    channel = 768 * 3072 + 3072 + 3072 * 768 + 768
    patch = 16 * 16 * 3 * 768 + 768
    expected = patch + 12 * (token + channel + 3 * 2 * 768) + 2 * 768 + 768 * 1000 + 1000
    assert sum(math.prod(s.shape) for s in model_lib.abstract(built).values()) == expected


def test_block_of_the_config_adds_the_residual_once_and_has_no_norm_of_its_own():
    config = raftmlp.get_config()
    rules = Rules(config.rules)
    block = Scope(rules, grid=(4, 4)).fill("wiring", "stages/0/blocks/0", 64, False)
    values, grid = draw(block, scale=0.2), (4, 4)
    assert not any(p.startswith("mixer_norm") for p in values)
    x = inputs(grid, width=64)
    y = run(block, values, x, grid)[0]
    mixer = {p.removeprefix("mixer/"): a for p, a in values.items() if p.startswith("mixer/")}
    u = x + numpy_mixer(x, mixer, grid, 2)
    h = numpy_norm(u, values["channel_norm/scale"], values["channel_norm/bias"])
    h = h @ values["channel/up/kernel"] + values["channel/up/bias"]
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    expected = u + h @ values["channel/down/kernel"] + values["channel/down/bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_what_the_mixer_refuses():
    x = jnp.ones((1, 6, D))
    mixer = raft_mixer((2, 3), 2)
    for called_on in (None, (3, 2)):
        with pytest.raises(UserError, match=r"^mixer: .* built for a 2x3 grid, and is called on"):
            mixer(x, Context(grid=called_on))
    with pytest.raises(UserError, match="no place for a class token"):
        mixer(jnp.ones((1, 7, D)), Context(grid=(2, 3)))
    with pytest.raises(UserError, match="does not divide into rafts of 3"):
        raft_mixer((2, 3), 3)
    with pytest.raises(UserError, match="expansion=0 must be at least 1"):
        raft_mixer((2, 3), 2, expansion=0)
    with pytest.raises(UserError, match="mixer: 'raft' needs an image's grid of tokens"):
        raft_mixer(None, 2)
    with pytest.raises(UserError, match="host is causal"):
        raft_mixer((2, 3), 2, causal=True)
    with pytest.raises(UserError, match="variant='r3'; did you mean 'r4'"):
        raftmlp.get_config("variant=r3")
