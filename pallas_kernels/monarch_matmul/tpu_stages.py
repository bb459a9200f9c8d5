"""The backward pass on a TPU in three kernels, where gradients of weights leave no room for rows.

z is kept by the forward pass. The transposed product of dy gives dx, and lets what it has between,
dz and the blocks of dy, leave too; then each block's gradient is a product of two arrays that are
read block by block. 8 M n elements cross HBM in place of 4, which large blocks hide, and as each
block's gradient is added up by one core, none is added or ordered in float32 but on chip.

Microseconds (static schedule or HBM, libtpu 0.0.52, M 8192): v6e 8192 by 8 1,126 in one kernel with
the 128 rows that it has room for, 732 so; v5p 8192 by 8 and by 16, which had been XLA's, 1,257
and 678.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interleave import LANES, unpack
from pallas_kernels.monarch_matmul import tpu_transposed, tpu_weights
from pallas_kernels.monarch_matmul.tpu_plan import Plan
from pallas_kernels.tpu_dot import dot


def backward(x, right, left, dy, z, plan: Plan, precision, interpret=False):
    """dx [M, K p], dright [1, K, p, q], dleft [1, L, r, s] in x's dtype; z: of the forward pass."""
    found = tpu_transposed.forward(dy, right, left, plan, precision, interpret)
    groups = plan.r // LANES  # tile i L + l of z is of block l
    z = [(z, LANES, lambda block, i=i: i * plan.L + block) for i in range(groups)]
    true_columns, true_rows = tpu_weights.true_columns, tpu_weights.true_rows

    def restore_right(rounded, block, out):
        for i in range(plan.q // LANES):
            columns = slice(i * LANES, (i + 1) * LANES)
            t = block * (plan.q // LANES) + i
            out[0, 0, :, columns] = true_columns(rounded[:, columns], t, plan)

    def restore_left(rounded, block, out):
        for i in range(groups):
            rows = slice(i * LANES, (i + 1) * LANES)
            out[0, 0, rows, :] = true_rows(rounded[rows, :], block, plan)

    whole = lambda array, width: (array, width, lambda block: block)  # noqa: E731
    sums = functools.partial(_sums, plan=plan, precision=precision, interpret=interpret)
    dright = sums("right", right, [whole(x, plan.p)], whole(found["z"], plan.q), restore_right)
    dleft = sums("left", left, z, whole(found["x_apart"], plan.s), restore_left)
    return found["y"], dright, dleft


def _sums(factor, weights, inputs, outputs, restore, *, plan: Plan, precision, interpret):
    """The gradient of a factor, [1, *its shape] in its dtype.

    Args:
      inputs: arrays by rows or by words, whose windows, one behind the other, are a block's inputs,
        each with the window's width and a function from the block to its place.
      outputs: the one with the gradients of a block's outputs.
      restore: puts the rounded sums of a block in true order into an output window.
    """
    blocks, I, O = weights.shape  # noqa: E741
    arrays, dtype = [*inputs, outputs], weights.dtype

    def window(array, width, place):
        rows = plan.sum_rows * array.shape[0] // plan.M
        return pl.BlockSpec((rows, width), lambda block, step: (step, place(block)))

    def kernel(*refs):
        *inputs, outputs, out, sums = refs
        block, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        inputs = unpack(jnp.concatenate([ref[...] for ref in inputs], axis=1), dtype)
        sums[...] += dot(inputs, unpack(outputs[...], dtype), precision, 0, 0)
        pl.when(step == plan.M // plan.sum_rows - 1)(
            lambda: restore(sums[...].astype(dtype), block, out)
        )

    moved = sum(plan.M * width for _, width, _ in arrays) * blocks + weights.size
    return pl.pallas_call(
        kernel,
        grid=(blocks, plan.M // plan.sum_rows),
        in_specs=[window(*each) for each in arrays],
        out_specs=pl.BlockSpec((1, 1, I, O), lambda block, step: (0, block, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((1, blocks, I, O), dtype),
        scratch_shapes=[pltpu.VMEM((I, O), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.chip.limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.M * weights.size,
            transcendentals=0,
            bytes_accessed=moved * plan.itemsize,
        ),
        interpret=interpret,
        name=f"monarch_sum_{factor}",
    )(*(array for array, _, _ in arrays))
