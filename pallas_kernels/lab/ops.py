"""Finds ops: folders with a `cases.py`, the project's own by name and anybody's by path."""

import dataclasses
import importlib
import sys
from pathlib import Path

from pallas_kernels.lab.case import Case
from pallas_kernels.lab.chips import nearest

_HOME = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Op:
    """An op's name and the folder that holds its `cases.py`."""

    name: str
    folder: Path


def known() -> dict[str, Op]:
    """The ops of this package, by name."""
    return {p.parent.name: Op(p.parent.name, p.parent) for p in sorted(_HOME.glob("*/cases.py"))}


def find(name: str) -> Op:
    """An op of this package by name, or any folder with a `cases.py` by path.

    Raises:
      ValueError: neither; the message names the nearest op.
    """
    ops = known()
    if name in ops:
        return ops[name]
    folder = Path(name)
    if (folder / "cases.py").is_file():
        return Op(folder.resolve().name, folder.resolve())
    if folder.is_dir():
        raise ValueError(f"{name!r} holds no cases.py; docs/kernels.md shows its form")
    raise ValueError(f"unknown op {name!r}; {nearest(name, ops)}; or give a folder with a cases.py")


def load(op: Op) -> list[Case]:
    """Imports the op's `cases.py` as a part of its package, so that it may import its siblings.

    Raises:
      ValueError: it cannot be imported or `CASES` is no list of `Case` with names of their own.
    """
    root = op.folder
    while (root.parent / "__init__.py").is_file():
        root = root.parent
    if str(root.parent) not in sys.path:
        sys.path.insert(0, str(root.parent))
    module = ".".join((*op.folder.relative_to(root.parent).parts, "cases"))
    try:
        cases = importlib.import_module(module).CASES
    except Exception as error:  # a user's file may fail in any way
        raise ValueError(f"{op.folder / 'cases.py'}: {type(error).__name__}: {error}") from error
    if not isinstance(cases, list) or not all(isinstance(c, Case) for c in cases):
        raise ValueError(
            f"{op.folder / 'cases.py'}: CASES has to be a list of pallas_kernels.lab.Case"
        )
    names = [c.name for c in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"{op.folder / 'cases.py'}: two cases have one name: {names}")
    return cases
