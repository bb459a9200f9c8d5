"""Arguments of `block_diagonal_matmul`: one line that names what is wrong and what is accepted."""

from pallas_kernels.block_diagonal_matmul.permutation import Permutation, Stride
from pallas_kernels.epilogue import ACTIVATIONS

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check(x, blocks, bias, permute_inputs, permute_outputs, activation, implementation):
    """Raises ValueError for what `api.block_diagonal_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., K p] with no axis of 0, got {_shape(x)}")
    if x.dtype.name not in _DTYPES:
        _fail("x", f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
    if getattr(blocks, "ndim", 0) != 3 or 0 in blocks.shape:
        _fail("blocks", f"an array [K, p, q] with no axis of 0, got {_shape(blocks)}")
    K, p, q = blocks.shape
    if x.shape[-1] != K * p:
        _fail("x", f"[..., {K * p}], K p of blocks {list(blocks.shape)}; got {_shape(x)}")
    if bias is not None and getattr(bias, "shape", None) != (K * q,):
        _fail("bias", f"[{K * q}] or None, got {_shape(bias)}")
    for name, a in (("blocks", blocks), ("bias", bias)):
        if a is not None and a.dtype != x.dtype:
            _fail(name, f"of x's dtype {x.dtype.name}, got {a.dtype.name}")
    _check_permutation("permute_inputs", permute_inputs, K * p)
    _check_permutation("permute_outputs", permute_outputs, K * q)
    if activation not in (None, *ACTIVATIONS):
        _fail("activation", f"one of {', '.join(map(repr, ACTIVATIONS))}, None; got {activation!r}")
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")


def _check_permutation(name, permutation, features):
    if permutation is None:
        return
    if not isinstance(permutation, (Stride, Permutation)):
        _fail(name, f"Stride(count), Permutation(order) or None; got {type(permutation).__name__}")
    misfit = permutation.misfit(features)
    if misfit:
        _fail(name, f"{misfit}; got {permutation!r:.60}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"block_diagonal_matmul: {name} must be {must}")
