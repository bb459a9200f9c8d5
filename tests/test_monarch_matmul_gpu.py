"""The Hopper kernels of Monarch products: numbers in the Mosaic GPU interpreter, the real compiler.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import functools

import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_checks import rounded
from test_block_sparse_matmul import ACTIVATIONS
from test_monarch_matmul import expected, make

from pallas_kernels import hopper, hopper_blocks
from pallas_kernels.monarch_matmul import gpu, monarch_matmul

KERNELS = {f"monarch_{kernel}" for kernel in ("z", "y", "dz", "dx", "dright", "dleft")}


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((4, 128, 128, 4, 128, 128), jnp.bfloat16, None),
        ((4, 128, 128, 4, 128, 192), jnp.bfloat16, "s = 192 of the blocks is no multiple of 128"),
        ((6, 128, 128, 3, 256, 128), jnp.bfloat16, "q = 128 of right's blocks over left's 3"),
        ((2, 128, 1024, 2, 1024, 128), jnp.bfloat16, "1024 x 128 is too large for shared memory"),
        ((4, 128, 128, 4, 128, 128), jnp.float32, "dtype float32; accepted: bfloat16 or float16"),
    ],
)
def test_unsupported_says_why(sizes, dtype, reason):
    x, right, left, _, _ = make(sizes, (64,), dtype)
    found = gpu.unsupported(x, right, left, True)
    assert found is None if reason is None else reason in found
    if reason:
        with pytest.raises(ValueError, match=f"implementation='gpu' cannot do this: .*{reason}"):
            monarch_matmul(x, right, left, implementation="gpu")


@pytest.mark.parametrize(
    ("sizes", "columns", "stages", "groups"),
    [
        ((8192, 16, 256, 256), 256, 5, 8),
        ((8192, 8, 512, 512), 128, 5, 4),
        ((256, 16, 256, 256), 256, 5, 2),
        ((128, 256, 128, 128), 128, 8, 1),
    ],
)
def test_plans(sizes, columns, stages, groups):
    """A panel of weights in shared memory with the ring; no more thread blocks than have rows."""
    at = hopper_blocks.plan(*sizes, hopper.CORES)
    assert (at.columns, at.stages, at.groups) == (columns, stages, groups)


def test_for_a_gpu_the_kernels_are_in_the_program():
    x, right, left, _, dy = make((2, 128, 128, 2, 128, 128), (64,), jnp.bfloat16)

    def kernels(implementation):
        def both(x, right, left, dy):
            product = functools.partial(monarch_matmul, implementation=implementation)
            y, pull = jax.vjp(product, x, right, left)
            return y, *pull(dy)

        return hopper_checks.lowered_kernels("monarch", both, x, right, left, dy)

    assert kernels("gpu") == kernels(None) == KERNELS and kernels("blockwise") == set()
    with pytest.raises(ValueError, match="needs a GPU; accepted elsewhere: None"):
        monarch_matmul(x, right, left, implementation="gpu")


# ---- numbers


def naive(x, right, left, dy, dtype):
    """y, dx, dright, dleft with z, dz and the first two rounded to dtype, products in float64."""
    x, right, left, dy = (np.asarray(a, np.float64) for a in (x, right, left, dy))
    (K, p, q), (L, r, s) = right.shape, left.shape
    M = len(x)
    x, dy = x.reshape(M, K, p), dy.reshape(M, s, L)
    z = rounded(np.einsum("mkp,kpq->mkq", x, right), dtype).reshape(M, r, L)
    dz = rounded(np.einsum("msl,lrs->mrl", dy, left), dtype).reshape(M, K, q)
    y = rounded(np.einsum("mrl,lrs->msl", z, left), dtype).reshape(M, -1)
    dx = rounded(np.einsum("mkq,kpq->mkp", dz, right), dtype).reshape(M, -1)
    return y, dx, np.einsum("mkp,mkq->kpq", x, dz), np.einsum("mrl,msl->lrs", z, dy)


def compare(sizes, M, dtype=jnp.bfloat16, activation=None):
    """With an activation the forward pass has a bias too."""
    x, right, left, bias, dy = make(sizes, (M,), dtype)
    assert gpu.unsupported(x, right, left, True) is None
    on = hopper_checks.machine()
    with hopper_checks.no_races():
        given = x, right, left, bias if activation else None
        y = jax.jit(lambda *a: gpu.forward(*a, activation, None, on))(*given)
        dx, dright, dleft = jax.jit(lambda *a: gpu.backward(*a, None, on))(x, right, left, dy)
    assert {y.dtype, dx.dtype} == {jnp.dtype(dtype)}
    assert {dright.dtype, dleft.dtype} == {jnp.dtype(jnp.float32)}
    names = ("y", "dx", "dright", "dleft")
    exact = dict(zip(names, expected(x, right, left, dy), strict=True))
    near = dict(zip(names, naive(x, right, left, dy, dtype), strict=True))
    if activation:
        apply = lambda y: ACTIVATIONS[activation](y + np.asarray(bias, np.float64))[0]  # noqa: E731
        exact["y"], near["y"] = apply(exact["y"]), rounded(apply(near["y"]), dtype)
    hopper_checks.check(
        dict(zip(names, (y, dx, dright, dleft), strict=True)), exact, near
    )  # fmt: skip


NUMBERS = {
    # K, p, q, L, r, s; rows; dtype; activation
    "pieces of 64": ((2, 128, 128, 2, 128, 128), 128, jnp.bfloat16),
    "pieces of 32, ragged, bias and GELU": ((4, 128, 128, 4, 128, 128), 100, jnp.bfloat16, "gelu"),
    "pieces of 16": ((8, 128, 128, 8, 128, 128), 64, jnp.bfloat16),
    "pieces of 8": ((16, 128, 128, 16, 128, 128), 64, jnp.bfloat16),
    "whole blocks, float16": ((1, 128, 256, 2, 128, 128), 64, jnp.float16),
    "narrow": ((2, 256, 256, 4, 128, 128), 192, jnp.bfloat16),
    "panels": ((2, 512, 128, 2, 128, 512), 128, jnp.bfloat16),
    "wide": ((4, 128, 128, 2, 256, 512), 128, jnp.bfloat16),
}


# Of these the interpreter says nothing that it does not of the others, in 40 seconds each.
ON_A_GPU = ("pieces of 16", "pieces of 8", "narrow", "wide")


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    if name in ON_A_GPU and jax.default_backend() != "gpu":
        pytest.skip("runs where there is a Hopper GPU")
    compare(*NUMBERS[name])


# ---- the compiler


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["1024 by 8", "4096 by 8", "4096 by 16", "1024 to 4096 by 8", "4096 to 1024 by 8"]
)
def test_compiles_for_an_h200_without_spills(name):
    hopper_checks.compiles_without_spills("monarch_matmul", name, KERNELS)
