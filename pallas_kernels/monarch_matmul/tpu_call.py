"""How TPU kernels of `monarch_matmul` are called: rows pass in windows, weights stay on chip."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.monarch_matmul import tpu_weights
from pallas_kernels.monarch_matmul.tpu_plan import Plan


def call(
    body: Callable,
    name: str,
    arrays: Mapping[str, jax.Array],
    result: tuple[str, int],
    words: Mapping[str, int],
    plan: Plan,
    interpret,
) -> dict[str, jax.Array]:
    """Results by name of body(references by name, state, plan), run on every part of the rows.

    Args:
      arrays: "right", "left", perhaps "bias" [L, s], and others by rows, [M, width].
      result: name and width of what leaves by rows.
      words: name and width of scratch arrays of 32-bit words, of a tile of rows.

    Returns:
      The result in right's dtype, and of a backward pass dright [cores, K, p, q] and dleft
      [cores, L, r, s], in float32 where they are to be summed.
    """
    arrays, right, left = dict(arrays), arrays["right"], arrays["left"]
    by_rows = {result[0], *arrays} - {"right", "left", "bias"}
    rows = lambda core, step: (core * (plan.steps // plan.cores) + step, 0)  # noqa: E731
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    specs = {key: pl.BlockSpec((plan.rows, a.shape[-1]), rows) for key, a in arrays.items()}
    specs |= {"right": hbm, "left": hbm}
    if "bias" in arrays:
        arrays["bias"] = arrays["bias"][:, None, :]
        specs["bias"] = pl.BlockSpec((plan.L, 1, plan.s), lambda core, step: (0, 0, 0))
    out, width = result
    shapes = {out: jax.ShapeDtypeStruct((plan.M, width), right.dtype)}
    out_specs = [pl.BlockSpec((plan.rows, width), rows)]
    state = tpu_weights.scratch(plan, right.dtype)
    word = jnp.int32 if plan.packed > 1 else jnp.float32
    state |= {key: pltpu.VMEM((plan.words, width), word) for key, width in words.items()}
    if plan.backward:
        for key, weights in (("dright", right), ("dleft", left)):
            dtype = jnp.float32 if plan.cores > 1 else weights.dtype
            shapes[key] = jax.ShapeDtypeStruct((plan.cores, *weights.shape), dtype)
            state[key] = pltpu.VMEM(weights.shape, jnp.float32)
            out_specs.append(hbm)

    def kernel(*refs):
        *refs, state = refs
        refs = dict(zip((*arrays, *shapes), refs, strict=True))
        first, last = (pl.program_id(1) == i for i in (0, plan.steps // plan.cores - 1))
        pl.when(first)(lambda: tpu_weights.load(refs["right"], refs["left"], state, plan))
        for start in range(0, plan.rows, plan.chunk):
            at, packed = (pl.ds(start // n, plan.chunk // n) for n in (1, plan.packed))
            part = {k: ref.at[at] if k in by_rows else ref for k, ref in refs.items()}
            held = {k: ref.at[packed] if k in words else ref for k, ref in state.items()}
            body(part, held, plan._replace(rows=plan.chunk))
        if plan.backward:
            pl.when(last)(lambda: tpu_weights.store(state, refs["dright"], refs["dleft"], plan))

    found = pl.pallas_call(
        kernel,
        grid=(plan.cores, plan.steps // plan.cores),
        in_specs=[specs[key] for key in arrays],
        out_specs=out_specs,
        out_shape=list(shapes.values()),
        scratch_shapes=[state],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.chip.limit
        ),
        cost_estimate=_cost(plan),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(shapes, found, strict=True))


def _cost(plan: Plan) -> pl.CostEstimate:
    """For XLA's scheduler."""
    times = 2 if plan.backward else 1
    arrays = plan.M * (plan.inputs + plan.outputs) + plan.cores * plan.weights
    return pl.CostEstimate(
        flops=times * plan.flops,
        transcendentals=0,
        bytes_accessed=times * plan.itemsize * arrays,
    )
