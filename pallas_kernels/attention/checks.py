"""Arguments of attention: one line that names what is wrong and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.masks import Mask

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check(
    arrays, segment_ids, mask, scale, softcap, dropout_rate, dropout_key, alibi_offset,
    implementation,
):  # fmt: skip
    """Raises ValueError for what `api.attention` does not accept."""
    q, k, v = (arrays[name] for name in "qkv")
    _check_qkv(q, k, v)
    (B, T, N, _), S = q.shape, k.shape[1]
    if not isinstance(mask, Mask):
        _fail("mask", f"a Mask of pallas_kernels.attention.masks, such as Causal(); got {mask!r}")
    mask.check(N, T, S)
    _check_segments(segment_ids, B, T, S)
    bias = arrays["bias"]
    if bias is not None:
        fits = getattr(bias, "ndim", None) == 4 and bias.shape[3] == S
        if not fits or any(x not in (1, y) for x, y in zip(bias.shape, (B, N, T))):
            form = f"an array [{B} or 1, {N} or 1, {T} or 1, {S}]"
            _fail("bias", f"{form}, got {_shape(bias)}")
        _check_float("bias", bias)
    for name in ("alibi", "sinks"):
        if arrays[name] is not None:
            if getattr(arrays[name], "shape", None) != (N,):
                _fail(name, f"an array [{N}], one a query head; got {_shape(arrays[name])}")
            _check_float(name, arrays[name])
    _check_number("scale", scale, "a Python number or None")
    _check_number("softcap", softcap, "a positive Python number or None", lambda x: x > 0)
    _check_number("alibi_offset", alibi_offset, "an integer or None", lambda x: x == int(x))
    rate = "a Python number from 0 to below 1"
    if dropout_rate is None:
        _fail("dropout_rate", f"{rate}, got None")
    _check_number("dropout_rate", dropout_rate, rate, lambda x: 0 <= x < 1)
    if dropout_rate and not _is_key(dropout_key):
        got = repr(dropout_key) if isinstance(dropout_key, int) else _shape(dropout_key)
        _fail("dropout_key", f"a jax.random key where dropout_rate is {dropout_rate}, got {got}")
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")


def _check_qkv(q, k, v):
    for name, x, form in (("q", q, "B, T, N, H"), ("k", k, "B, S, K, H"), ("v", v, "B, S, K, H")):
        if getattr(x, "ndim", None) != 4:
            _fail(name, f"an array [{form}], got {_shape(x)}")
        if 0 in x.shape:
            _fail(name, f"an array [{form}] with no axis of 0, got {_shape(x)}")
    if v.shape != k.shape:
        _fail("v", f"of k's shape {list(k.shape)}, got {list(v.shape)}")
    for axis, letter in ((0, "batch B"), (3, "head size H")):
        if q.shape[axis] != k.shape[axis]:
            _fail("k", f"of q's {letter}, {q.shape[axis]}; got {k.shape[axis]} in {list(k.shape)}")
    if q.shape[2] % k.shape[2]:
        _fail("k", f"[B, S, K, H] with K a divisor of q's {q.shape[2]} heads, got K {k.shape[2]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in _DTYPES:
            _fail(name, f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
        if x.dtype != q.dtype:
            _fail(name, f"of q's dtype {q.dtype.name}, got {x.dtype.name}")


def _check_segments(segment_ids, B, T, S):
    if segment_ids is None:
        return
    form = f"integers ([{B}, {T}], [{B}, {S}]) for queries and keys"
    if T == S:
        form += f", or one [{B}, {T}]"
    shapes = [getattr(x, "shape", None) for x in segment_ids]
    if shapes != [(B, T), (B, S)]:
        _fail("segment_ids", f"{form}; got {' and '.join(map(_shape, segment_ids))}")
    for x in segment_ids:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            _fail("segment_ids", f"{form}; got dtype {x.dtype.name}")


def _is_key(x):
    """Whether x is one key, of `jax.random.key` or of `jax.random.PRNGKey`."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return False
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return x.shape == ()
    old = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    return (x.shape, dtype) == (old.shape, old.dtype)


def _check_float(name, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        _fail(name, f"of a floating dtype, got {x.dtype.name}")


def _check_number(name, x, accepted, fits=lambda x: True):
    if x is None:
        return
    number = isinstance(x, (int, float, np.number)) and not isinstance(x, bool)
    if not number or not np.isfinite(x) or not fits(x):
        _fail(name, f"{accepted}, got {x!r}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"attention: {name} must be {must}")
