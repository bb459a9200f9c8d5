"""The backward pass on a TPU: gradients of x and of both factors in one visit of a row tile.

The inner features are computed again, which costs a fifth of the products, or come from the forward
pass, which costs M K q elements of memory, and of traffic both ways: `tpu_plan.keeps` says where.

Gradients of the factors are added up on chip in float32, by core, in the order of features of
`tpu_weights`, and put into their true order in the last step. There a chip of one core rounds them,
since nothing is to be added: one pass of the matrix unit for the order of rows, not three, and half
the bytes, which no cast has to read again.
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


def backward(x, right, left, dy, z, plan: Plan, precision, interpret=False):
    """dx [M, K p], dright [cores, K, p, q], dleft [cores, L, r, s]: see `call`.

    z: the words that the forward pass kept, where the plan keeps them, or None.
    """

    def body(refs, plan):
        apart = "dx" if plan.lent else "dy_apart"
        collect_all(refs["dy"], refs[apart], plan)
        yield
        if not plan.kept:
            first_product(refs, "x", plan, precision)
            yield
            exchange_all(refs["z"], plan)
            yield
        second_back(refs, apart, "kept" if plan.kept else "z", plan, precision)
        yield
        exchange_all(refs["z"], plan)  # now dz, and back
        yield
        first_back(refs, "x", "dx", plan, precision)

    arrays = {"x": x, "right": right, "left": left, "dy": dy}
    if plan.kept:
        arrays["kept"] = z
    words = {"z": plan.inner} | ({} if plan.lent else {"dy_apart": plan.outputs})
    found = call(body, "monarch_bwd", arrays, ("dx", plan.inputs), words, plan, interpret)
    return found["dx"], found["dright"], found["dleft"]


def collect_all(dy, words, plan: Plan):
    """The blocks of left's outputs out of `dy`, into `words` [words, outputs], or as rows."""
    height = words.shape[0] // plan.words
    for group in range(plan.s // LANES):
        for row in range(0, plan.words, WORDS):
            rows = pl.ds(row * plan.packed, WORDS * plan.packed)
            tiles = [pack(dy[rows, tile(group * plan.L + i)]) for i in range(plan.L)]
            for i, collected in enumerate(collect(tiles)):
                if height > 1:
                    collected = unpack(collected, words.dtype)
                at = pl.ds(row * height, WORDS * height), tile(i * plan.s // LANES + group)
                words[at] = collected


def second_back(refs, of, z, plan: Plan, precision):
    """Of the blocks of outputs in refs[of] the gradient of z, exchanged, into refs["z"].

    And the gradient of left of the inner features in refs[z], which may be the same; not where z is
    None.
    """
    dtype = refs["left"].dtype

    def product(block, column, width):
        # `width` of the block's rows, that is of its features in z, and all of its columns.
        tiles = [tile_of(column) + i for i in range(width // LANES)]
        dy = unpack(refs[of][:, pl.ds(aligned(block * plan.s), plan.s)], dtype)
        at = pl.ds(column, width)
        if z is not None:
            inner = join([refs[z][:, tile(i * plan.L + block)] for i in tiles], dtype)
            refs["dleft"][block, at, :] += dot(inner, dy, precision, 0, 0)
        dz = dot(dy, refs["left"][block, at, :], precision, 1, 1)
        for n, i in enumerate(tiles):
            lanes = slice(n * LANES, (n + 1) * LANES)
            put(refs["z"], (i * plan.L + block) * LANES, dz[:, lanes], dtype)

    over(plan, plan.L, 2 * plan.s, plan.r, product)


def first_back(refs, of, into, plan: Plan, precision):
    """refs[into] of the gradient in refs["z"], and the gradient of right of refs[of].

    Neither where its name is None.
    """
    dtype = refs["right"].dtype

    def product(block, column, width):
        dz = unpack(refs["z"][:, pl.ds(aligned(block * plan.q), plan.q)], dtype)
        at, columns = pl.ds(column, width), pl.ds(aligned(block * plan.p + column), width)
        if of is not None:
            refs["dright"][block, at, :] += dot(refs[of][:, columns], dz, precision, 0, 0)
        if into is not None:
            found = dot(dz, refs["right"][block, at, :], precision, 1, 1)
            refs[into][:, columns] = found.astype(dtype)

    over(plan, plan.K, 2 * plan.q, plan.p, product)
