"""Arguments of `monarch_matmul`: one line that names what is wrong and what is accepted."""

import functools

from pallas_kernels import arguments
from pallas_kernels.epilogue import ACTIVATIONS

_OP = "monarch_matmul"
_fail, _shape = functools.partial(arguments.fail, _OP), arguments.shape


def check(x, right, left, bias, activation, implementation):
    """Raises ValueError for what `api.monarch_matmul` does not accept."""
    for name, a, axes in (
        ("x", x, "..., K p"),
        ("right", right, "K, p, q"),
        ("left", left, "L, r, s"),
    ):
        least = 1 if name == "x" else 3
        ndim = getattr(a, "ndim", -1)
        if ndim < least or (least == 3 and ndim != 3) or 0 in a.shape:
            _fail(name, f"an array [{axes}] with no axis of 0, got {_shape(a)}")
    arguments.dtype(_OP, x)
    (K, p, q), (L, r, s) = right.shape, left.shape
    if x.shape[-1] != K * p:
        _fail("x", f"[..., {K * p}], K p of right {list(right.shape)}; got {_shape(x)}")
    if K * q != L * r:
        _fail("left", f"[L, r, s] with L r = {K * q}, K q of right; got {_shape(left)}")
    if bias is not None and getattr(bias, "shape", None) != (L * s,):
        _fail("bias", f"[{L * s}] or None, got {_shape(bias)}")
    arguments.same_dtype(_OP, x, right=right, left=left, bias=bias)
    arguments.one_of(_OP, "activation", activation, (*ACTIVATIONS, None))
    arguments.one_of(_OP, "implementation", implementation, arguments.IMPLEMENTATIONS)
