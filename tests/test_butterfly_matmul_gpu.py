"""Butterfly products of numbers on Hopper: Monarch's kernels on composed factors, interpreted.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import functools

import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_checks import rounded
from test_butterfly_matmul import expected, make, run

from pallas_kernels.butterfly_matmul import butterfly_matmul, gpu

KERNELS = {f"monarch_{kernel}" for kernel in ("z", "y", "dz", "dx", "dleft", "dright")}


@pytest.mark.parametrize(
    ("stages", "b", "dtype", "reason"),
    [
        (8, 0, jnp.bfloat16, None),
        (7, 0, jnp.bfloat16, "128 features, not 256 to 16384"),
        (3, 128, jnp.bfloat16, "factors of blocks of 128 features"),
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


@pytest.mark.parametrize("features", [1024, 4096, 16384])
def test_blocks_are_wide_enough_for_eight_features_each(features):
    width = gpu._width(jax.ShapeDtypeStruct((64, features), jnp.bfloat16))
    assert width**2 // features >= 8


NUMBERS = {
    "increasing": (8, True, 64, jnp.bfloat16),
    "decreasing, ragged": (8, False, 100, jnp.float16),
    "more blocks": (10, True, 128, jnp.bfloat16),
    "more blocks, decreasing": (11, False, 128, jnp.bfloat16),
}
# Of these the interpreter says nothing that it does not of the other, and of Monarch's.
ON_A_GPU = ("increasing", "more blocks", "more blocks, decreasing")


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    """Errors of at most twice those of rounding both factors, what is between them, and results."""
    if name in ON_A_GPU and jax.default_backend() != "gpu":
        pytest.skip("runs where there is a Hopper GPU")
    stages, increasing, M, dtype = NUMBERS[name]
    x, twiddle, dy = make(stages, 0, (M,), dtype)
    on, full = hopper_checks.machine(), twiddle[..., None, None]
    y = jax.jit(lambda *a: gpu.forward(*a, increasing, None, on))(x, full)
    hopper_checks.no_races()
    dx, gradient = jax.jit(lambda *a: gpu.backward(*a, increasing, None, on))(x, full, dy)
    hopper_checks.no_races()
    assert {y.dtype, dx.dtype} == {jnp.dtype(dtype)}

    # The parts of the matrix, by the definition, each rounded as the kernels have it.
    within = int(np.log2(gpu._width(x)))
    small = np.arange(within) if increasing else stages - within + np.arange(within)
    unit = np.broadcast_to(np.eye(2), twiddle.shape)
    parts = [np.array(unit), np.array(unit)]
    for stage in range(stages):
        parts[stage not in small][stage] = np.asarray(twiddle[stage], np.float64)
    eye, zeros = np.eye(2**stages), np.zeros((2**stages, 2**stages))
    near, far = (rounded(expected(eye, p, zeros, increasing)[0], dtype) for p in parts)
    first, second = (near, far) if increasing else (far, near)
    around = functools.partial(rounded, dtype=dtype)
    xs, dys = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    naive = {
        "y": around(around(xs @ first) @ second),
        "dx": around(around(dys @ second.T) @ first.T),
    }
    exact = dict(zip(("y", "dx", "twiddle"), expected(x, twiddle, dy, increasing), strict=True))
    gradient = np.asarray(gradient, np.float64).reshape(exact["twiddle"].shape)
    bound = 2.0**-6 if dtype == jnp.bfloat16 else 2.0**-9
    greatest = np.abs(exact["twiddle"]).max()
    assert 0 < np.abs(gradient - exact["twiddle"]).max() <= bound * greatest
    del exact["twiddle"]
    hopper_checks.check({"y": y, "dx": dx}, exact, naive)
