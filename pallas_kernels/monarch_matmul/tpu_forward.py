"""The forward pass on a TPU: both products and both permutations in one visit of a row tile.

Static schedule (libtpu 0.0.51, bfloat16, M 8192, n 4096, 16 blocks), for what was tried; HBM alone
takes 84 us on v6e and 169 on v5e, the products at the peak 37 and 174:

                                                          v6e      v5e
    tiles packed by a cast of bfloat16 in memory         81 us   373 us
    packed in registers, kept as words of 32 bits        71      201
    features ordered so that tiles swap in pairs         67      195
    512 rows a step instead of 256                       62      192

On v5e a bfloat16 tile in memory is 8 x 128, half a register, so that a cast to words of 32 bits
goes through memory; kept as words it is free.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.epilogue import finish
from pallas_kernels.interleave import (
    LANES,
    WORDS,
    aligned,
    exchange,
    pack,
    spread,
    tile,
    unpack,
)
from pallas_kernels.monarch_matmul import tpu_weights
from pallas_kernels.monarch_matmul.tpu_plan import VMEM_LIMIT, Plan

# Of a turn of a loop of products: 4,096 bundles on a v5e.
TURN_FLOPS = 2**29


def forward(x, right, left, bias, plan: Plan, activation, precision, interpret=False):
    """y [M, L s] of x [M, K p]; bias [L, s] in the order of `spread`, or None."""
    rows = lambda core, step: (core * (plan.steps // plan.cores) + step, 0)  # noqa: E731
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    specs = [pl.BlockSpec((plan.rows, plan.inputs), rows), hbm, hbm]
    arrays = [x, right, left]
    if bias is not None:
        specs.append(pl.BlockSpec((plan.L, 1, plan.s), lambda core, step: (0, 0, 0)))
        arrays.append(bias[:, None, :])
    words = jnp.int32 if plan.packed > 1 else jnp.float32
    state = tpu_weights.scratch(plan, x.dtype)
    state["z"] = pltpu.VMEM((plan.words, plan.inner), words)
    state["y"] = pltpu.VMEM((plan.words, plan.outputs), words)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, activation=activation, precision=precision),
        grid=(plan.cores, plan.steps // plan.cores),
        in_specs=specs,
        out_specs=pl.BlockSpec((plan.rows, plan.outputs), rows),
        out_shape=jax.ShapeDtypeStruct((plan.M, plan.outputs), x.dtype),
        scratch_shapes=[state],
        compiler_params=compiler_params(),
        cost_estimate=cost(plan),
        interpret=interpret,
        name="monarch_fwd",
    )(*arrays)


def compiler_params():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


def cost(plan: Plan, times: int = 1) -> pl.CostEstimate:
    """For XLA's scheduler."""
    arrays = plan.M * (plan.inputs + plan.outputs) + plan.cores * plan.weights
    return pl.CostEstimate(
        flops=times * plan.flops,
        transcendentals=0,
        bytes_accessed=times * plan.itemsize * arrays,
    )


def _kernel(x, right, left, *rest, plan: Plan, activation, precision):
    *bias, y, state = rest
    pl.when(pl.program_id(1) == 0)(lambda: tpu_weights.load(right, left, state, plan))
    first_product(x, state, plan, precision)
    exchange_all(state["z"], plan)

    def store(block, column, product):
        if bias:
            product += bias[0][block, :, pl.ds(column, product.shape[1])].astype(product.dtype)
        put(state["y"], block * plan.s + column, finish(product, None, activation), y.dtype)

    second_product(state, plan, precision, store)
    for group in range(plan.s // LANES):
        for row in range(0, plan.words, WORDS):
            words = pl.ds(row, WORDS)
            tiles = [state["y"][words, tile(i * plan.s // LANES + group)] for i in range(plan.L)]
            for i, spreaded in enumerate(spread(tiles)):
                rows = pl.ds(row * plan.packed, WORDS * plan.packed)
                y[rows, tile(group * plan.L + i)] = unpack(spreaded, y.dtype)


def first_product(x, state, plan: Plan, precision):
    """state["z"] of x, in tiles that are not exchanged yet."""

    def product(block, column, width):
        weights = state["right"][block, :, pl.ds(column, width)]
        z = dot(x[:, pl.ds(aligned(block * plan.p), plan.p)], weights, precision)
        put(state["z"], block * plan.q + column, z, x.dtype)

    over(plan, plan.K, plan.p, plan.q, product)


def second_product(state, plan: Plan, precision, store):
    """store(block of left, column, float32 [rows, width]) of the exchanged state["z"]."""

    def product(block, column, width):
        tiles = range(plan.r // LANES)
        z = join([state["z"][:, tile(i * plan.L + block)] for i in tiles], state["left"].dtype)
        store(block, column, dot(z, state["left"][block, :, pl.ds(column, width)], precision))

    over(plan, plan.L, plan.r, plan.s, product)


def exchange_all(words, plan: Plan):
    """Exchanges the tiles of `words` [words, inner] in place."""
    for group in range(plan.r // LANES):
        for row in range(0, plan.words, WORDS):
            at = [(pl.ds(row, WORDS), tile(group * plan.L + i)) for i in range(plan.L)]
            for place, exchanged in zip(at, exchange([words[i] for i in at]), strict=True):
                words[place] = exchanged


def put(words, lane, values, dtype):
    """Puts `values`, rounded to `dtype`, into `words` from this lane on."""
    values = pack(values.astype(dtype))
    words[:, pl.ds(aligned(lane), values.shape[1])] = values


def join(tiles, dtype):
    """Neighbouring columns in `dtype` of tiles of words."""
    return unpack(jnp.concatenate(tiles, axis=1), dtype)


def dot(a, b, precision, contract=((1,), (0,))):
    """a b in float32."""
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def over(plan: Plan, blocks, depth, columns, product):
    """product(block, column, width) over all columns of all blocks, whose products are this deep.

    In a loop, of as many FLOPs a turn as hide its start and end, for in one straight piece of code
    the registers of the exchanges and of the products get into each other's way.
    """
    one = 2 * plan.rows * depth
    width = next(w for w in range(columns, 0, -LANES) if columns % w == 0 and one * w <= TURN_FLOPS)
    chunks = columns // width
    turn = next(n for n in (8, 4, 2, 1) if blocks % n == 0 and n * one * width <= TURN_FLOPS)
    turn = turn if chunks == 1 else 1

    if plan.straight:
        for block in range(blocks):
            product(block, 0, columns)
        return

    def body(i, _):
        column = aligned(lax.rem(i, chunks) * width) if chunks > 1 else 0
        for j in range(turn):
            product(lax.div(i, chunks) * turn + j, column, width)
        return 0

    lax.fori_loop(0, blocks // turn * chunks, body, 0)


def tile_of(lane):
    return lane // LANES if isinstance(lane, int) else lax.div(lane, LANES)
