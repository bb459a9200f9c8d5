"""Arguments of `butterfly_matmul`: one line that names what is wrong and what is accepted."""

import jax.numpy as jnp

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128")


def check(x, twiddle, increasing, implementation):
    """Raises ValueError for what `api.butterfly_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., n b] with no axis of 0, got {_shape(x)}")
    if x.dtype.name not in _DTYPES:
        _fail("x", f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
    shape = getattr(twiddle, "shape", ())
    form = "[log2(n), n / 2, 2, 2] or [log2(n), n / 2, 2, 2, b, b]"
    if len(shape) not in (4, 6) or 0 in shape or shape[2:4] != (2, 2) or shape[4:5] != shape[5:]:
        _fail("twiddle", f"an array {form}, got {_shape(twiddle)}")
    if 2 ** shape[0] != 2 * shape[1]:
        stages = max(1, (2 * shape[1] - 1).bit_length())
        _fail(
            "twiddle",
            f"{form}: {shape[0]} factors are for n = {2 ** shape[0]}, got n = {2 * shape[1]}; "
            f"{2**stages} blocks take {stages}",
        )
    features = 2 * shape[1] * (shape[4] if len(shape) == 6 else 1)
    if x.shape[-1] != features:
        _fail("x", f"[..., {features}], n b of twiddle {list(shape)}; got {_shape(x)}")
    if twiddle.dtype != x.dtype:
        _fail("twiddle", f"of x's dtype {x.dtype.name}, got {jnp.dtype(twiddle.dtype).name}")
    if not isinstance(increasing, bool):
        _fail("increasing", f"True or False, got {increasing!r}")
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"butterfly_matmul: {name} must be {must}")
