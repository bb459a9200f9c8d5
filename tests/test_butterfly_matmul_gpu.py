"""Butterfly products on Hopper, interpreted: Monarch's kernels for numbers, others for blocks.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import functools

import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_checks import rounded
from test_butterfly_matmul import expected, factors, make, run

from pallas_kernels.butterfly_matmul import butterfly_matmul, gpu

KERNELS = {f"monarch_{kernel}" for kernel in ("z", "y", "dz", "dx", "dleft", "dright")}
OF_BLOCKS = {f"butterfly_{kernel}" for kernel in ("y", "dx", "dtwiddle")}


@pytest.mark.parametrize(
    ("stages", "b", "dtype", "reason"),
    [
        (8, 0, jnp.bfloat16, None),
        (7, 0, jnp.bfloat16, "128 features, not 256 to 16384 of them"),
        (3, 128, jnp.bfloat16, None),
        (3, 64, jnp.bfloat16, "blocks of 64 features, no multiple of 128"),
        (1, 512, jnp.bfloat16, "blocks of 512 features are too large for shared memory"),
        (8, 0, jnp.float32, "dtype float32; accepted: bfloat16 or float16"),
    ],
)
def test_by_name_what_the_kernels_cannot_do_is_refused(stages, b, dtype, reason):
    x, twiddle, _ = make(stages, b, (64,), dtype)
    call = functools.partial(butterfly_matmul, implementation="gpu")
    if reason is None:
        jax.eval_shape(call, x, twiddle)
        return
    with pytest.raises(ValueError, match=f"implementation='gpu' cannot do this: .*{reason}"):
        jax.eval_shape(call, x, twiddle)


@pytest.mark.parametrize("increasing", [True, False])
def test_for_a_gpu_the_kernels_are_in_the_program(increasing):
    arrays = make(8, 0, (64,), jnp.bfloat16)
    program = functools.partial(run, increasing=increasing)
    found = hopper_checks.lowered_kernels("monarch", program, *arrays)
    assert found == KERNELS


def test_those_of_blocks_are_in_the_program_by_name():
    arrays = make(2, 128, (64,), jnp.bfloat16)

    def kernels(**how):
        return hopper_checks.lowered_kernels("butterfly", functools.partial(run, **how), *arrays)

    assert kernels(implementation="gpu") == OF_BLOCKS and kernels() == set()


@pytest.mark.parametrize("features", [1024, 4096, 16384])
def test_blocks_are_wide_enough_for_eight_features_each(features):
    width = gpu.width(jax.ShapeDtypeStruct((64, features), jnp.bfloat16))
    assert width**2 // features >= 8


NUMBERS = {
    # stages, b, increasing, rows
    "numbers": (8, 0, True, 64, jnp.bfloat16),
    "numbers decreasing, ragged": (8, 0, False, 100, jnp.float16),
    "more numbers": (10, 0, True, 128, jnp.bfloat16),
    "more numbers decreasing": (11, 0, False, 128, jnp.bfloat16),
    "blocks, ragged": (2, 128, True, 100, jnp.bfloat16),
    "blocks decreasing": (3, 128, False, 128, jnp.float16),
    "large blocks": (1, 256, True, 128, jnp.bfloat16),
}
# Of these the interpreter says nothing that it does not of the others, and of Monarch's.
ON_A_GPU = (
    "numbers", "more numbers", "more numbers decreasing", "blocks decreasing", "large blocks"
)  # fmt: skip


def parts(x, twiddle, increasing):
    """The matrices of which each is rounded and whose products are, in the order of application."""
    dense = factors(twiddle, increasing)
    if twiddle.ndim == 6:
        return dense
    within = int(np.log2(gpu.width(x)))
    at = within if increasing else len(dense) - within
    multiplied = [functools.reduce(lambda a, b: b @ a, some) for some in (dense[:at], dense[at:])]
    return [rounded(m, x.dtype) for m in multiplied]


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    """Errors of at most twice those of rounding the parts, what is between them, and results."""
    if name in ON_A_GPU and jax.default_backend() != "gpu":
        pytest.skip("runs where there is a Hopper GPU")
    stages, b, increasing, M, dtype = NUMBERS[name]
    x, twiddle, dy = make(stages, b, (M,), dtype)
    on, full = hopper_checks.machine(), twiddle if b else twiddle[..., None, None]
    with hopper_checks.no_races():
        y = jax.jit(lambda *a: gpu.forward(*a, increasing, None, on))(x, full)
        dx, gradient = jax.jit(lambda *a: gpu.backward(*a, increasing, None, on))(x, full, dy)
    assert {y.dtype, dx.dtype} == {jnp.dtype(dtype)} and gradient.shape == full.shape

    naive = {"y": np.asarray(x, np.float64), "dx": np.asarray(dy, np.float64)}
    each = parts(x, twiddle, increasing)
    for one, back in zip(each, reversed(each), strict=True):
        naive["y"] = rounded(naive["y"] @ one.T, dtype)
        naive["dx"] = rounded(naive["dx"] @ back, dtype)
    *both, of_twiddle = expected(x, twiddle, dy, increasing)
    hopper_checks.check({"y": y, "dx": dx}, dict(zip(("y", "dx"), both, strict=True)), naive)
    error = np.abs(np.asarray(gradient, np.float64).reshape(of_twiddle.shape) - of_twiddle).max()
    bound = 2.0**-6 if dtype == jnp.bfloat16 else 2.0**-9
    assert 0 < error <= bound * np.abs(of_twiddle).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("4096 on Hopper", KERNELS), ("32 blocks of 128 on Hopper", OF_BLOCKS)],
)
def test_compiles_for_an_h200_without_spills(name, kernels):
    hopper_checks.compiles_without_spills("butterfly_matmul", name, kernels)
