"""Arguments of `monarch_matmul`: one line that names what is wrong and what is accepted."""

from pallas_kernels.epilogue import ACTIVATIONS

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


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
    if x.dtype.name not in _DTYPES:
        _fail("x", f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
    (K, p, q), (L, r, s) = right.shape, left.shape
    if x.shape[-1] != K * p:
        _fail("x", f"[..., {K * p}], K p of right {list(right.shape)}; got {_shape(x)}")
    if K * q != L * r:
        _fail("left", f"[L, r, s] with L r = {K * q}, K q of right; got {_shape(left)}")
    if bias is not None and getattr(bias, "shape", None) != (L * s,):
        _fail("bias", f"[{L * s}] or None, got {_shape(bias)}")
    for name, a in (("right", right), ("left", left), ("bias", bias)):
        if a is not None and a.dtype != x.dtype:
            _fail(name, f"of x's dtype {x.dtype.name}, got {a.dtype.name}")
    if activation not in (None, *ACTIVATIONS):
        _fail("activation", f"one of {', '.join(map(repr, ACTIVATIONS))}, None; got {activation!r}")
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"monarch_matmul: {name} must be {must}")
