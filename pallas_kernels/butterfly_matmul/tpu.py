"""`butterfly_matmul` on a TPU: all factors in one visit of a tile of rows.

Stages at strides below 128, which would move lanes, are one product by matrices of 128 x 128, made
of the factors outside. The others join whole tiles of lanes: for scalars each is a sum of two
registers, by coefficients a lane, two stages a visit of registers; for blocks of b features a
product by [2 B, 2 B], B = max(b, 128), of two tiles side by side.

The backward kernel reads x and dy once: it makes what each stage started from again, then walks
back through the stages; gradients of weights are added up on chip in float32.

Static schedule (libtpu 0.0.52, bfloat16, M 8192, 4096 scalars), microseconds / those of HBM:

                    v5e         v5p         v6e
    forward      127 / 165    55 / 49    103 / 83
    backward     470 / 256   200 / 76    339 / 128

The vector units bound it: 3 operations a register and stage forward, 8.4 in the loop back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.butterfly_matmul import tpu_kernels, tpu_plan, tpu_weights
from pallas_kernels.butterfly_matmul.tpu_plan import Plan


def unsupported(x, twiddle, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    found = tpu_plan.plan(x, twiddle, True, backward)
    return found if isinstance(found, str) else None


def forward(x, twiddle, increasing, precision, interpret=False):
    """y [M, N] of x [M, N]."""
    plan = tpu_plan.plan(x, twiddle, increasing, False)
    arrays = {"x": x, **_rounded(tpu_weights.prepared(twiddle, plan), x.dtype)}
    shapes = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    body = functools.partial(tpu_kernels.forward, plan=plan, precision=precision)
    return _call(body, arrays, shapes, plan, interpret, "butterfly_fwd")["y"]


def backward(x, twiddle, dy, increasing, precision, interpret=False):
    """dx in x's dtype and the gradient of twiddle."""
    plan = tpu_plan.plan(x, twiddle, increasing, True)
    M, missing = plan.M, -plan.M % plan.rows  # rows that are none would enter the sums
    if missing:
        x, dy = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, dy))
        plan = plan._replace(M=M + missing)
    weights, pull = jax.vjp(functools.partial(tpu_weights.prepared, plan=plan), twiddle)
    arrays = {"x": x, "dy": dy, **_rounded(weights, x.dtype)}
    shapes = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    for name, w in weights.items():
        shape = (2, 8, plan.N) if name == "coefficients" else w.shape[1:]
        shapes[f"d{name}"] = jax.ShapeDtypeStruct((plan.shares, len(w), *shape), jnp.float32)
    body = functools.partial(tpu_kernels.backward, plan=plan, precision=precision)
    found = _call(body, arrays, shapes, plan, interpret, "butterfly_bwd")
    sums = {name: found[f"d{name}"].sum(0) for name in weights}
    if "coefficients" in sums:  # by sublane
        sums["coefficients"] = sums["coefficients"].sum(2)
    return found["dx"][:M], pull(sums)[0]


def _rounded(weights, dtype):
    return {n: w if n == "coefficients" else w.astype(dtype) for n, w in weights.items()}


def _call(body, arrays, shapes, plan: Plan, interpret, name):
    """Results by name of a kernel that is given its references by name."""
    held = jnp.float32 if plan.scalar else arrays["x"].dtype
    scratch = {}
    if plan.saved:
        scratch["saved"] = pltpu.VMEM((plan.saved, plan.rows, plan.N), held)
    if plan.turns and plan.backward:
        scratch["gradient"] = pltpu.VMEM((plan.rows, plan.N), held)
    steps = plan.steps // plan.shares
    rows = pl.BlockSpec((plan.rows, plan.N), lambda share, i: (share * steps + i, 0))

    def spec(key, array):
        if key in ("x", "y", "dy", "dx"):
            return rows
        fixed = len(array.shape) - 1 if key.startswith("d") else len(array.shape)
        block = (1, *array.shape[1:]) if key.startswith("d") else array.shape
        index = lambda share, i: (*(share,) * (len(block) - fixed), *(0,) * fixed)  # noqa: E731
        return pl.BlockSpec(block, index, pipeline_mode=pl.Buffered(1))  # it does not change

    def kernel(*refs):
        body(dict(zip((*arrays, *shapes, *scratch), refs, strict=True)))

    moved = sum(a.size * a.dtype.itemsize for a in (*arrays.values(), *shapes.values()))
    last = "arbitrary" if plan.backward else "parallel"
    found = pl.pallas_call(
        kernel,
        grid=(plan.shares, steps),
        in_specs=[spec(*item) for item in arrays.items()],
        out_specs=[spec(key, shape) for key, shape in shapes.items()],
        out_shape=list(shapes.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", last), vmem_limit_bytes=tpu_plan.VMEM_BYTES + 2 * 2**20
        ),
        cost_estimate=pl.CostEstimate(flops=plan.flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(shapes, found, strict=True))
