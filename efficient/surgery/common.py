"""What surgeries share.

A surgery has two halves, so that a resumed run can rebuild the structure without the values:

- `apply(model)` changes the module tree in place. The tree is unstacked and abstract: its arrays
  are declared, not allocated. Use `efficient.model.replace` and `matching`.
- `convert(values, model, key)` gives the arrays of the changed tree from those of the old one, both
  flat path -> array and unstacked. A surgery without one gets `carry`.

A wrapper holds what it wraps as its `base`, so `.../q/kernel` becomes `.../q/base/kernel`. One that
can be folded into its base has `merged()`, the arrays of the innermost base by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import jax
from flax import nnx
from jaxtyping import Array

from efficient.errors import UserError, nearest
from efficient.model import Arrays, abstract, bind, init, modules, walk


def matching(
    model: nnx.Module, at: str, where: Callable[[nnx.Module], bool]
) -> list[tuple[str, nnx.Module]]:
    """Modules whose path fully matches the pattern `at` and for which `where` holds."""
    candidates = [(p, m) for p, m in modules(model) if where(m)]
    found = [(p, m) for p, m in candidates if re.fullmatch(at, p)]
    if not found:
        hint = nearest(at, (p for p, _ in candidates))
        raise UserError(f"surgery at '{at}' matches nothing; {hint}")
    return found


def is_linear(module: nnx.Module) -> bool:
    """Whether a module is a linear technique or a wrapper of one: it gives its dense matrix."""
    return callable(getattr(module, "materialize", None))


def linears(model: nnx.Module, at: str) -> list[tuple[str, nnx.Module]]:
    """Linears whose path matches `at`; of a wrapper and its base, the wrapper only."""
    found = matching(model, at, is_linear)
    paths = [path for path, _ in found]
    return [(p, m) for p, m in found if not any(p.startswith(f"{other}/") for other in paths)]


def features(linear: nnx.Module) -> tuple[int, int]:
    """(in_features, out_features) of an abstract linear."""
    matrix = jax.eval_shape(lambda a: bind(linear, a).materialize(), abstract(linear))
    return matrix.shape[0], matrix.shape[1]


def train_only(at: str) -> list[dict]:
    """A phase's `parameters` that train what matches `at`, without decay, and freeze the rest."""
    return [{"at": at, "weight_decay": 0.0}, {"at": ".*", "train": False}]


def carry(values: Arrays, model: nnx.Module, key: Array) -> Arrays:
    """Arrays of `model`: those of the same path are kept, also where a wrapper now holds them as
    its `base`; the others are drawn by their initializers."""
    kept = {}
    for path, _ in walk(model):
        old = former_path(path, values)
        if old is not None:
            kept[path] = values[old]
    return kept | init(model, key, only=lambda path: path not in kept)


def former_path(path: str, values: Mapping[str, Array]) -> str | None:
    """Where `values` hold the array of a path, before or after wrapping; None if nowhere."""
    return next((p for p in _former_paths(path) if p in values), None)


def _former_paths(path: str) -> Iterator[str]:
    yield path
    while "/base/" in path:
        path = path.replace("/base/", "/", 1)
        yield path


def unwrapped(path: str) -> str:
    """The path that an array had before wrappers: `q/base/kernel` -> `q/kernel`."""
    return path.replace("/base/", "/")


def initial_values(model: nnx.Module, key: Array, like: Mapping[str, Array]) -> Arrays:
    """The arrays with which the run began, wherever wrappers have moved them since.

    They are drawn again, since each is a function of the run's key and its path alone; those of a
    companion stay as they are. Right for a run whose first phase was drawn from that key, without
    wrappers (not from `init_from`).

    Args:
      model: unstacked, abstract.
      key: the run's initialization key.
      like: present arrays, by path before or after wrapping; each result is placed like its own.
    """
    found = {p: like.get(former_path(p, like)) for p, _ in walk(model)}
    shardings = {p: getattr(array, "sharding", None) for p, array in found.items()}
    # Under jit, as at the start of the run: XLA folds constants, which can change the last bit.
    draw = jax.jit(lambda key: init(model, key, name=unwrapped), out_shardings=shardings)
    return draw(key) | {p: like[p] for p, v in walk(model) if v.get_metadata("kept", False)}


def merged_arrays(module: nnx.Module) -> Arrays:
    """The arrays of a bound linear with all adapters around it folded in."""
    if hasattr(module, "merged"):
        return module.merged()
    return {path: variable[...] for path, variable in walk(module)}


def innermost(module: nnx.Module) -> nnx.Module:
    """What the adapters around a linear wrap; the linear itself where there are none."""
    while hasattr(module, "merged"):
        module = module.base
    return module
