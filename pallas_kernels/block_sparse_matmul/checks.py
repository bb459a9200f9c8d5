"""Arguments of block_sparse_matmul: one line that names what is wrong and what is accepted."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.block_sparse_matmul.mask import BlockMask
from pallas_kernels.epilogue import ACTIVATIONS

_OP = "block_sparse_matmul"
_fail, _shape = functools.partial(arguments.fail, _OP), arguments.shape
_PRECISIONS = ("default", "high", "highest")


def check(x, blocks, mask, u, v, gamma, bias, activation, implementation):
    """Raises ValueError for what `api.block_sparse_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., I] with no axis of 0, got {_shape(x)}")
    arguments.dtype(_OP, x)
    if not isinstance(mask, BlockMask):
        _fail("mask", f"a BlockMask, got {type(mask).__name__}; BlockMask(live) makes one")
    inputs, outputs = _check_blocks(x, blocks, mask)
    if (u is None) != (v is None):
        _fail("u and v", "given together or not at all")
    if u is not None:
        if getattr(u, "ndim", None) != 2 or u.shape[0] != inputs or not u.shape[1]:
            _fail("u", f"[{inputs}, r], got {_shape(u)}")
        if getattr(v, "shape", None) != (u.shape[1], outputs):
            _fail("v", f"[{u.shape[1]}, {outputs}], got {_shape(v)}")
    arguments.same_dtype(_OP, x, blocks=blocks, u=u, v=v)
    if gamma is not None and (u is None or not _floating(gamma, ())):
        _fail("gamma", f"a floating array [] beside u and v, or None; got {_shape(gamma)}")
    if bias is not None and not _floating(bias, (outputs,)):
        _fail("bias", f"floating [{outputs}] or None, got {_shape(bias)}")
    arguments.one_of(_OP, "activation", activation, (*ACTIVATIONS, None))
    arguments.one_of(_OP, "implementation", implementation, arguments.IMPLEMENTATIONS)


def _check_blocks(x, blocks, mask):
    rows, columns = mask.shape
    if getattr(blocks, "ndim", None) != 3 or blocks.shape[0] != mask.count:
        _fail("blocks", f"[{mask.count}, bi, bo], the live blocks; got {_shape(blocks)}")
    _, bi, bo = blocks.shape
    if rows * bi != x.shape[-1]:
        _fail(
            "mask",
            f"[I / bi, O / bo] with I {x.shape[-1]} and bi {bi}; got {list(mask.shape)}, which "
            f"is for I {rows * bi}",
        )
    return rows * bi, columns * bo


def precision_of(precision) -> jax.lax.Precision | None:
    """`precision` as XLA's.

    Raises:
      ValueError: another name.
    """
    if precision is None or isinstance(precision, jax.lax.Precision):
        return precision
    if not isinstance(precision, str) or precision not in _PRECISIONS:
        names = ", ".join(map(repr, _PRECISIONS))
        _fail("precision", f"one of None, {names}, or a jax.lax.Precision; got {precision!r}")
    return jax.lax.Precision[precision.upper()]


def _floating(x, shape):
    dtype = getattr(x, "dtype", None)
    return dtype is not None and x.shape == shape and jnp.issubdtype(dtype, jnp.floating)
