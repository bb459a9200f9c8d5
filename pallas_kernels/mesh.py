"""The layout of queries on a mesh, for ops that run each device's sequences and heads there."""

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def layout(op: str, q: jax.Array, sharding: NamedSharding | None):
    """(mesh, axes of the batch, of the heads, explicit), or None where XLA is to partition.

    Args:
      op: its name, for messages.
      q: [B, T, N, H]; on a mesh of Explicit axes the layout is read off it.
      sharding: of q, `NamedSharding(mesh, P(batch_axes, None, head_axes, None))`, or None.

    Raises:
      ValueError: another sharding, or one that divides T or H.
    """
    explicit = sharding is None
    if explicit:
        sharding = _explicit_sharding(q)
        if sharding is None:
            return None
    elif not isinstance(sharding, NamedSharding) or len(sharding.spec) > 4:
        raise ValueError(
            f"{op}: sharding must be NamedSharding(mesh, P(batch_axes, None, head_axes, None)) "
            f"or None, got {sharding!r}"
        )
    b, t, n, h = (*sharding.spec, *(None,) * (4 - len(sharding.spec)))
    if t is not None or h is not None:
        raise ValueError(
            f"{op}: sharding must leave T and H whole, P(batch_axes, None, head_axes, None); "
            f"got {sharding.spec}; for sequence parallelism attend to parts and merge"
        )
    return sharding.mesh, b, n, explicit


def place(x: jax.Array, mesh: Mesh, spec: P, explicit: bool) -> jax.Array:
    """On Explicit axes shard_map takes nothing that is laid out otherwise."""
    return jax.sharding.reshard(x, NamedSharding(mesh, spec)) if explicit else x


def shard_map(compute: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """`jax.shard_map` over all axes of the mesh that none around it is over already.

    Values are not checked for how they vary over devices: a pallas_call does not say.
    """
    outer = jax.sharding.get_abstract_mesh()
    axes = set(mesh.axis_names) - set(outer.manual_axes)
    return jax.shard_map(
        compute,
        mesh=outer if outer.manual_axes else mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        check_vma=False,
    )


def constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`with_sharding_constraint`, also within a `shard_map` over other axes of the mesh."""
    outer = jax.sharding.get_abstract_mesh()
    if outer.manual_axes:
        sharding = NamedSharding(outer, sharding.spec)
    return jax.lax.with_sharding_constraint(x, sharding)


def size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along these axes."""
    axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[axis] for axis in axes)


def rows_layout(op: str, x: jax.Array, sharding: NamedSharding | None):
    """(mesh, axes of each leading axis of x, explicit), or None where XLA is to partition.

    Args:
      op: its name, for messages.
      x: [..., I]; on a mesh of Explicit axes the layout is read off it.
      sharding: of x, `NamedSharding(mesh, P(..., None))`, or None.

    Raises:
      ValueError: another sharding, one that divides I, or one that does not divide x's axes.
    """
    explicit = sharding is None
    if explicit:
        sharding = _explicit_sharding(x)
        if sharding is None:
            return None
    elif not isinstance(sharding, NamedSharding) or len(sharding.spec) > x.ndim:
        raise ValueError(
            f"{op}: sharding must be NamedSharding(mesh, P(..., None)) of x's {x.ndim} axes or "
            f"None, got {sharding!r}"
        )
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    if spec[-1] is not None:
        raise ValueError(
            f"{op}: sharding must leave the last axis of x whole, got {sharding.spec}; "
            "gather the features of x first"
        )
    for length, axes in zip(x.shape, spec, strict=True):
        if length % size(sharding.mesh, axes):
            raise ValueError(
                f"{op}: sharding must divide x {list(x.shape)}; mesh axes {axes} have size "
                f"{size(sharding.mesh, axes)}"
            )
    return sharding.mesh, spec[:-1], explicit


def over_rows(compute, found, x, *weights):
    """compute(x, *weights) -> y, rows of x by device with all weights, where a layout is found."""
    if found is None:
        return compute(*_varying((x, *weights)))
    mesh, lead, explicit = found
    spec = P(*lead, None)
    specs = (spec, *(jax.tree.map(lambda w: P(*(None,) * w.ndim), w) for w in weights))
    arrays = jax.tree.map(lambda a, s: place(a, mesh, s, explicit), (x, *weights), specs)
    return shard_map(compute, mesh, specs, spec)(*arrays)


def _varying(arrays):
    """All of them varying over the devices over which one does, in a shard_map that checks it.

    Else gradients of weights that all devices have, which a custom derivative leaves to be summed,
    would not be of the weights' type.
    """
    axes = {axis for a in jax.tree.leaves(arrays) for axis in _manual_axes(a)}

    def vary(a):
        missing = tuple(sorted(axes - set(_manual_axes(a))))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, arrays)


def _manual_axes(x):
    return jax.typeof(x).manual_axis_type.varying


def _explicit_sharding(x):
    """The sharding of x where it is on a mesh of Explicit axes, else None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    if not types or any(kind == AxisType.Manual for kind in types):
        return None
    return sharding if any(kind == AxisType.Explicit for kind in types) else None
