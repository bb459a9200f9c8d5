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

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

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
from pallas_kernels.monarch_matmul.tpu_call import call
from pallas_kernels.monarch_matmul.tpu_plan import Plan
from pallas_kernels.tpu_dot import dot

# Of a turn of a loop of products: 4,096 bundles on a v5e.
TURN_FLOPS = 2**29


def forward(x, right, left, bias, plan: Plan, activation, precision, interpret=False):
    """y [M, L s] of x [M, K p]; bias [L, s] in the order of `spread`, or None.

    Where the plan keeps z, "z" too: the exchanged inner features as words [M / packed, K q].
    """

    def body(refs, plan):
        first_product(refs, "x", plan, precision)
        yield
        exchange_all(refs["z"], plan)
        yield

        def store(block, column, product):
            if bias is not None:
                columns = pl.ds(column, product.shape[1])
                product += refs["bias"][block, :, columns].astype(product.dtype)
            product = finish(product, None, activation)
            put(refs["y_apart"], block * plan.s + column, product, x.dtype)

        second_product(refs, plan, precision, store)
        yield
        spread_all(refs["y_apart"], refs["y"], plan)

    arrays = {"x": x, "right": right, "left": left}
    if bias is not None:
        arrays["bias"] = bias
    words, leaving = {"z": plan.inner, "y_apart": plan.outputs}, ("z",) * plan.kept
    result = "y", plan.outputs
    return call(body, "monarch_fwd", arrays, result, words, plan, interpret, leaving)


def first_product(refs, of, plan: Plan, precision):
    """refs["z"] of the inputs refs[of], in tiles that are not exchanged yet."""
    x = refs[of]

    def product(block, column, width):
        weights = refs["right"][block, :, pl.ds(column, width)]
        z = dot(x[:, pl.ds(aligned(block * plan.p), plan.p)], weights, precision)
        put(refs["z"], block * plan.q + column, z, x.dtype)

    over(plan, plan.K, plan.p, plan.q, product)


def second_product(refs, plan: Plan, precision, store):
    """store(block of left, column, float32 [rows, width]) of the exchanged refs["z"]."""

    def product(block, column, width):
        tiles = range(plan.r // LANES)
        z = join([refs["z"][:, tile(i * plan.L + block)] for i in tiles], refs["left"].dtype)
        store(block, column, dot(z, refs["left"][block, :, pl.ds(column, width)], precision))

    over(plan, plan.L, plan.r, plan.s, product)


def exchange_all(words, plan: Plan):
    """Exchanges the tiles of `words` [words, inner] in place."""
    for group in range(plan.r // LANES):
        for row in range(0, plan.words, WORDS):
            at = [(pl.ds(row, WORDS), tile(group * plan.L + i)) for i in range(plan.L)]
            for place, exchanged in zip(at, exchange([words[i] for i in at]), strict=True):
                words[place] = exchanged


def spread_all(words, y, plan: Plan):
    """The blocks of left's outputs, one behind the other in `words`, into `y` in their order."""
    for group in range(plan.s // LANES):
        for row in range(0, plan.words, WORDS):
            at = pl.ds(row, WORDS)
            tiles = [words[at, tile(i * plan.s // LANES + group)] for i in range(plan.L)]
            for i, joined in enumerate(spread(tiles)):
                rows = pl.ds(row * plan.packed, WORDS * plan.packed)
                y[rows, tile(group * plan.L + i)] = unpack(joined, y.dtype)


def put(words, lane, values, dtype):
    """Puts `values`, rounded to `dtype`, into `words` from this lane on."""
    values = pack(values.astype(dtype))
    words[:, pl.ds(aligned(lane), values.shape[1])] = values


def join(tiles, dtype):
    """Neighbouring columns in `dtype` of tiles of words."""
    return unpack(jnp.concatenate(tiles, axis=1), dtype)


def over(plan: Plan, blocks, depth, columns, product):
    """product(block, column, width) over all columns of all blocks, whose products are this deep.

    In a loop, of as many FLOPs a turn as hide its start and end, for in one straight piece of code
    the registers of the exchanges and of the products get into each other's way.
    """
    if plan.straight:
        for block in range(blocks):
            product(block, 0, columns)
        return

    one = 2 * plan.rows * depth
    widths = (w for w in range(columns, 0, -LANES) if columns % w == 0 and one * w <= TURN_FLOPS)
    width = next(widths, LANES)
    chunks = columns // width
    turns = (n for n in (8, 4, 2) if blocks % n == 0 and n * one * width <= TURN_FLOPS)
    turn = next(turns, 1) if chunks == 1 else 1

    def body(i, _):
        column = aligned(lax.rem(i, chunks) * width) if chunks > 1 else 0
        for j in range(turn):
            product(lax.div(i, chunks) * turn + j, column, width)
        return 0

    lax.fori_loop(0, blocks // turn * chunks, body, 0)


def tile_of(lane):
    return lane // LANES if isinstance(lane, int) else lax.div(lane, LANES)
