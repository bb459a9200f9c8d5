"""XLA form of block_sparse_matmul: products of live blocks alone, or of the whole matrix if faster.

On a CPU a column of blocks is one product, of the input blocks that it reads laid side by side, and
a row of blocks one for the gradients of its weights: in straight code where live blocks are few, in
a loop where they are many. Where blocks are small for their number, zeros cost less than blocks
moved, and the matrix is written out. Elsewhere columns of equal degree are one batched product for
each of their blocks, and nothing is laid side by side.
"""

import collections

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_sparse_matmul.settings import Settings, accumulator, combine
from pallas_kernels.epilogue import finish

# Live blocks up to which code is straight. Milliseconds forward and backward, and CPU seconds to
# compile, on one x86-64 core with 2,048 rows, straight and in a loop (JAX 0.10.2): n 2048 with 2 of
# 16 blocks of 128 in a column 78 and 3.2, 94 and 0.7; 4 of 32 blocks of 64 111 and 15, 180 and 1.4;
# 8 of 64 blocks of 32 221 and 34, 313 and 1.3.
UNROLL = 128
# The matrix is written out where its density is above the side of a block times this. Milliseconds
# written out and in a loop: n 1024, density 1/8, blocks of 16 68 and 103; n 2048, 1/8, 32 335 and
# 313; n 2048, 1/100, 8 262 and 74.
WRITTEN_OUT = 1 / 256
# Rows that a column's product takes at a time, so that what is laid side by side stays in a cache.
CHUNK = 512


def forward(x, blocks, u, v, gamma, bias, settings: Settings, *, save: bool, platform: str):
    """(y [M, O], before [M, O], z [M, r]) in x's dtype, of x [M, I].

    With `save` before, what the activation was given, and z = x U, else None; None too where there
    is no activation or no U.
    """
    dtype = x.dtype
    y = multiply(x, blocks, settings.mask, settings.precision, platform)
    z = None if u is None else _dot(x, u, settings.precision).astype(dtype)
    low = None if u is None else _dot(z, v, settings.precision)
    y = finish(combine(y, low, gamma), bias, None)
    before = y.astype(dtype) if save and settings.activation else None
    return finish(y, None, settings.activation).astype(dtype), before, z if save else None


def backward(x, dy, z, blocks, u, v, gamma, has_bias, settings: Settings, *, platform: str):
    """Gradients of gamma x B + (1 - gamma) (x U) V + bias for dy [M, O]; z = x U.

    Returns:
      dx [M, I] in x's dtype and, in the accumulator's dtype without the factors gamma and
      1 - gamma, those of blocks, U, V, and of the bias; None for what there is not.
    """
    precision, dtype = settings.precision, x.dtype
    dx = multiply(dy, blocks, settings.mask, precision, platform, transposed=True)
    d_blocks = weight_gradient(x, dy, settings.mask, blocks.shape[1:], precision, platform)
    low = du = dv = None
    if u is not None:
        dz = _dot(dy, v, precision, 1, 1).astype(dtype)
        low = _dot(dz, u, precision, 1, 1)
        du, dv = _dot(x, dz, precision, 0, 0), _dot(z, dy, precision, 0, 0)
    d_bias = jnp.sum(dy, 0, dtype=accumulator(dtype)) if has_bias else None
    return combine(dx, low, gamma).astype(dtype), d_blocks, du, dv, d_bias


def multiply(x, blocks, mask, precision, platform, transposed=False):
    """x B, or x B^T, in the accumulator's dtype."""
    written_out = platform == "cpu" and _written_out(blocks.shape[1:], mask)
    if written_out:
        _, bi, bo = blocks.shape
        none = jnp.zeros((1, bi, bo), blocks.dtype)
        whole = jnp.concatenate([blocks, none])[np.where(mask.live, mask.numbers, mask.count)]
        whole = whole.swapaxes(1, 2).reshape(mask.shape[0] * bi, -1)
        return _dot(x, whole, precision, 1, int(transposed))
    lines, blocks = (mask.rows, blocks.swapaxes(1, 2)) if transposed else (mask.columns, blocks)
    if platform != "cpu":
        return _batched_columns(x, blocks, lines, precision)
    by_column = _straight if mask.count <= UNROLL else _in_turn
    if x.shape[0] % CHUNK:
        return by_column(x, blocks, lines, precision)
    chunks = x.reshape(-1, CHUNK, x.shape[1])
    y = lax.map(lambda rows: by_column(rows, blocks, lines, precision), chunks)
    return y.reshape(x.shape[0], -1)


def weight_gradient(x, dy, mask, block, precision, platform):
    """x^T dy [nnz, bi, bo] on the live blocks, in the accumulator's dtype."""
    bi, bo = block
    if platform == "cpu" and _written_out(block, mask):
        whole = _dot(x, dy, precision, 0, 0).reshape(mask.shape[0], bi, mask.shape[1], bo)
        return whole.swapaxes(1, 2)[mask.live.nonzero()]
    if platform != "cpu" or not mask.count:
        of_rows, of_columns = mask.live.nonzero()
        left = x.reshape(x.shape[0], -1, bi).swapaxes(0, 1)[of_rows]
        right = dy.reshape(dy.shape[0], -1, bo).swapaxes(0, 1)[of_columns]
        return _batched(left, right, 1, 1, precision)

    def of_row(at):
        """[degree, bi, bo] of the row that starts here, whose columns start there."""
        row, columns = at
        read = _slices(dy, columns, bo)
        part = _dot(lax.dynamic_slice_in_dim(x, row, bi, 1), read, precision, 0, 0)
        return part.reshape(bi, len(columns), bo).swapaxes(0, 1)

    order, parts = [], []
    for which, read, numbers in _by_degree(mask.rows):
        at = which * bi, read * bo
        if mask.count <= UNROLL:
            parts += map(of_row, zip(*at, strict=True))
        else:
            parts.append(lax.map(of_row, at).reshape(-1, bi, bo))
        order.append(numbers.reshape(-1))
    return jnp.concatenate(parts)[np.argsort(np.concatenate(order))]


def _written_out(block, mask):
    return mask.density > min(block) * WRITTEN_OUT


def _straight(x, blocks, columns, precision):
    """x B [M, O] in straight code."""
    _, bi, bo = blocks.shape
    none = jnp.zeros((x.shape[0], bo), accumulator(x.dtype))
    parts = [none] * len(columns)
    for which, read, numbers in _by_degree(columns):
        for column, rows, live in zip(which, read * bi, numbers, strict=True):
            weights = jnp.concatenate([blocks[n] for n in live])
            parts[column] = _dot(_slices(x, rows, bi), weights, precision)
    return jnp.concatenate(parts, 1)


def _in_turn(x, blocks, columns, precision):
    """x B [M, O] in a loop over the columns of each degree."""
    _, bi, bo = blocks.shape

    def step(y, of_column):
        column, rows, weights = of_column
        part = _dot(_slices(x, rows, bi), weights, precision)
        return lax.dynamic_update_slice_in_dim(y, part, column, 1), None

    y = jnp.zeros((x.shape[0], len(columns) * bo), accumulator(x.dtype))
    for which, read, numbers in _by_degree(columns):
        weights = blocks[numbers].reshape(len(which), -1, bo)
        y, _ = lax.scan(step, y, (which * bo, read * bi, weights))
    return y


def _batched_columns(x, blocks, columns, precision):
    """x B [M, O], for columns of a degree one batched product for each of their blocks."""
    _, bi, bo = blocks.shape
    inputs = x.reshape(x.shape[0], -1, bi).swapaxes(0, 1)
    order = [c for c, column in enumerate(columns) if not column]
    parts = [jnp.zeros((len(order), x.shape[0], bo), accumulator(x.dtype))]
    for which, read, numbers in _by_degree(columns):
        order.extend(which)
        parts.append(
            sum(
                _batched(inputs[rows], blocks[live], 2, 1, precision)
                for rows, live in zip(read.T, numbers.T, strict=True)
            )
        )
    y = jnp.concatenate(parts)[np.argsort(order)]
    return y.swapaxes(0, 1).reshape(x.shape[0], -1)


def _slices(a, starts, width):
    """Columns [start, start + width) of a [M, n], side by side."""
    return jnp.concatenate([lax.dynamic_slice_in_dim(a, start, width, 1) for start in starts], 1)


def _by_degree(columns):
    """For each degree but 0: the columns that have it [n], their rows and numbers [n, degree]."""
    found = collections.defaultdict(list)
    for c, column in enumerate(columns):
        found[len(column)].append(c)
    for degree, which in found.items():
        if degree:
            live = np.array([columns[c] for c in which], int)
            yield np.array(which), live[..., 0], live[..., 1]


def _dot(a, b, precision, of_a=1, of_b=0):
    return lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision, accumulator(a.dtype)
    )  # fmt: skip


def _batched(a, b, of_a, of_b, precision):
    return lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((0,), (0,))), precision, accumulator(a.dtype)
    )
