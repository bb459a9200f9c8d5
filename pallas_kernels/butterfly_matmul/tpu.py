"""`butterfly_matmul` on a TPU: all factors in one visit of a tile of rows.

Factors of numbers are a Monarch matrix (`as_monarch`). Of factors of blocks, stages at strides
below 128 features, which would move lanes, are one product by matrices of 128 x 128, made of the
factors outside; each other stage is products by [2 B, 2 B], B = max(b, 128), of two tiles side by
side.

The backward kernel reads x and dy once: it makes what each stage started from again, then walks
back through the stages; gradients of weights are added up on chip in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.butterfly_matmul import as_monarch, tpu_kernels, tpu_plan, tpu_weights
from pallas_kernels.butterfly_matmul.tpu_plan import LANES, Plan
from pallas_kernels.monarch_matmul import tpu as monarch


def unsupported(x, twiddle, increasing, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if twiddle.shape[-1] == 1:
        return as_monarch.unsupported(monarch, x, increasing, LANES, backward)
    found = tpu_plan.plan(x, twiddle, increasing, backward)
    return found if isinstance(found, str) else None


def forward(x, twiddle, increasing, precision, interpret=False):
    """y [M, N] of x [M, N]."""
    if twiddle.shape[-1] == 1:
        how = precision, LANES
        return as_monarch.forward(monarch, x, twiddle, increasing, *how, interpret=interpret)
    plan = tpu_plan.plan(x, twiddle, increasing, False)
    arrays = {"x": x, **_rounded(tpu_weights.prepared(twiddle, plan), x.dtype)}
    shapes = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    body = functools.partial(tpu_kernels.forward, plan=plan, precision=precision)
    return _call(body, arrays, shapes, plan, interpret, "butterfly_fwd")["y"]


def backward(x, twiddle, dy, increasing, precision, interpret=False):
    """dx in x's dtype and the gradient of twiddle."""
    if twiddle.shape[-1] == 1:
        how = precision, LANES
        return as_monarch.backward(monarch, x, twiddle, dy, increasing, *how, interpret=interpret)
    plan = tpu_plan.plan(x, twiddle, increasing, True)
    M, missing = plan.M, -plan.M % plan.rows  # rows that are none would enter the sums
    if missing:
        x, dy = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, dy))
        plan = plan._replace(M=M + missing)
    weights, pull = jax.vjp(functools.partial(tpu_weights.prepared, plan=plan), twiddle)
    arrays = {"x": x, "dy": dy, **_rounded(weights, x.dtype)}
    shapes = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    for name, w in weights.items():
        shapes[f"d{name}"] = jax.ShapeDtypeStruct((plan.shares, *w.shape), jnp.float32)
    body = functools.partial(tpu_kernels.backward, plan=plan, precision=precision)
    found = _call(body, arrays, shapes, plan, interpret, "butterfly_bwd")
    return found["dx"][:M], pull({name: found[f"d{name}"].sum(0) for name in weights})[0]


def _rounded(weights, dtype):
    return {name: w.astype(dtype) for name, w in weights.items()}


def _call(body, arrays, shapes, plan: Plan, interpret, name):
    """Results by name of a kernel that is given its references by name."""
    held, scratch = arrays["x"].dtype, {}
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
            dimension_semantics=("parallel", last), vmem_limit_bytes=plan.chip.limit
        ),
        cost_estimate=pl.CostEstimate(flops=plan.flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(shapes, found, strict=True))
