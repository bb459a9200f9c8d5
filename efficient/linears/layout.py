"""How the rows of a linear layer's input lie on the mesh, for kernels that run device by device."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from efficient.parallel.placement import axes_of
from efficient.scope import Context


def layout_of(x: Array, context: Context, features: Any = None) -> NamedSharding | None:
    """How the rows of x [B, T, I] or [B, I] lie on the mesh; None where XLA is to find out.

    Args:
      features: the mesh axes that split features of this layer, and so no rows.
    """
    if x.ndim not in (2, 3):
        return None
    rows = context.layout("tokens", x.shape[:-1])
    if rows is None:
        return None
    split = axes_of((features,))
    kept = (tuple(a for a in axes_of((entry,)) if a not in split) or None for entry in rows.spec)
    return NamedSharding(rows.mesh, PartitionSpec(*kept))
