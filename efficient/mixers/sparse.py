"""Attention that lets go of keys: what the sparse causal mixers share, and their smaller cache.

A key s is seen by the queries s <= t < s + window, and after that only where its head keeps it for
good. So a head needs the keys and values of the last `window` tokens, in a ring, and of those it
keeps, which lie before the ring in the same array.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.mixers.attention import Attention
from efficient.scope import Context, Scope

_NEVER = 2**30  # a position after all queries, and a stride beyond all blocks


@dataclasses.dataclass(frozen=True)
class Kept:
    """Keys that a head keeps for good: blocks `first`, `first + stride`, `first + 2 stride`, ...

    Args:
      first: number of the first block that is kept, from 0 to stride - 1.
      stride: one block of so many is kept; 1 keeps everything.
      block: tokens in a block.
    """

    first: int = 0
    stride: int = _NEVER
    block: int = 1

    def count(self, length: int) -> int:
        """How many of the tokens 0 to length - 1 are kept."""
        blocks = -(-length // self.block)
        if blocks <= self.first:
            return 0
        whole, rest = divmod(blocks - 1 - self.first, self.stride)
        beyond = blocks * self.block - length if rest == 0 else 0
        return (whole + 1) * self.block - beyond


class SparseAttention(Attention):
    """Causal attention whose decoding cache holds what a later query will see, and no more.

    Subclasses set `mask` when they are built.

    Args:
      kept: what each kv head keeps for good, one for all or one a head, all with equal blocks.
      keep_window: how many queries see a key that is not kept, its own included.
      arguments: those of `Attention`.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        kept: tuple[Kept, ...],
        keep_window: int,
        **arguments,
    ):
        super().__init__(scope, width, causal, **arguments)
        self.kept = kept * self.kv_heads if len(kept) == 1 else kept
        self.keep_window = keep_window

    def cache_slots(self, length: int) -> tuple[int, ...]:
        """The tokens whose keys and values each kv head holds after `length` tokens."""
        ring = min(self.keep_window, length)
        return tuple(k.count(length) + (ring if k.stride > 1 else 0) for k in self.kept)

    def init_state(self, batch: int, length: int, dtype):
        """Caches [B, slots, K, H], the positions held in them [slots, K], and the tokens so far."""
        slots = max(self.cache_slots(length))
        shape = (batch, slots, self.kv_heads, self.head_size)
        held = jnp.full((slots, self.kv_heads), _NEVER, jnp.int32)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), held, jnp.zeros((), jnp.int32)

    def step(self, x: Float[Array, "B 1 D"], state, context: Context):
        """Attends from one new token to what is kept and the last window, itself included."""
        keys, values, held, index = state
        q, k, v = self._project_one(x, index, context)
        where = self._slots_of(index, held.shape[0]), jnp.arange(self.kv_heads)
        keys = keys.at[:, *where].set(k[:, 0].astype(keys.dtype))
        values = values.at[:, *where].set(v[:, 0].astype(values.dtype))
        held = held.at[where].set(index)
        positions = jnp.repeat(held.T, self.heads // self.kv_heads, axis=0)
        y = self._attend_one(q, self._turn(keys, held, index), values, positions, index)
        return self.out(y, context), (keys, values, held, index + 1)

    def _slots_of(self, index: Array, slots: int) -> Array:
        """[K]: where each head puts token `index`: kept ones from the front, others in the ring."""
        first = jnp.array([kept.first for kept in self.kept])
        stride = jnp.array([kept.stride for kept in self.kept])
        number, place = jnp.divmod(index, self.kept[0].block)
        turn, rest = jnp.divmod(number - first, stride)
        ring = slots - 1 - index % self.keep_window
        return jnp.where(rest == 0, turn * self.kept[0].block + place, ring)

    def _project_one(self, x, index, context):
        """q, k, v [B, 1, heads, H] of the token at `index`, k as the cache holds it."""
        return self._project(x, jnp.full((1, 1), index), context)

    def _turn(self, keys: Array, held: Array, index: Array) -> Array:
        """The keys of the cache as the query at `index` meets them."""
        del held, index
        return keys


def at_least(name: str, value: int, least: int) -> None:
    """Refuses a whole number below `least`."""
    if value < least:
        raise UserError(f"{name}={value} must be at least {least}")
