"""Arguments of `block_diagonal_matmul`: one line that names what is wrong and what is accepted."""

import functools

from pallas_kernels import arguments
from pallas_kernels.block_diagonal_matmul.permutation import Permutation, Stride
from pallas_kernels.epilogue import ACTIVATIONS

_OP = "block_diagonal_matmul"
_fail, _shape = functools.partial(arguments.fail, _OP), arguments.shape


def check(x, blocks, bias, permute_inputs, permute_outputs, activation, implementation):
    """Raises ValueError for what `api.block_diagonal_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., K p] with no axis of 0, got {_shape(x)}")
    arguments.dtype(_OP, x)
    if getattr(blocks, "ndim", 0) != 3 or 0 in blocks.shape:
        _fail("blocks", f"an array [K, p, q] with no axis of 0, got {_shape(blocks)}")
    K, p, q = blocks.shape
    if x.shape[-1] != K * p:
        _fail("x", f"[..., {K * p}], K p of blocks {list(blocks.shape)}; got {_shape(x)}")
    if bias is not None and getattr(bias, "shape", None) != (K * q,):
        _fail("bias", f"[{K * q}] or None, got {_shape(bias)}")
    arguments.same_dtype(_OP, x, blocks=blocks, bias=bias)
    _check_permutation("permute_inputs", permute_inputs, K * p)
    _check_permutation("permute_outputs", permute_outputs, K * q)
    arguments.one_of(_OP, "activation", activation, (*ACTIVATIONS, None))
    arguments.one_of(_OP, "implementation", implementation, arguments.IMPLEMENTATIONS)


def _check_permutation(name, permutation, features):
    if permutation is None:
        return
    if not isinstance(permutation, (Stride, Permutation)):
        _fail(name, f"Stride(count), Permutation(order) or None; got {type(permutation).__name__}")
    misfit = permutation.misfit(features)
    if misfit:
        _fail(name, f"{misfit}; got {permutation!r:.60}")
