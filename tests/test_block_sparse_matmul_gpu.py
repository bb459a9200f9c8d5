"""The Hopper kernels of block-sparse products: numbers in the Mosaic GPU interpreter, the compiler.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import functools

import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_checks import rounded
from test_block_sparse_matmul import ACTIVATIONS, RAGGED, dense, make

from pallas_kernels.block_sparse_matmul import BlockMask, block_sparse_matmul, gpu
from pallas_kernels.block_sparse_matmul.gpu_product import WIDE, lists
from pallas_kernels.block_sparse_matmul.settings import Settings

NAMES = ("blocks", "u", "v", "gamma", "bias")


@pytest.mark.parametrize("transposed", [False, True])
def test_lists_name_each_live_block_once_for_each_of_its_tiles(transposed):
    bi, bo = 256, 384
    columns, (inner, outer) = RAGGED.columns, (bi, bo)
    if transposed:
        columns, (inner, outer) = RAGGED.rows, (bo, bi)
    tiles, live = lists(columns, inner, outer)
    assert (np.diff(tiles[:, 2]) <= 0).all()
    live_of = RAGGED.live.T if transposed else RAGGED.live
    numbers = RAGGED.numbers.T if transposed else RAGGED.numbers
    found = np.zeros((live_of.shape[0], live_of.shape[1] * outer // WIDE), int)
    for column, start, count in tiles:
        for first, number in live[start : start + count]:
            assert numbers[first // inner, column // outer] == number
            found[first // inner, column // WIDE] += 1
    np.testing.assert_array_equal(found, np.repeat(live_of, outer // WIDE, axis=1))


@pytest.mark.parametrize(
    ("block", "dtype", "reason"),
    [
        ((128, 256), jnp.bfloat16, None),
        ((64, 128), jnp.bfloat16, "blocks of 64 x 128; accepted: multiples of 128"),
        ((128, 128), jnp.float32, "dtype float32; accepted: bfloat16 or float16"),
    ],
)
def test_unsupported_says_why(block, dtype, reason):
    arrays = make(RAGGED, *block, dtype=dtype)
    found = gpu.unsupported(arrays["x"], arrays["blocks"])
    assert found is None if reason is None else reason in found
    if reason:
        with pytest.raises(ValueError, match=f"implementation='gpu' cannot do this: {reason}"):
            block_sparse_matmul(**arrays, mask=RAGGED, implementation="gpu")


def test_for_a_gpu_the_kernels_are_in_the_program():
    arrays = make(RAGGED, 128, 128, rank=8, bias=True, dtype=jnp.bfloat16)

    def kernels(implementation):
        def total(arrays):
            how = {"activation": "silu", "mask": RAGGED, "implementation": implementation}
            return block_sparse_matmul(**arrays, **how).astype(jnp.float32).sum()

        return hopper_checks.lowered_kernels("block_sparse", jax.value_and_grad(total), arrays)

    parts = ("forward", "dx", "dblocks", "du", "dv")
    assert kernels("gpu") == kernels(None) == {f"block_sparse_{part}" for part in parts}
    assert kernels("blockwise") == set()
    with pytest.raises(ValueError, match="needs a GPU; accepted elsewhere: None"):
        block_sparse_matmul(**arrays, mask=RAGGED, implementation="gpu")


# ---- numbers


def results(arrays, mask, activation, dy, z, around):
    """Every result and gradient in float64; around(a) rounds what a kernel keeps of a."""
    a = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    x, b, dy = a["x"], dense(arrays["blocks"], mask), np.asarray(dy, np.float64)
    keep, low = a.get("gamma", 1.0), 1 - a["gamma"] if "gamma" in a else 1.0
    before, dx, found = keep * (x @ b) + a.get("bias", 0.0), keep * (dy @ b.T), {}
    if "u" in a:
        found["z"] = around(x @ a["u"])
        dz = around(dy @ a["v"].T)
        before, dx = before + low * (found["z"] @ a["v"]), dx + low * (dz @ a["u"].T)
        found["du"], found["dv"] = x.T @ dz, np.asarray(z, np.float64).T @ dy
    bi, bo = a["blocks"].shape[1:]
    cut = (x.T @ dy).reshape(mask.shape[0], bi, mask.shape[1], bo).swapaxes(1, 2)
    found |= {"y": around(ACTIVATIONS[activation](before)[0]), "dx": around(dx)}
    found |= {"d_blocks": cut[mask.live], "d_bias": dy.sum(0)}
    return found | ({"before": around(before)} if activation else {})


def compare(mask, block, M, activation=None, dtype=jnp.bfloat16, **how):
    arrays = make(mask, *block, M, dtype=dtype, **how)
    x, *weights = (arrays.get(n) for n in ("x", *NAMES))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(M, mask.shape[1] * block[1])), dtype)
    settings = Settings(mask, activation)
    on = hopper_checks.machine()
    forward = functools.partial(gpu.forward, settings=settings, save=True, machine=on)
    backward = functools.partial(gpu.backward, has_bias=True, settings=settings, machine=on)
    with hopper_checks.no_races():
        y, before, z = jax.jit(forward)(x, *weights)
        gradients = jax.jit(backward)(x, dy, z, *weights[:4])
    found = dict(zip(("dx", "d_blocks", "du", "dv", "d_bias"), gradients, strict=True))
    found |= {"y": y, "before": before, "z": z}
    assert {found[n].dtype for n in ("y", "dx")} == {jnp.dtype(dtype)}
    assert found["d_blocks"].dtype == jnp.float32
    given = arrays, mask, activation, dy, z
    hopper_checks.check(
        found, results(*given, lambda a: a), results(*given, lambda a: rounded(a, dtype))
    )


DIAGONAL = BlockMask(np.eye(2, dtype=bool))
NUMBERS = {
    "one block": (BlockMask(np.array([[True]])), (128, 128), 100, {}),
    "ragged, all terms": (
        RAGGED,
        (128, 128),
        300,
        {"rank": 24, "bias": True, "activation": "gelu"},
    ),
    "wide blocks, no gamma": (DIAGONAL, (256, 128), 256, {"rank": 160, "gamma": False}),
    "tall blocks, float16": (DIAGONAL, (128, 256), 64, {"dtype": jnp.float16, "bias": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    mask, block, M, how = NUMBERS[name]
    compare(mask, block, M, **how)


# ---- the compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["n4096", "n4096_r128", "down_4096_1024_r128", "n4096_block_256"])
def test_compiles_for_an_h200_without_spills(name):
    kernels = {"forward", "dx", "dblocks", *(("du", "dv") if "_r" in name else ())}
    names = {f"block_sparse_{k}" for k in kernels}
    hopper_checks.compiles_without_spills("block_sparse_matmul", name, names)
