"""Arguments of block_sparse_matmul: one line that names what is wrong and what is accepted."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.mask import BlockMask
from pallas_kernels.block_sparse_matmul.settings import ACTIVATIONS

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
PRECISIONS = (None, "default", "high", "highest")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check(x, blocks, mask, u, v, gamma, bias, activation, implementation):
    """Raises ValueError for what `api.block_sparse_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., I] with no axis of 0, got {_shape(x)}")
    if x.dtype.name not in _DTYPES:
        _fail("x", f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
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
    for name, array in (("blocks", blocks), ("u", u), ("v", v)):
        if array is not None and array.dtype != x.dtype:
            _fail(name, f"of x's dtype {x.dtype.name}, got {array.dtype.name}")
    if gamma is not None and (u is None or not _floating(gamma, ())):
        _fail("gamma", f"a floating scalar beside u and v, or None; got {_shape(gamma)}")
    if bias is not None and not _floating(bias, (outputs,)):
        _fail("bias", f"floating [{outputs}] or None, got {_shape(bias)}")
    _one_of("activation", activation, (None, *ACTIVATIONS))
    _one_of("implementation", implementation, IMPLEMENTATIONS)


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
    if isinstance(precision, jax.lax.Precision):
        return precision
    _one_of("precision", precision, (*PRECISIONS, "a jax.lax.Precision"))
    return None if precision is None else jax.lax.Precision[precision.upper()]


def _floating(x, shape):
    dtype = getattr(x, "dtype", None)
    return dtype is not None and x.shape == shape and jnp.issubdtype(dtype, jnp.floating)


def _one_of(name, x, options):
    if not (x is None or isinstance(x, str)) or x not in options:
        _fail(name, f"one of {', '.join(map(repr, options))}; got {x!r}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"block_sparse_matmul: {name} must be {must}")
