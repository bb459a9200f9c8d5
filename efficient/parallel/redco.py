"""Redco: two rules that derive a tensor-parallel placement from a model's modules and shapes.

"Redco: A Lightweight Tool to Automate Distributed Training of LLMs on Any GPU/TPUs", Tan, Zhu, Liu,
Wang, Zhuang, Chen, Xing and Hu 2023, arXiv 2310.16355. Of the dense kernels [inputs, outputs]

    1. in attention q, k and v split their outputs, and o splits its inputs
    2. of consecutive dense layers elsewhere the first splits its outputs, the second its inputs,
       the third its outputs, and so on

so that what one layer leaves split the next one takes as it is, and a sum over devices stands
behind every second layer only. Beside these the authors' code splits the rows of an embedding,
the outputs of a head, and nothing of biases, norms and other arrays. Where a dimension is no
multiple of the devices it takes the other, and none where that is not one either.

Here a layer follows the one that its module declares before it, if it takes as many features as
that gives; otherwise it stands beside that one, as `up` beside `gate`, and is split alike. The
chain starts anew in every module. With as many hidden as other features shapes do not tell, and the
names do by which the authors' code knows its layers (`FIRST`, `LAST`).

`derive` crosses the splits with fully sharded data parallelism over the other dimension, as
`megatron.RULES` does, and says nothing of linears without a kernel (Monarch's, low-rank, ...), of
positions and of convolutions: these stay with the default rules. A config asks for it by

    placement = [{"derive": "redco"}]

among rules of its own, of which the first match wins.
"""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from efficient.errors import UserError
from efficient.model import bind, modules, walk
from efficient.papers import Claim, Paper

COLUMN, ROW = "outputs", "inputs"
# Layers that read what the module does, and those that give what it does, by the code's names.
FIRST, LAST = (
    re.compile(r"(up|gate|wi).*|(.*_)?in(_.*)?"),
    re.compile(r"(down|wo).*|(.*_)?out(_.*)?"),
)

_TEST = "tests/papers/test_redco.py"
PAPER = Paper(
    slug="redco",
    status="equations",
    claims=(
        Claim(
            "two rules give the tensor-parallel placement of any language model",
            f"{_TEST}::test_derived_kernels_lie_as_megatrons",
            True,
            "of the hosts here: each kernel as the rules written by hand have it",
        ),
        Claim(
            "queries, keys and values split their outputs, the output projection its inputs",
            f"{_TEST}::test_rules_by_hand",
            True,
        ),
        Claim(
            "consecutive dense layers alternate the dimension that is split",
            f"{_TEST}::test_rules_by_hand",
            True,
            "also for layers that stand beside each other and for chains of any length",
        ),
        Claim(
            "the split model computes what the whole one does",
            f"{_TEST}::test_a_derived_placement_computes_the_same",
            True,
        ),
        Claim("as fast as strategies written by hand, up to OPT-66B", note="needs GPUs or a pod"),
        Claim(
            "pipelines are three functions: collate, loss, predict",
            note="of its trainer, which this project has its own of",
        ),
    ),
    source="github.com/tanyuqian/redco, redco/deployers/partition_utils.py; the paper's abstract",
    departures=(
        "what follows what is read from declarations and shapes; the code goes through sorted names"
        " over the whole model and knows more layers by name",
        "a bias lies as its layer's outputs do, the code keeps biases whole",
        "the other dimension is split over fsdp, the code has no fully sharded data parallelism",
        "positions are not split over tensor",
    ),
)


def derive(model: nnx.Module, sizes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """The placement rules of a model, `{at, spec}`, by the two rules above.

    Args:
      model: as built: `nnx.clone` forgets in which order children were declared.
      sizes: devices along `tensor` and `fsdp`; a dimension that they do not divide is not split.
        None splits whatever the shapes are.
    """
    sizes = {"tensor": 1, "fsdp": 1, **(sizes or {})}
    found: dict[str, tuple[Any, ...]] = {}
    for path, side, linear in _linears(model):
        found |= _linear_specs(path, side, linear, sizes)
    for path, variable in walk(model):
        if re.fullmatch(r"(.*/)?embed/table", path):
            found[path] = _kernel_spec(variable.shape, ROW, sizes)
    return _as_rules(found)


def expand(
    entries: Sequence[Mapping[str, Any]], model: nnx.Module, sizes: Mapping[str, int]
) -> list[Mapping[str, Any]]:
    """`config.placement` with `{"derive": "redco"}` replaced by the rules of `derive`.

    Raises:
      UserError: an entry derives something else.
    """
    rules: list[Mapping[str, Any]] = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "derive" not in entry:
            rules.append(entry)
        elif dict(entry) == {"derive": "redco"}:
            rules += derive(model, sizes)
        else:
            raise UserError(
                f"config.placement[{i}]: {dict(entry)} derives no placement; write"
                " {'derive': 'redco'}"
            )
    return rules


def _linears(model: nnx.Module) -> Iterator[tuple[str, str, nnx.Module]]:
    """(path, which dimension is split, linear) of all linears, by the two rules."""
    for path, module in modules(model):
        if _is_linear(module):
            continue
        here = _children(module)
        attention = {"q", "k", "v"} <= here.keys()
        before = None
        for name, linear in here.items():
            where = f"{path}/{name}" if path else name
            if attention and name[0] in "qkvo":
                yield where, ROW if name[0] == "o" else COLUMN, linear
                continue
            if name == "head":
                yield where, COLUMN, linear
                continue
            features = _features(linear)
            side = _next_side(name, features, before)
            before = features, side
            yield where, side, linear


def _next_side(name: str, features: tuple[int, int], before) -> str:
    """Rule 2: alternates along a chain; layers beside each other are split alike."""
    if before is None:
        return COLUMN
    (inputs, outputs), side = before
    if inputs == outputs == features[0] == features[1]:  # shapes do not tell
        if FIRST.fullmatch(name):
            return COLUMN
        if LAST.fullmatch(name):
            return ROW
    if features[0] != outputs:
        return side
    return ROW if side == COLUMN else COLUMN


def _is_linear(module: Any) -> bool:
    return isinstance(module, nnx.Module) and hasattr(module, "materialize")


def _children(module: nnx.Module) -> dict[str, nnx.Module]:
    """The linears that a module holds itself or in lists, as it declares them."""
    found: dict[str, nnx.Module] = {}
    for name, value in vars(module).items():
        if _is_linear(value):
            found[name] = value
        elif isinstance(value, nnx.List | list | tuple):
            found |= {f"{name}/{i}": item for i, item in enumerate(value) if _is_linear(item)}
    return found


def _features(linear: nnx.Module) -> tuple[int, int]:
    """(inputs, outputs) of the matrix that a linear stands for."""
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in walk(linear)}
    matrix = jax.eval_shape(lambda arrays: bind(linear, arrays).materialize(), shapes)
    return matrix.shape


def _linear_specs(
    path: str, side: str, linear: nnx.Module, sizes: Mapping[str, int]
) -> dict[str, tuple[Any, ...]]:
    """Of a dense layer, or of the one that an adapter holds as `base`."""
    found: dict[str, tuple[Any, ...]] = {}
    arrays = {name.removeprefix("base/"): v for name, v in walk(linear)}
    if "kernel" not in arrays or len(arrays["kernel"].shape) != 2:
        return found
    spec = _kernel_spec(arrays["kernel"].shape, side, sizes)
    found[f"{path}/kernel"] = spec
    if "bias" in arrays and "tensor" in spec:
        found[f"{path}/bias"] = ("tensor",) if spec[1] == "tensor" else (None,)
    return found


def _kernel_spec(shape: Sequence[int], side: str, sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """The dimension of that side over tensor if it divides, or else the other; fsdp beside it."""
    wanted = (1, 0) if side == COLUMN else (0, 1)
    fits = [dim for dim in wanted if shape[dim] % sizes["tensor"] == 0]
    tensor = fits[0] if fits else None
    spec: list[Any] = [None, None]
    if tensor is not None:
        spec[tensor] = "tensor"
    other = 1 - (wanted[0] if tensor is None else tensor)
    if shape[other] % sizes["fsdp"] == 0:
        spec[other] = "fsdp"
    return tuple(spec)


def _as_rules(found: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """One rule for all layers where they agree, and else one for each spec."""
    alike: dict[str, dict[tuple, list[str]]] = collections.defaultdict(dict)
    for path, spec in found.items():
        alike[re.sub(r"(?<=/)\d+(?=/)", "#", path)].setdefault(spec, []).append(path)
    rules = []
    for general, specs in alike.items():
        for spec, paths in specs.items():
            if len(specs) == 1:
                paths = [general]
            at = "|".join(_pattern(path) for path in paths)
            rules.append({"at": at, "spec": list(spec)})
    return rules


def _pattern(path: str) -> str:
    """Of the array at a path, also below an adapter's `base`."""
    *parents, last = path.split("/")
    if last == "table":
        return path
    where = "/".join(r"\d+" if part == "#" else re.escape(part) for part in parents)
    return f"{where}(/base)?/{last}"
