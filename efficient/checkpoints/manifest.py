"""What a checkpoint says of itself: the JSON beside its arrays, and how it fits a model."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

Listing = dict[str, tuple[tuple[int, ...], np.dtype]]
VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SHOWN = 5  # names that a message gives before "and N more"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a checkpoint depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def document(
    arrays: Mapping[str, jax.Array], checksums: Mapping[str, int], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of a checkpoint: metadata, a line for each layer, and a crc32 of both."""
    lines = {
        path: {"shape": list(a.shape), "dtype": a.dtype.name, "checksum": checksums[path]}
        for path, a in arrays.items()
    }
    content = {"metadata": dict(metadata), "arrays": lines}
    return {**content, "crc32": _crc32(content)}


def read_document(checkpoint: epath.Path) -> dict[str, Any]:
    """Reads the JSON back; ValueError or FileNotFoundError where it is not whole."""
    try:
        content = json.loads((checkpoint / "metadata" / "metadata").read_text())
    except ValueError as error:
        raise ValueError(f"its metadata is no JSON: {error}") from None
    if not isinstance(content, dict) or not {"metadata", "arrays", "crc32"} <= content.keys():
        raise ValueError("its metadata has been changed")
    if content.pop("crc32") != _crc32(content):
        raise ValueError("its metadata has been changed")
    return content


def _crc32(content: Mapping[str, Any]) -> int:
    """Over a canonical text, so that any JSON reader can check it."""
    content = {"metadata": content["metadata"], "arrays": content["arrays"]}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


def listing(content: Mapping[str, Any]) -> Listing:
    """Shape and dtype by path."""
    return {
        path: (tuple(line["shape"]), jnp.dtype(line["dtype"]))
        for path, line in content["arrays"].items()
    }


def names(paths: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    paths = list(paths)
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a checkpoint fits what is wanted of it, by single layer; true where it fits.

    Attributes:
      matched: same shape and dtype on both sides.
      missing: wanted, but not in the checkpoint.
      extra: in the checkpoint, but not wanted.
      misshapen: (path, wanted, found), the latter as `float32[4,8]`.
    """

    matched: frozenset[str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(
        cls,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        found: Listing,
        allow_missing: Iterable[str] = (),
        allow_extra: Iterable[str] = (),
    ) -> "Fit":
        """Compares; paths that fully match an allowed pattern are not named."""
        both = [path for path in wanted if path in found]
        pairs = {p: (_shape(wanted[p].shape, wanted[p].dtype), _shape(*found[p])) for p in both}
        return cls(
            matched=frozenset(p for p, (want, have) in pairs.items() if want == have),
            missing=tuple(_not_allowed(wanted.keys() - found.keys(), allow_missing)),
            extra=tuple(_not_allowed(found.keys() - wanted.keys(), allow_extra)),
            misshapen=tuple((p, w, h) for p, (w, h) in sorted(pairs.items(), key=_order) if w != h),
        )

    def covers(self, paths: Iterable[str]) -> bool:
        """Whether all of these match."""
        return self.matched.issuperset(paths)

    def __bool__(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        misshapen = [f"{p} (expected {want}, found {have})" for p, want, have in self.misshapen]
        kinds = (("missing", self.missing), ("extra", self.extra), ("misshapen", misshapen))
        said = [f"{len(paths)} {kind}: {names(paths)}" for kind, paths in kinds if paths]
        return "; ".join(said) or "everything matches"


def _shape(shape: Iterable[int], dtype: Any) -> str:
    return f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]"


def _not_allowed(paths: Iterable[str], allowed: Iterable[str]) -> list[str]:
    patterns = [re.compile(pattern) for pattern in allowed]
    return sorted((p for p in paths if not any(x.fullmatch(p) for x in patterns)), key=_numeric)


def _order(pair: tuple[str, Any]):
    return _numeric(pair[0])


def _numeric(path: str) -> list[tuple[int, int, str]]:
    """Sorts `blocks/2` before `blocks/10`."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split("/")]
