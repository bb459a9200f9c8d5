"""The backward pass on a TPU: gradients of x and of both factors in one visit of a row tile.

The inner features are computed again, which costs a fifth of the products and saves M K q elements
of memory, and of traffic both ways. Kept by the forward pass they win where blocks are large:
forward and backward together, microseconds computed again and kept (static schedule, libtpu
0.0.52), v6e 4096 by 4 576 and 508, 4096 by 8 316 and 319; v5e 4096 by 16 624 and 659.

Gradients of the factors are added up on chip in float32, by core, in the order of features of
`tpu_weights`, and put into their true order in the last step. There a chip of one core rounds them,
since nothing is to be added: one pass of the matrix unit for the order, not three, and half the
bytes, which no cast has to read again.
"""

from jax.experimental import pallas as pl

from pallas_kernels.interleave import LANES, WORDS, aligned, collect, pack, tile, unpack
from pallas_kernels.monarch_matmul.tpu_call import call
from pallas_kernels.monarch_matmul.tpu_forward import (
    exchange_all,
    first_product,
    join,
    over,
    put,
    tile_of,
)
from pallas_kernels.monarch_matmul.tpu_plan import Plan
from pallas_kernels.tpu_dot import dot


def backward(x, right, left, dy, plan: Plan, precision, interpret=False):
    """dx [M, K p], dright [cores, K, p, q], dleft [cores, L, r, s]: see `call`."""

    def body(refs, state, plan):
        collect_all(refs["dy"], state["dy"], plan)
        first_product(refs["x"], state, plan, precision)
        exchange_all(state["z"], plan)
        second_back(state, "dy", plan, precision)
        exchange_all(state["z"], plan)  # now dz, and back
        first_back(refs["x"], refs["dx"], state, plan, precision)

    arrays = {"x": x, "right": right, "left": left, "dy": dy}
    words = {"z": plan.inner, "dy": plan.outputs}
    found = call(body, "monarch_bwd", arrays, ("dx", plan.inputs), words, plan, interpret)
    return found["dx"], found["dright"], found["dleft"]


def collect_all(dy, words, plan: Plan):
    """The blocks of left's outputs out of `dy`, into `words` [words, outputs]."""
    for group in range(plan.s // LANES):
        for row in range(0, plan.words, WORDS):
            rows = pl.ds(row * plan.packed, WORDS * plan.packed)
            tiles = [pack(dy[rows, tile(group * plan.L + i)]) for i in range(plan.L)]
            for i, collected in enumerate(collect(tiles)):
                words[pl.ds(row, WORDS), tile(i * plan.s // LANES + group)] = collected


def second_back(state, of, plan: Plan, precision):
    """Of the blocks of outputs in state[of] the gradient of z, exchanged, in place of z.

    In a backward pass z is there before, and the gradient of left is added up.
    """
    dtype = state["left"].dtype

    def product(block, column, width):
        # `width` of the block's rows, that is of its features in z, and all of its columns.
        tiles = [tile_of(column) + i for i in range(width // LANES)]
        dy = unpack(state[of][:, pl.ds(aligned(block * plan.s), plan.s)], dtype)
        at = pl.ds(column, width)
        if plan.backward:
            z = join([state["z"][:, tile(i * plan.L + block)] for i in tiles], dtype)
            state["dleft"][block, at, :] += dot(z, dy, precision, 0, 0)
        dz = dot(dy, state["left"][block, at, :], precision, 1, 1)
        for n, i in enumerate(tiles):
            put(state["z"], (i * plan.L + block) * LANES, dz[:, n * LANES : (n + 1) * LANES], dtype)

    over(plan, plan.L, 2 * plan.s, plan.r, product)


def first_back(x, dx, state, plan: Plan, precision):
    """dx of the gradient in state["z"], and the gradient of right of x; not where it is None."""
    dtype = state["right"].dtype

    def product(block, column, width):
        dz = unpack(state["z"][:, pl.ds(aligned(block * plan.q), plan.q)], dtype)
        at, columns = pl.ds(column, width), pl.ds(aligned(block * plan.p + column), width)
        if x is not None:
            state["dright"][block, at, :] += dot(x[:, columns], dz, precision, 0, 0)
        if dx is not None:
            found = dot(dz, state["right"][block, at, :], precision, 1, 1)
            dx[:, columns] = found.astype(dtype)

    over(plan, plan.K, 2 * plan.q, plan.p, product)
