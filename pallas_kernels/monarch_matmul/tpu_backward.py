"""The backward pass on a TPU: gradients of x and of both factors in one visit of a row tile.

The inner features are computed again, which costs a fifth of the products and saves M K q elements
of memory traffic both ways. Gradients of the factors are added up on chip in float32, by core, in
the order of features of `tpu_weights`, and put into their true order in the last step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interleave import LANES, WORDS, aligned, collect, pack, tile, unpack
from pallas_kernels.monarch_matmul import tpu_weights
from pallas_kernels.monarch_matmul.tpu_forward import (
    compiler_params,
    cost,
    dot,
    exchange_all,
    first_product,
    join,
    over,
    put,
    tile_of,
)
from pallas_kernels.monarch_matmul.tpu_plan import Plan


def backward(x, right, left, dy, plan: Plan, precision, interpret=False):
    """dx [M, K p], and float32 dright [cores, K, p, q], dleft [cores, L, r, s] to be summed."""
    rows = lambda core, step: (core * (plan.steps // plan.cores) + step, 0)  # noqa: E731
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    inputs = pl.BlockSpec((plan.rows, plan.inputs), rows)
    words = jnp.int32 if plan.packed > 1 else jnp.float32
    state = tpu_weights.scratch(plan, x.dtype)
    state["z"] = pltpu.VMEM((plan.words, plan.inner), words)
    state["dy"] = pltpu.VMEM((plan.words, plan.outputs), words)
    state["dright"] = pltpu.VMEM(right.shape, jnp.float32)
    state["dleft"] = pltpu.VMEM(left.shape, jnp.float32)
    sums = [(plan.cores, *right.shape), (plan.cores, *left.shape)]
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, precision=precision),
        grid=(plan.cores, plan.steps // plan.cores),
        in_specs=[inputs, hbm, hbm, pl.BlockSpec((plan.rows, plan.outputs), rows)],
        out_specs=[inputs, hbm, hbm],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums),
        ],
        scratch_shapes=[state],
        compiler_params=compiler_params(),
        cost_estimate=cost(plan, times=2),
        interpret=interpret,
        name="monarch_bwd",
    )(x, right, left, dy)


def _kernel(x, right, left, dy, dx, dright, dleft, state, *, plan: Plan, precision):
    pl.when(pl.program_id(1) == 0)(lambda: tpu_weights.load(right, left, state, plan))
    _collect_all(dy, state["dy"], plan)
    first_product(x, state, plan, precision)
    exchange_all(state["z"], plan)
    _second_product(state, plan, precision, x.dtype)
    exchange_all(state["z"], plan)  # now dz, and back
    _first_product(x, dx, state, plan, precision)

    @pl.when(pl.program_id(1) == plan.steps // plan.cores - 1)
    def _():
        tpu_weights.restore(state, plan)
        core = pl.program_id(0)
        copies = [
            pltpu.make_async_copy(state["dright"], dright.at[core], state["copied"].at[0, 0]),
            pltpu.make_async_copy(state["dleft"], dleft.at[core], state["copied"].at[1, 0]),
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()


def _collect_all(dy, words, plan: Plan):
    """The blocks of left's outputs out of `dy`, into `words` [words, outputs]."""
    for group in range(plan.s // LANES):
        for row in range(0, plan.words, WORDS):
            rows = pl.ds(row * plan.packed, WORDS * plan.packed)
            tiles = [pack(dy[rows, tile(group * plan.L + i)]) for i in range(plan.L)]
            for i, collected in enumerate(collect(tiles)):
                words[pl.ds(row, WORDS), tile(i * plan.s // LANES + group)] = collected


def _second_product(state, plan: Plan, precision, dtype):
    """Gradients of left, and of the exchanged state["z"], in its place."""

    def product(block, column, width):
        # `width` of the block's rows, that is of its features in z, and all of its columns.
        tiles = [tile_of(column) + i for i in range(width // LANES)]
        z = join([state["z"][:, tile(i * plan.L + block)] for i in tiles], dtype)
        dy = unpack(state["dy"][:, pl.ds(aligned(block * plan.s), plan.s)], dtype)
        at = pl.ds(column, width)
        state["dleft"][block, at, :] += dot(z, dy, precision, ((0,), (0,)))
        dz = dot(dy, state["left"][block, at, :], precision, ((1,), (1,)))
        for n, i in enumerate(tiles):
            put(state["z"], (i * plan.L + block) * LANES, dz[:, n * LANES : (n + 1) * LANES], dtype)

    over(plan, plan.L, 2 * plan.s, plan.r, product)


def _first_product(x, dx, state, plan: Plan, precision):
    """Gradients of right and x of the gradient in state["z"]."""

    def product(block, column, width):
        dz = unpack(state["z"][:, pl.ds(aligned(block * plan.q), plan.q)], x.dtype)
        at, columns = pl.ds(column, width), pl.ds(aligned(block * plan.p + column), width)
        state["dright"][block, at, :] += dot(x[:, columns], dz, precision, ((0,), (0,)))
        found = dot(dz, state["right"][block, at, :], precision, ((1,), (1,)))
        dx[:, columns] = found.astype(dx.dtype)

    over(plan, plan.K, 2 * plan.q, plan.p, product)
