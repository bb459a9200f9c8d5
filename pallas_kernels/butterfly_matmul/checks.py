"""Arguments of `butterfly_matmul`: one line that names what is wrong and what is accepted."""

import functools

from pallas_kernels import arguments

_OP = "butterfly_matmul"
_fail, _shape = functools.partial(arguments.fail, _OP), arguments.shape
_DTYPES = (*arguments.DTYPES, "complex64", "complex128")


def check(x, twiddle, increasing, implementation):
    """Raises ValueError for what `api.butterfly_matmul` does not accept."""
    if getattr(x, "ndim", 0) < 1 or 0 in x.shape:
        _fail("x", f"an array [..., n b] with no axis of 0, got {_shape(x)}")
    arguments.dtype(_OP, x, _DTYPES)
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
    arguments.same_dtype(_OP, x, twiddle=twiddle)
    if not isinstance(increasing, bool):
        _fail("increasing", f"True or False, got {increasing!r}")
    arguments.one_of(_OP, "implementation", implementation, arguments.IMPLEMENTATIONS)
