"""XLA form of block_sparse_matmul: products of live blocks alone.

On CPUs each column of blocks is one product, of the input blocks that it reads laid side by side;
its weight gradient is one product a row of blocks. That is a long program: where blocks are small
or columns many, those of equal degree are one batched product. Elsewhere they are one for each of
their blocks, and nothing is laid side by side.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.settings import Settings, accumulator, combine
from pallas_kernels.epilogue import finish

# Columns (rows, for gradients) up to which, and sides of a block from which, each is a product of
# its own.
UNROLL, LEAST_SIDE = 64, 32
# Rows that a column's product takes at a time, so that what is laid side by side stays in a cache.
CHUNK = 512


def forward(x, blocks, u, v, gamma, bias, settings: Settings, *, save: bool, platform: str):
    """(y [M, O], before [M, O], z [M, r]) in x's dtype, of x [M, I].

    With `save` before, what the activation was given, and z = x U, else None; None too where there
    is no activation or no U.
    """
    dtype = x.dtype
    y = multiply(x, blocks, settings.mask.columns, settings.precision, platform)
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
    dx = multiply(dy, blocks.swapaxes(1, 2), settings.mask.rows, precision, platform)
    d_blocks = weight_gradient(x, dy, settings.mask, blocks.shape[1:], precision, platform)
    low = du = dv = None
    if u is not None:
        dz = _dot(dy, v, precision, 1, 1).astype(dtype)
        low = _dot(dz, u, precision, 1, 1)
        du, dv = _dot(x, dz, precision, 0, 0), _dot(z, dy, precision, 0, 0)
    d_bias = jnp.sum(dy, 0, dtype=accumulator(dtype)) if has_bias else None
    return combine(dx, low, gamma).astype(dtype), d_blocks, du, dv, d_bias


def multiply(x, blocks, columns, precision, platform):
    """x B [M, O] in the accumulator's dtype; `columns` as `BlockMask.columns`."""
    _, bi, bo = blocks.shape
    if platform == "cpu" and _unrolled(columns, bi, bo):
        if x.shape[0] % CHUNK:
            return _by_column(x, blocks, columns, precision)
        chunks = x.reshape(-1, CHUNK, x.shape[1])
        y = jax.lax.map(lambda rows: _by_column(rows, blocks, columns, precision), chunks)
        return y.reshape(x.shape[0], -1)
    rows = x.reshape(x.shape[0], -1, bi).swapaxes(0, 1)
    order, parts = [], []
    for degree, which in _by_degree(columns).items():
        order += which
        live = np.array([columns[c] for c in which], int).reshape(len(which), degree, 2)
        part = jnp.zeros((len(which), x.shape[0], bo), accumulator(x.dtype))
        if platform == "cpu" and degree:
            read = rows[live[..., 0]].swapaxes(1, 2).reshape(len(which), -1, degree * bi)
            weights = blocks[live[..., 1]].reshape(len(which), degree * bi, bo)
            part = _batched(read, weights, 2, 1, precision)
        else:
            for read, number in live.transpose(1, 2, 0):
                part += _batched(rows[read], blocks[number], 2, 1, precision)
        parts.append(part)
    y = jnp.concatenate(parts)[np.argsort(order)]
    return y.swapaxes(0, 1).reshape(x.shape[0], -1)


def weight_gradient(x, dy, mask, block, precision, platform):
    """x^T dy [nnz, bi, bo] on the live blocks, in the accumulator's dtype."""
    bi, bo = block
    if platform == "cpu" and _unrolled(mask.rows, bi, bo) and mask.count:
        parts = []
        for row, columns in enumerate(mask.rows):
            if columns:
                read = jnp.concatenate([dy[:, c * bo : (c + 1) * bo] for c, _ in columns], 1)
                part = _dot(x[:, row * bi : (row + 1) * bi], read, precision, 0, 0)
                parts.append(part.reshape(bi, len(columns), bo).swapaxes(0, 1))
        return jnp.concatenate(parts)
    of_rows, of_columns = mask.live.nonzero()
    left = x.reshape(x.shape[0], -1, bi).swapaxes(0, 1)[of_rows]
    right = dy.reshape(dy.shape[0], -1, bo).swapaxes(0, 1)[of_columns]
    return _batched(left, right, 1, 1, precision)


def _unrolled(columns, bi, bo):
    return len(columns) <= UNROLL and min(bi, bo) >= LEAST_SIDE


def _by_column(x, blocks, columns, precision):
    return jnp.concatenate([_column(x, blocks, c, precision) for c in columns], 1)


def _column(x, blocks, column, precision):
    """[M, bo] of one column, of live (row, number)."""
    _, bi, bo = blocks.shape
    if not column:
        return jnp.zeros((x.shape[0], bo), accumulator(x.dtype))
    read = jnp.concatenate([x[:, row * bi : (row + 1) * bi] for row, _ in column], 1)
    return _dot(read, jnp.concatenate([blocks[n] for _, n in column]), precision)


def _by_degree(columns):
    """Degree -> the columns that have so many live blocks."""
    found = collections.defaultdict(list)
    for c, column in enumerate(columns):
        found[len(column)].append(c)
    return found


def _dot(a, b, precision, of_a=1, of_b=0):
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision, accumulator(a.dtype)
    )  # fmt: skip


def _batched(a, b, of_a, of_b, precision):
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((0,), (0,))), precision, accumulator(a.dtype)
    )
