"""Arguments of decode attention: one line that names what is wrong and what is accepted."""

import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check(q, k_cache, v_cache, lengths, pages, sinks, settings, implementation):
    """Raises ValueError for what `api.decode_attention` does not accept."""
    form = "B, S, K, H" if pages is None else "pages, page_size, K, H"
    for name, x, axes in (("q", q, "B, T, N, H"), ("k_cache", k_cache, form)):
        if getattr(x, "ndim", None) != 4 or 0 in x.shape:
            _fail(name, f"an array [{axes}] with no axis of 0, got {_shape(x)}")
        if x.dtype.name not in _DTYPES:
            _fail(name, f"of dtype {', '.join(_DTYPES)}; got {x.dtype.name}")
    for name, x, like in (("k_cache", k_cache, q), ("v_cache", v_cache, k_cache)):
        if getattr(x, "dtype", None) != like.dtype:
            _fail(name, f"of q's dtype {q.dtype.name}, got {getattr(x, 'dtype', type(x).__name__)}")
    if v_cache.shape != k_cache.shape:
        _fail("v_cache", f"of k_cache's shape {list(k_cache.shape)}, got {list(v_cache.shape)}")
    (B, _, N, H), K = q.shape, k_cache.shape[2]
    if k_cache.shape[3] != H:
        _fail("k_cache", f"of q's head size H, {H}; got {k_cache.shape[3]}")
    if N % K:
        _fail("k_cache", f"[{form}] with K a divisor of q's {N} heads, got K {K}")
    if pages is None and k_cache.shape[0] != B:
        _fail("k_cache", f"of q's batch B, {B}; got {k_cache.shape[0]}; or give pages")
    _check_integers("lengths", lengths, f"[{B}]", lambda shape: shape == (B,))
    if pages is not None:
        fits = lambda shape: len(shape) == 2 and shape[0] == B and shape[1]  # noqa: E731
        _check_integers("pages", pages, f"[{B}, max_pages]", fits)
    floating = sinks is None or jnp.issubdtype(getattr(sinks, "dtype", None), jnp.floating)
    if not floating or getattr(sinks, "shape", (N,)) != (N,):
        _fail("sinks", f"floating [{N}], one a query head; got {_shape(sinks)}")
    _check_settings(settings)
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")


def _check_settings(settings):
    for name in ("scale", "softcap"):
        x = getattr(settings, name)
        positive = name == "softcap"
        if x is not None and not (_number(x) and np.isfinite(x) and (x > 0 or not positive)):
            _fail(name, f"a {'positive ' * positive}Python number or None, got {x!r}")
    for name in ("window", "splits"):
        x = getattr(settings, name)
        if x is not None and not (_number(x) and np.isfinite(x) and x == int(x) and x >= 1):
            _fail(name, f"a positive integer or None, got {x!r}")


def _number(x):
    return isinstance(x, (int, float, np.number)) and not isinstance(x, bool)


def _check_integers(name, x, form, fits):
    if not hasattr(x, "shape") or not fits(x.shape):
        _fail(name, f"integers {form}, got {_shape(x)}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        _fail(name, f"integers {form}, got dtype {x.dtype.name}")


def _shape(x):
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"decode_attention: {name} must be {must}")
