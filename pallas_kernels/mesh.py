"""The layout of queries on a mesh, for ops that run each device's sequences and heads there."""

import math

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
        sharding = getattr(jax.typeof(q), "sharding", None)
        types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
        if not types or any(kind == AxisType.Manual for kind in types):
            return None
        if all(kind != AxisType.Explicit for kind in types):
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


def size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along these axes."""
    axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(mesh.shape[axis] for axis in axes)
