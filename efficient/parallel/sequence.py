"""Sequences that are split over devices: the order of their tokens, and attention across the parts.

A technique of the kind `sequence` (`ulysses`, `ring`) is chosen by `config.sequence` and gives

    order_of(length, ways, causal)   the order in which tokens lie over the devices, or None
    strategy(q, k, v, ...)           attention, called as in `attend`

Everything else of a model treats a token by itself, or asks for its position, so that it does not
matter which device has it.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.parallel.placement import Placement
from efficient.scope import Context
from pallas_kernels.attention import Mask, attention


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: Context,
    *,
    mask: Mask,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, each device on its sequences and heads, and across those that share one.

    Args:
      mask: over positions in the sequence, wherever its tokens lie.
      softcap, implementation: as of `pallas_kernels.attention`.
    """
    sharding = context.layout("heads", q.shape)
    options = {
        "mask": mask,
        "segment_ids": context.segment_ids,
        "softcap": softcap,
        "sharding": sharding,
        "implementation": implementation,
    }
    if sharding is None or (*sharding.spec, None, None)[1] is None:
        return attention(q, k, v, **options)
    return context.placement.sequence(q, k, v, permuted=context.permuted, **options)


def arrange(
    batch: Mapping[str, Array], model: nnx.Module, placement: Placement
) -> tuple[Mapping[str, Array], bool]:
    """The batch with the tokens of each sequence in the strategy's order; whether that is another.

    Then `positions` say where each token belongs. A class that is read at the last token wants it
    to be the last, so only batches with a target a token are reordered.
    """
    ways = placement.mesh.shape["sequence"]
    if ways == 1 or not {"tokens", "targets"} <= batch.keys():
        return batch, False
    rows, length = batch["tokens"].shape
    order = placement.sequence.order_of(length, ways, getattr(model, "causal", False))
    if order is None:
        return batch, False
    batch = {"positions": jnp.broadcast_to(jnp.arange(length), (rows, length)), **batch}
    return {
        name: jnp.take(a, order, axis=1) if a.shape[1:2] == (length,) else a
        for name, a in batch.items()
    }, True
