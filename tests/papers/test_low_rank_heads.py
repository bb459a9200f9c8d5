"""Factorized projections: value, variance at initialization by depth, and the TEV metric."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import low_rank_heads as low_rank_config
from efficient.errors import UserError
from efficient.init import Constant
from efficient.linears.low_rank import LowRank, token_embedding_variability
from efficient.model import bind, init, walk
from efficient.scope import Context, Rules, Scope
from models.decoder import Decoder

WIDTH, RANK = 64, 32
STD = 0.02 * (768 / WIDTH) ** 0.5  # a full matrix of it has the gain of GPT-2's


def linear(in_features, out_features, rank, bias=False, **arguments):
    return LowRank(Scope(Rules(), "q"), in_features, out_features, bias, rank=rank, **arguments)


def test_the_matrix_is_the_product_of_its_factors():
    module = linear(6, 9, 4, bias=True)
    rng = np.random.default_rng(0)
    arrays = {p: rng.normal(size=v.shape).astype(np.float32) for p, v in walk(module)}
    assert {p: a.shape for p, a in arrays.items()} == {"down": (6, 4), "up": (4, 9), "bias": (9,)}
    bound = bind(module, {p: jnp.asarray(a) for p, a in arrays.items()})
    x, wide = rng.normal(size=(5, 6)), {p: a.astype(np.float64) for p, a in arrays.items()}
    matrix = wide["down"] @ wide["up"]
    got = bound(jnp.asarray(x, jnp.float32), Context())
    np.testing.assert_allclose(got, x @ matrix + wide["bias"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bound.materialize(), matrix, rtol=1e-5, atol=1e-6)
    assert np.linalg.matrix_rank(bound.materialize()) == 4 and module.flops() == 2 * 4 * (6 + 9)


@pytest.mark.parametrize("init_std", [STD, None])
def test_variance_of_a_projection(init_std):
    """I r s^4 with one standard deviation s, 1 with variances of 1 / fan-in."""
    module = linear(WIDTH, WIDTH, RANK, init_std=init_std)
    keys = jax.random.split(jax.random.key(0), 64)
    matrices = jax.vmap(lambda key: bind(module, init(module, key)).materialize())(keys)
    x = np.random.default_rng(1).normal(size=(256, WIDTH))
    variance = np.mean((x @ np.asarray(matrices, np.float64)) ** 2)
    wanted = 1.0 if init_std is None else WIDTH * RANK * STD**4
    np.testing.assert_allclose(variance, wanted, rtol=0.05)
    if init_std is not None:
        np.testing.assert_allclose(wanted / (WIDTH * STD**2), RANK * STD**2)
        assert 0.15 < RANK * STD**2 < 0.16


@functools.cache
def first_block(rank):
    """(a block whose q, k and v have this rank, full with None; what it gives and attention adds).

    The function takes stacked arrays and inputs, one of each a draw.
    """
    factors = {"use": "low_rank", "rank": rank, "init_std": STD}
    rules = [
        *([{"at": r".*/mixer/(q|k|v)", **factors}] if rank else []),
        {"at": r".*/mixer", "use": "attention", "heads": 4, "kernel": "reference"},
        {"at": r"blocks/.*", "use": "dense", "init_std": STD},
    ]
    scope = Scope(Rules(rules))
    block = Decoder(scope, vocab_size=32, width=WIDTH, depth=1, max_length=8).blocks.blocks[0]

    def apply(arrays, x):
        bound, context = bind(block, arrays), Context()
        added = bound.mixer(bound.mixer_norm(x, context), context)
        return bound(x, context)[0], added

    return block, jax.jit(jax.vmap(apply))


def variances(depth, rank=None, scale=1.0, seeds=16):
    """Variances over features at initialization: of the residual stream after 0, 1, ... blocks,
    and of what attention adds to it in each.

    `scale` multiplies full q, k and v. Whatever they are, all other arrays are the same.
    """
    block, step = first_block(rank)

    def draw(path, variable, index):
        """By the declared initializer; in NumPy, since its program takes seconds to compile."""
        rule, shape = variable.get_metadata("init_fn"), (seeds, *variable.shape)
        if isinstance(rule, Constant):
            return np.full(shape, rule.value, np.float32)
        rng = np.random.default_rng([index, zlib.crc32(path.encode())])
        std = rule.std * (scale if re.fullmatch(r"mixer/(q|k|v)/kernel", path) else 1)
        return (std * rng.normal(size=shape)).astype(np.float32)

    x = np.random.default_rng(0).normal(size=(seeds, 4, 8, WIDTH)).astype(np.float32) * 0.3
    found, additions = [np.var(x, axis=-1).mean()], []
    for index in range(depth):
        x, added = step({path: draw(path, v, index) for path, v in walk(block)}, x)
        found.append(np.var(x, axis=-1).mean())
        additions.append(np.var(added, axis=-1).mean())
    return np.array(found), np.array(additions)


def test_variance_grows_less_with_depth():
    """Means over 16 draws of the weights, of two ranks.

    In the first block attention adds r s^2 of what full q, k and v make it add, as one projection
    gives; over 12 blocks from two thirds to all of that. Full ones of as large a product,
    of standard deviation sqrt(r) s^2, add the same.
    """
    full, of_full = variances(12)
    assert (np.diff(full) > 0).all()
    for rank in (RANK, 2 * RANK):
        (low, of_low), (small, of_small) = variances(12, rank), variances(12, None, rank**0.5 * STD)
        gap, predicted = full - low, rank * STD**2
        assert gap[0] == 0 and (gap[1:] > 0).all() and gap[12] > gap[6] > gap[1]
        assert (np.diff(low) > 0).all() and low[12] < 0.95 * full[12]
        np.testing.assert_allclose(of_low[0] / of_full[0], predicted, rtol=0.15)
        assert 2 / 3 * predicted < of_low.sum() / of_full.sum() < predicted
        np.testing.assert_allclose(of_small.sum(), of_low.sum(), rtol=0.1)
        np.testing.assert_allclose(small[12], low[12], rtol=0.05)


def test_token_embedding_variability():
    table = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)
    table *= np.arange(1, 12)[:, None]
    wanted = 0.0
    for row in table.astype(np.float64):
        mean = sum(row) / len(row)
        wanted += (sum((e - mean) ** 2 for e in row) / (len(row) - 1)) ** 0.5 / len(table)
    np.testing.assert_allclose(token_embedding_variability(table), wanted, rtol=1e-5)
    # A constant that is added to an embedding does not count; scale does.
    moved = 3 * table + np.arange(11, dtype=np.float32)[:, None]
    np.testing.assert_allclose(token_embedding_variability(moved), 3 * wanted, rtol=1e-5)
    assert token_embedding_variability(np.ones((4, 3), np.float32)) == 0


@pytest.mark.parametrize("rank", [0, 7])
def test_bad_rank(rank):
    with pytest.raises(UserError, match=f"rank={rank}"):
        linear(6, 9, rank)


def test_parameters_are_those_of_full_projections_at_half_the_width():
    config = low_rank_config.get_config("smoke")
    assert config.rules[0]["rank"] == config.model["width"] // 2
    module = linear(WIDTH, WIDTH, WIDTH // 2)
    assert sum(np.prod(v.shape) for _, v in walk(module)) == WIDTH**2
    rules = low_rank_config.get_config("smoke,full").rules
    assert all(rule["use"] != "low_rank" for rule in rules)
