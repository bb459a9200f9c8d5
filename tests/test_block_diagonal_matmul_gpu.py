"""The Hopper kernels of block-diagonal products: numbers in the Mosaic GPU interpreter, compiler.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import functools

import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_checks import rounded
from test_block_diagonal_matmul import ACTIVATIONS, expected, make

from pallas_kernels.block_diagonal_matmul import Stride, block_diagonal_matmul, gpu

KERNELS = {f"block_diagonal_{kernel}" for kernel in ("y", "dx", "dblocks")}


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((2, 128, 256), jnp.bfloat16, None),
        ((2, 128, 192), jnp.bfloat16, "q = 192 of the blocks is no multiple of 128"),
        ((2, 1024, 128), jnp.bfloat16, "1024 x 128 is too large for shared memory"),
        ((2, 128, 128), jnp.float32, "dtype float32; accepted: bfloat16 or float16"),
    ],
)
def test_unsupported_says_why(sizes, dtype, reason):
    arrays, _ = make(*sizes, (64,), dtype)
    found = gpu.unsupported(*arrays.values(), None, None, None, True)
    assert found is None if reason is None else reason in found
    if reason:
        with pytest.raises(ValueError, match=f"implementation='gpu' cannot do this: .*{reason}"):
            block_diagonal_matmul(**arrays, implementation="gpu")


def test_for_a_gpu_the_kernels_are_in_the_program_by_name():
    arrays, dy = make(2, 128, 128, (64,), jnp.bfloat16)

    def kernels(implementation):
        def both(arrays, dy):
            product = functools.partial(block_diagonal_matmul, implementation=implementation)
            y, pull = jax.vjp(lambda a: product(**a), arrays)
            return y, pull(dy)

        return hopper_checks.lowered_kernels("block_diagonal", both, arrays, dy)

    assert kernels("gpu") == KERNELS and kernels(None) == kernels("blockwise") == set()
    with pytest.raises(ValueError, match="needs a GPU; accepted elsewhere: None"):
        block_diagonal_matmul(**arrays, implementation="gpu")


NUMBERS = {
    # K, p, q, rows; permutations, activation
    "plain": ((2, 128, 256, 100), jnp.bfloat16, (None, None, None)),
    "permuted, gelu": ((2, 256, 128, 100), jnp.float16, (Stride(2), Stride(128), "gelu")),
    "panels": ((2, 128, 512, 128), jnp.bfloat16, (None, None, None)),
    "large": ((2, 512, 512, 192), jnp.bfloat16, (None, None, "silu")),
}
# Of these the interpreter says nothing that it does not of the other.
ON_A_GPU = ("plain", "panels", "large")


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    """Errors of at most twice those of rounding y once, where activations are, and the results."""
    if name in ON_A_GPU and jax.default_backend() != "gpu":
        pytest.skip("runs where there is a Hopper GPU")
    (K, p, q, M), dtype, how = NUMBERS[name]
    arrays, dy = make(K, p, q, (M,), dtype, bias=True)
    on = hopper_checks.machine()
    given = arrays["x"], arrays["blocks"], arrays["bias"]
    with hopper_checks.no_races():
        y = jax.jit(lambda *a: gpu.forward(*a, *how, None, on))(*given)
        gradients = jax.jit(lambda *a: gpu.backward(*a, *how, None, on))(*given, dy)
    found = {"y": y, **dict(zip(("x", "blocks", "bias"), gradients, strict=True))}
    assert {found[n].dtype for n in ("y", "x")} == {jnp.dtype(dtype)}
    assert {found[n].dtype for n in ("blocks", "bias")} == {jnp.dtype(jnp.float32)}

    def results(around):
        """around(a) rounds what a kernel keeps of a."""
        exact = {**arrays, "bias": jnp.zeros_like(arrays["bias"])}
        plain = around(expected(exact, dy, *how[:2])[0])
        bias = np.asarray(arrays["bias"], np.float64)
        after, slope = ACTIVATIONS[how[2]](plain + bias)
        dh = around(np.asarray(dy, np.float64) * slope)
        _, back = expected(exact, dh, *how[:2])
        return {"y": around(after), **back, "x": around(back["x"])}

    hopper_checks.check(
        found, results(lambda a: a), results(functools.partial(rounded, dtype=dtype))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4096 by 16 on Hopper", "1024 to 4096 by 8 on Hopper"])
def test_compiles_for_an_h200_without_spills(name):
    hopper_checks.compiles_without_spills("block_diagonal_matmul", name, KERNELS)
