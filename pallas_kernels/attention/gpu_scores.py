"""A block of scores on Hopper: softcap, mask and segments, in registers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.gpu_ops import (
    LOG2_E,
    OF_COLUMNS,
    Block,
    Machine,
    along_columns,
    along_rows,
)
from pallas_kernels.attention.masks import Mask


class Place(NamedTuple):
    """Where a block of scores lies.

    block: its entry of the list. head: its query head. t, s: its first query and first key.
    by_keys: whether its rows are keys.
    row_ids: the segments of its rows, in registers; column_ids: of its columns, in shared memory.
    """

    block: Block
    head: jax.Array
    t: jax.Array
    s: jax.Array
    by_keys: bool
    row_ids: jax.Array | None
    column_ids: jax.Array | None


def scores(machine: Machine, settings, masks: tuple[Mask, ...], place: Place, x):
    """From products q k^T to scores in base 2 up to a factor, -inf where hidden.

    Returns:
      Scores, the factor by which they are to be multiplied, and tanh of the softcap or None.
    """
    factor, capped = settings.scale * LOG2_E, None
    if settings.softcap is not None:
        capped = jnp.tanh(x * (settings.scale / settings.softcap))
        x, factor = capped, settings.softcap * LOG2_E
    return _same_segment(machine, place, _hide(machine, masks, place, x)), factor, capped


def _hide(machine, masks, place, x):
    """-inf where the mask of the block's kind hides a key."""
    if len(masks) == 2:
        return x

    def by(mask):
        def hidden(x, head, t, s):
            t = machine.positions(x.shape, int(place.by_keys), t)
            s = machine.positions(x.shape, int(not place.by_keys), s)
            return jnp.where(mask.element(head, t, s), x, -jnp.inf)

        return hidden

    branches = [lambda x, *_: x, *(by(mask) for mask in masks[2:])]
    return jax.lax.switch(place.block.kind - 1, branches, x, place.head, place.t, place.s)


def _same_segment(machine, place, x):
    if place.row_ids is None:
        return x

    def compare(x):
        columns = along_columns(machine.read(place.column_ids, OF_COLUMNS), x.shape)
        return jnp.where(along_rows(place.row_ids, x.shape) == columns, x, -jnp.inf)

    return jax.lax.cond(place.block.mixed > 0, compare, lambda x: x, x)
