"""Placement on a mesh by rules: which axis of which array is split over which devices.

A rule is {at: pattern over paths, spec: [mesh axis | None | [axes], ...]}, first match wins; the
config's rules come before `DEFAULTS`. Paths are those of parameters and of `ACTIVATIONS`. No model
file names a mesh axis. Of a parameter's rule `fsdp` stands for the axes that `config.scopes` gives
to the kind of array: the parameter, its gradient or its optimizer state; see `parallel.scopes`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient.errors import UserError, nearest
from efficient.model import layers_of
from efficient.parallel import megatron
from efficient.parallel.mesh import AXES
from efficient.parallel.scopes import DEFAULT, ORDER, Scopes, axes_of, scoped
from pallas_kernels.mesh import constrain

BATCH_AXES = megatron.BATCH_AXES

DEFAULTS: tuple[tuple[str, tuple[Any, ...]], ...] = megatron.RULES
ACTIVATIONS = tuple(f"activations/{kind}" for kind in ("tokens", "inputs", "heads", "logits"))


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh, the rules by which arrays lie on it, and how attention crosses a split sequence.

    Attributes:
      sequence: the technique of `config.sequence`; see `parallel.sequence`.
      scopes: over which of the axes that split the batch each kind of array is split.
      apart: axes along which every device works on its own part, within a shard_map over them.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    sequence: Any = None
    scopes: Scopes = DEFAULT
    apart: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls,
        mesh: Mesh,
        entries: Sequence[Mapping[str, Any]],
        sequence: Any = None,
        scopes: Scopes = Scopes(),
    ) -> "Placement":
        rules = []
        for i, entry in enumerate(entries):
            where = f"config.placement[{i}]"
            if not isinstance(entry, Mapping) or set(entry) != {"at", "spec"}:
                raise UserError(f"{where}: a placement rule has exactly 'at' and 'spec'")
            if not isinstance(entry["spec"], list | tuple):
                raise UserError(f"{where}: spec must be a list, one axis or None a dimension")
            try:
                re.compile(entry["at"])
            except (re.error, TypeError) as error:
                raise UserError(f"{where}: '{entry['at']}' is no pattern: {error}") from None
            spec = tuple(tuple(s) if isinstance(s, list | tuple) else s for s in entry["spec"])
            for axis in axes_of(spec):
                if axis not in AXES:
                    hint = nearest(str(axis), AXES)
                    raise UserError(f"{where}: no mesh axis {axis!r}; {hint}")
            if len(set(axes_of(spec))) < len(axes_of(spec)):
                raise UserError(f"{where}: a mesh axis can split one dimension only; got {spec}")
            rules.append((entry["at"], spec))
        return cls(mesh, tuple(rules), sequence, scopes)

    def spec(self, path: str) -> tuple[Any, ...] | None:
        """The rule's spec for an unstacked path; None where no rule speaks of it."""
        return next((s for at, s in self.rules + DEFAULTS if re.fullmatch(at, path)), None)

    def check_all_matched(self, paths: Sequence[str]) -> None:
        """A placement rule of the config that matches nothing is a mistake."""
        paths = [*paths, *ACTIVATIONS]
        for i, (at, _) in enumerate(self.rules):
            if not any(re.fullmatch(at, p) for p in paths):
                hint = nearest(at, {re.sub(r"/\d+/", "/0/", p) for p in paths})
                raise UserError(f"config.placement[{i}]: '{at}' matches no parameter; {hint}")

    def sharding(
        self, path: str, shape: tuple[int, ...], kind: str = "parameters"
    ) -> NamedSharding:
        """Where a (possibly stacked) array lies. The layers of a stack are those of the stages.

        Args:
          kind: what of the parameter at this path: itself, its `gradients` or its `optimizer`.
        """
        return self.at_scope(path, shape, getattr(self.scopes, kind))

    def at_scope(self, path: str, shape: tuple[int, ...], scope: str) -> NamedSharding:
        """Where an array of the parameter at this path lies if it has that scope."""
        layers = layers_of(path)
        stacked = len(layers) > 1
        dims = shape[1:] if stacked else shape
        spec = self.spec(layers[0])
        if spec is None:
            spec = self._largest(dims)
        elif len(spec) > len(dims):
            raise UserError(f"placement of {path}: {len(spec)} axes for shape {dims}")
        spec = scoped(spec, scope)
        spec = [self._divides(path, axis, n) for axis, n in zip(spec, dims, strict=False)]
        layer = ["pipeline"] if len(layers) % self.mesh.shape["pipeline"] == 0 else [None]
        return NamedSharding(self.mesh, PartitionSpec(*(layer if stacked else []), *spec))

    def route(
        self, path: str, shape: tuple[int, ...], start: str, end: str
    ) -> tuple[NamedSharding, ...]:
        """The layouts on the way from one scope to another; of a sum over all devices as if
        from `replicated`.

        Between replicated and global they pass the group. The parts that fsdp and data give
        together are not in the order of the devices, and the partitioner finds a reduce-scatter
        only in two steps.
        """
        first, last = ORDER.index(start), ORDER.index(end)
        step = 1 if first < last else -1
        between = ORDER[first + step : last : step] if first != last else ()
        return tuple(self.at_scope(path, shape, scope) for scope in (*between, end))

    def gathered(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where one layer's array lies once it is gathered from the axes that split the batch."""
        layers = layers_of(path)
        spec = self.sharding(layers[0], shape[len(layers) > 1 :]).spec
        keep = [tuple(a for a in axes_of((entry,)) if a not in BATCH_AXES) for entry in spec]
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in keep)))

    def _largest(self, dims: tuple[int, ...]) -> tuple[Any, ...]:
        """Without a rule: fsdp splits the largest dimension that it divides.

        One that all axes of the finest scope divide goes before, so that every kind of array is
        split in the same dimension.
        """
        for axes in (self.scopes.finest, ("fsdp",)):
            ways = math.prod(self.mesh.shape[a] for a in axes)
            fits = [(n, -i) for i, n in enumerate(dims) if n % ways == 0 and len(dims) > 1]
            if fits:
                chosen = -max(fits)[1]
                return tuple("fsdp" if i == chosen else None for i in range(len(dims)))
        return ()

    def _divides(self, path: str, axis: Any, size: int) -> Any:
        """`axis` where it divides the dimension; a default that does not is left out."""
        if axis is None:
            return None
        ways = math.prod(self.mesh.shape[a] for a in axes_of((axis,)))
        if size % ways == 0:
            return axis
        if any(re.fullmatch(at, layers_of(path)[0]) for at, _ in self.rules):
            raise UserError(
                f"placement of {path}: {axis!r} has {ways} devices, which do not divide"
                f" the dimension {size}"
            )
        # Of several axes the last ones are left out.
        return self._divides(path, axis[:-1], size) if len(axes_of((axis,))) > 1 else None

    def activation(self, kind: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where activations of this shape lie.

        Args:
          kind: `tokens` [B, T, D], `inputs` of mixers, channels and the head [B, T, D], `heads`
            [B, T, N, H] or `logits` [B, T, V].
          shape: of all axes or of the leading ones.

        Raises:
          UserError: T is no multiple of the sequence axis.
        """
        path = f"activations/{kind}"
        spec = self.spec(path) or ()
        ways = self.mesh.shape["sequence"]
        if len(shape) > 1 and ways > 1 and shape[1] % ways:
            raise UserError(
                f"a sequence of {shape[1]} tokens does not divide over config.mesh.sequence={ways};"
                " change the length of the data or the mesh"
            )
        spec = [self._divides(path, axis, n) for axis, n in zip(spec, shape, strict=False)]
        split = (
            tuple(a for a in axes_of((s,)) if self.mesh.shape[a] > 1 and a not in self.apart)
            for s in spec
        )
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in split)))

    def features(self, path: str) -> tuple[Any, Any]:
        """The model axes that split the inputs and the outputs of the linear at an unstacked path.

        They are those of a dense kernel there: `<path>/kernel` under the rules, but for the axes
        that split the batch. None where none does.
        """
        spec = (*(self.spec(f"{path}/kernel") or ()), None, None)[:2]
        kept = (
            tuple(a for a in axes_of((s,)) if a not in BATCH_AXES and self.mesh.shape[a] > 1)
            for s in spec
        )
        inputs, outputs = (axes[0] if len(axes) == 1 else axes or None for axes in kept)
        return inputs, outputs

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def batch(self) -> NamedSharding:
        """The leading axis of a batch of data, over data and fsdp."""
        axes = tuple(a for a in BATCH_AXES if a not in self.apart)
        return NamedSharding(self.mesh, PartitionSpec(axes))

    @property
    def named_axes(self) -> set[str]:
        """The mesh axes that the config's own rules name."""
        return {axis for _, spec in self.rules for axis in axes_of(spec)}

    @property
    def batch_ways(self) -> int:
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    def process_share(self, batch_size: int) -> tuple[int, int]:
        """(index, count) of the equal slices of a batch, of which this process loads one."""
        slices = self.batch.addressable_devices_indices_map((batch_size,)).values()
        starts = [s[0].start or 0 for s in slices]
        stops = [batch_size if s[0].stop is None else s[0].stop for s in slices]
        rows = max(stops) - min(starts)
        return min(starts) // rows, batch_size // rows

    def place_batch(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """This process' rows of a batch as global arrays on the mesh."""
        return {
            name: jax.make_array_from_process_local_data(self.batch, a, (batch_size, *a.shape[1:]))
            for name, a in batch.items()
        }

    def like_params(
        self, tree: Any, shapes: Mapping[str, tuple[int, ...]], kind: str = "parameters"
    ) -> Any:
        """Shardings of a tree that holds arrays of the parameters' shape under their paths (an
        optimizer's state); anything else is replicated. `kind` as of `sharding`."""

        def place(keys, leaf):
            for key in keys:
                name = getattr(key, "key", None)
                if name in shapes and tuple(leaf.shape) == tuple(shapes[name]):
                    return self.sharding(name, leaf.shape, kind)
            return self.replicated

        return jax.tree_util.tree_map_with_path(place, tree)


def split_batch(batch: Mapping[str, jax.Array], count: int, placement: Placement | None):
    """[B, ...] -> [count, B / count, ...]; every device keeps rows of its own."""

    def split(a):
        a = a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)
        if placement is None:
            return a
        spec = PartitionSpec(None, *placement.batch.spec)
        return constrain(a, NamedSharding(placement.mesh, spec))

    return jax.tree.map(split, batch)
