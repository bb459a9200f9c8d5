"""The techniques by kind and name, and what each accepts.

A technique is one file in `efficient/<slot>/` that calls `register`. Its class (or function) is
called with what the host gives for its kind (see `KINDS`) and, as keyword-only arguments, with
what the config's rule says; the signature is the documentation and the check.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from efficient.errors import UserError, nearest

# kind -> (package that holds it, what the host passes before the rule's own arguments)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mixer": ("mixers", ("scope", "width", "causal")),
    "channel": ("channels", ("scope", "width")),
    "linear": ("linears", ("scope", "in_features", "out_features", "use_bias")),
    "norm": ("norms", ("scope", "width")),
    "wiring": ("wiring", ("scope", "width", "causal")),
    "embedding": ("embeddings", ("scope", "vocab_size", "width")),
    "position": ("embeddings", ("scope", "width", "max_length")),
    "objective": ("objectives", ()),
    "optimizer": ("optimizers", ("learning_rate", "decay_mask")),
    "schedule": ("schedules", ("total_steps",)),
    "surgery": ("surgery", ()),
    "selection": ("selection", ()),
    "sequence": ("parallel", ()),
}
DECLARATIONS = (
    "causal",
    "segments",
    "decode",
    "grid",
    "sequence",
    "straight_through",
    "replicas",
    "coupled",
)


@dataclasses.dataclass(frozen=True)
class Technique:
    """One registered technique: `build(*host_arguments, **rule_arguments)`."""

    kind: str
    name: str
    build: Callable[..., Any]
    declares: Mapping[str, Any]

    @functools.cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters, which a config may set."""
        target = self.build.__init__ if inspect.isclass(self.build) else self.build
        parameters = inspect.signature(target).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Annotations of `arguments`, resolved."""
        target = self.build.__init__ if inspect.isclass(self.build) else self.build
        return typing.get_type_hints(target)

    @property
    def file(self) -> str:
        """Import path of the file that holds the technique."""
        return self.build.__module__


_TECHNIQUES: dict[tuple[str, str], Technique] = {}


def register(kind: str, name: str, **declares) -> Callable:
    """Class or function decorator: makes a technique available to rules as `use=name`.

    Args:
      kind: one of `KINDS`.
      name: unique within the kind.
      **declares: what the technique can and cannot do, read by hosts and by the contract tests:
        `causal` (tuple of allowed values; default both), `segments` (False: packed sequences would
        leak, so they are refused), `decode` (False: no one-token form), `grid` (True: needs a
        two-dimensional layout of tokens), `sequence` (True: works on sequences that are split over
        devices), `straight_through` (True: its gradient is not the slope of what it computes),
        `replicas` (True: an optimizer with a state and a gradient on each replica of the mesh's
        data axis, along which its update communicates), `coupled` (True: an objective whose loss
        of an example depends on the others of its batch).

    Raises:
      UserError: the kind or a declaration is unknown, the name is taken, or the signature is not
        the host's arguments, then those of a config after `*`.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of technique {kind!r}; {nearest(kind, KINDS)}")
    for key in declares:
        if key not in DECLARATIONS:
            hint = nearest(key, DECLARATIONS)
            raise UserError(f"{kind} {name!r} declares {key!r}, which nothing reads; {hint}")

    def decorate(build):
        known = _TECHNIQUES.get((kind, name))
        if known is not None and known.file != build.__module__:
            raise UserError(f"{kind} {name!r} is registered by {known.file} and {build.__module__}")
        technique = Technique(kind, name, build, types.MappingProxyType(declares))
        _check_signature(technique)
        _TECHNIQUES[kind, name] = technique
        return build

    return decorate


def _check_signature(technique: Technique) -> None:
    """Refuses a technique whose positional arguments are not those that its host passes."""
    build, host = technique.build, KINDS[technique.kind][1]
    if inspect.isclass(build):
        host = ("self", *host)
    target = build.__init__ if inspect.isclass(build) else build
    positional = [
        name
        for name, p in inspect.signature(target).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) == len(host):
        return
    what = f"{technique.kind} {technique.name!r}"
    if more := positional[len(host) :]:
        raise UserError(
            f"{what} takes {', '.join(more)} by position; put what a config may set after '*' in"
            " its signature (kw_only=True in a dataclass)"
        )
    raise UserError(f"{what} must take ({', '.join(host)}) before '*'")


@functools.cache
def load_all() -> None:
    """Imports every file of the slot packages, which registers what they hold."""
    for package in dict.fromkeys(package for package, _ in KINDS.values()):
        module = importlib.import_module(f"efficient.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"efficient.{package}.{info.name}")


def techniques(kind: str | None = None) -> list[Technique]:
    """All techniques, or those of a kind, by name."""
    load_all()
    found = [t for t in _TECHNIQUES.values() if kind in (None, t.kind)]
    return sorted(found, key=lambda t: (t.kind, t.name))


def find(name: str, kind: str | None = None) -> Technique:
    """The technique of that name; without `kind` the name must be of one kind only."""
    options = techniques(kind)
    found = [t for t in options if t.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        kinds = ", ".join(t.kind for t in found)
        raise UserError(f"{name!r} is a {kinds}; add kind=... to the rule to say which is meant")
    others = [t.kind for t in techniques() if t.name == name]
    if others:
        raise UserError(f"{name!r} is a {others[0]}, not a {kind}; use it in a {others[0]} slot")
    what = kind or "technique"
    raise UserError(f"unknown {what} {name!r}; {nearest(name, (t.name for t in options))}")


def check_arguments(technique: Technique, arguments: Mapping[str, Any], where: str) -> None:
    """Refuses unknown, missing and mistyped arguments with one line that names `where`."""
    allowed = technique.arguments
    for name, value in arguments.items():
        if name not in allowed:
            hint = nearest(name, allowed)
            raise UserError(f"{where}: {technique.name!r} has no argument {name!r}; {hint}")
        if not _fits(value, technique.types.get(name, Any)):
            wanted = inspect.formatannotation(technique.types[name])
            raise UserError(
                f"{where}: {technique.name}.{name} must be {wanted}, got {value!r}"
                f" ({type(value).__name__})"
            )
    missing = [n for n, p in allowed.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{where}: {technique.name!r} needs {', '.join(missing)}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a config value may stand for an annotated argument; lenient beyond plain types."""
    if callable(value):  # a schedule in place of a number
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is type(None) or annotation in (bool, str):
        return value is None if annotation is type(None) else isinstance(value, annotation)
    if origin in (tuple, list):
        return isinstance(value, tuple | list)
    return True
