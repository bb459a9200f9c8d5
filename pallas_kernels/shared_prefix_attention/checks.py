"""Arguments of attention over shared prefixes: one line on what is wrong and what is accepted.

What `attention` and `decode_attention` check of their own arguments is theirs to say.
"""

import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check(q, prefixes, Level, suffixes, of_them, scale, softcap, implementation):
    """The levels; raises ValueError for what `api.shared_prefix_attention` does not accept.

    Args:
      suffixes: arguments by name of which all or none are given; of_them: those that need them.
    """
    if getattr(q, "ndim", None) != 4 or 0 in q.shape:
        _fail("q", f"an array [B, T, N, H] with no axis of 0, got {_shape(q)}")
    if q.dtype.name not in _DTYPES:
        _fail("q", f"of dtype {', '.join(_DTYPES)}; got {q.dtype.name}")
    if isinstance(prefixes, Level) or not isinstance(prefixes, (list, tuple)):
        _fail("prefixes", f"a list of Level, got {type(prefixes).__name__}")
    for i, level in enumerate(prefixes):
        if not isinstance(level, Level):
            _fail(f"prefixes[{i}]", f"a Level, got {type(level).__name__}")
        _check_level(f"prefixes[{i}]", level, q)
    given = [x is not None for x in suffixes.values()]
    if any(given) and not all(given):
        _fail("k_cache, v_cache and lengths", "given together, or none of them")
    for name, x in of_them.items():
        if x is not None and not any(given):
            _fail(name, "None without k_cache, of which it tells")
    if not prefixes and not any(given):
        _fail("prefixes", "at least one Level where there is no k_cache")
    _check_number("scale", scale, "a Python number or None", lambda x: True)
    _check_number("softcap", softcap, "a positive Python number or None", lambda x: x > 0)
    if implementation not in IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, IMPLEMENTATIONS))
        _fail("implementation", f"one of {accepted}; got {implementation!r}")
    return list(prefixes)


def _check_level(name, level, q):
    B, _, N, H = q.shape
    for part in ("k", "v"):
        x = getattr(level, part)
        if getattr(x, "ndim", None) != 4 or 0 in x.shape:
            _fail(f"{name}.{part}", f"an array [G, P, K, H] with no axis of 0, got {_shape(x)}")
        if x.dtype != q.dtype:
            _fail(f"{name}.{part}", f"of q's dtype {q.dtype.name}, got {x.dtype.name}")
    G, _, K, size = level.k.shape
    if level.v.shape != level.k.shape:
        _fail(f"{name}.v", f"of k's shape {list(level.k.shape)}, got {list(level.v.shape)}")
    if size != H or N % K:
        form = f"[G, P, K, {H}] with K a divisor of q's {N} heads"
        _fail(f"{name}.k", f"{form}, got {list(level.k.shape)}")
    if level.groups is None and B % G:
        _fail(f"{name}.groups", f"integers [{B}] where {G} prefixes do not divide a batch of {B}")
    for part, count in (("lengths", G), ("groups", B)):
        x = getattr(level, part)
        if x is None:
            continue
        if getattr(x, "shape", None) != (count,) or not jnp.issubdtype(x.dtype, jnp.integer):
            _fail(f"{name}.{part}", f"integers [{count}] or None, got {_shape(x)}")


def _check_number(name, x, accepted, fits):
    number = isinstance(x, (int, float, np.number)) and not isinstance(x, bool)
    if x is not None and not (number and np.isfinite(x) and fits(x)):
        _fail(name, f"{accepted}, got {x!r}")


def _shape(x):
    return f"{x.dtype.name} {list(x.shape)}" if hasattr(x, "shape") else type(x).__name__


def _fail(name, must):
    raise ValueError(f"shared_prefix_attention: {name} must be {must}")
