"""Checks of arguments that ops share: one line that names what is wrong and what is accepted."""

from typing import NoReturn

IMPLEMENTATIONS = (None, "reference", "blockwise", "tpu", "gpu")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def fail(op: str, name: str, must: str) -> NoReturn:
    """Raises ValueError: argument `name` of `op` must be `must`."""
    raise ValueError(f"{op}: {name} must be {must}")


def shape(x) -> str:
    """The shape of an array in words, or the type of what is none."""
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__


def one_of(op: str, name: str, x, options: tuple) -> None:
    """Raises ValueError for what is none of `options`, names and perhaps None."""
    if not (x is None or isinstance(x, str)) or x not in options:
        fail(op, name, f"one of {', '.join(map(repr, options))}; got {x!r}")


def dtype(op: str, x, options: tuple[str, ...] = DTYPES) -> None:
    """Raises ValueError for an array x of another dtype."""
    if x.dtype.name not in options:
        fail(op, "x", f"of dtype {', '.join(options)}; got {x.dtype.name}")


def same_dtype(op: str, x, **arrays) -> None:
    """Raises ValueError for arrays that have not x's dtype; None is no array."""
    for name, a in arrays.items():
        if a is not None and a.dtype != x.dtype:
            fail(op, name, f"of x's dtype {x.dtype.name}, got {a.dtype.name}")
