"""How the rows of a linear layer's input lie on the mesh, for kernels that run device by device.

A structured layer has few weights and as many features as a dense one, so that it is cheaper to
gather its weights to where the rows lie than to move the features: at a density of 1/8 and n 4096,
4 MiB against 64 MiB of 8,192 rows. Such a class says `by_rows = True`, and a sublayer of nothing
else keeps its part of the sequence where a dense one, split by features, reads all of it.
"""

from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from efficient.model import modules
from efficient.parallel.placement import axes_of
from efficient.scope import Context
from pallas_kernels.mesh import constrain


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


def by_rows(part: nnx.Module) -> bool:
    """Whether a module has linears, and all of them work on rows wherever those lie."""
    linears = [m for _, m in modules(part) if hasattr(m, "materialize")]
    return bool(linears) and all(getattr(m, "by_rows", False) for m in linears)


def on_rows(x: Array, context: Context) -> Array:
    """x [B, T, I] or [B, I] where its rows lie, all features of a row on one device."""
    layout = layout_of(x, context)
    return x if layout is None else constrain(x, layout)
