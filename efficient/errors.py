"""Errors a user can mend: one line that says what is wrong and how to put it right."""

import difflib
import importlib
import math
import types
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. `train.py` and `eval.py` print its one line and exit with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def optional(module: str, extra: str) -> types.ModuleType:
    """Imports a package of an extra of the installation; one line says which where it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed: pip install -e ".[{extra}]"') from None


def check_finite(name: str, array) -> None:
    """Refuses an array of which any value is NaN or infinite; `name` says whose it is and where."""
    wrong = array.size - int((abs(array) < math.inf).sum())
    if wrong:
        raise UserError(
            f"{name} has {wrong} value(s) that are not finite; start from an earlier checkpoint"
        )


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest of `options`, or all of them where none is near."""
    options = sorted(set(options))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if not options:
        return "nothing is allowed here"
    return "one of: " + ", ".join(options[:30]) + (", ..." if len(options) > 30 else "")
