"""What is static about a call of decode attention: hashable, shared by all implementations."""

from typing import NamedTuple

import jax.numpy as jnp


class Settings(NamedTuple):
    """Static arguments of decode attention.

    scale: q k^T is multiplied by it.
    softcap: scores become softcap * tanh(scores / softcap).
    window: a query sees keys at a distance below this; None for all.
    splits: parts of each row's keys that are done apart and merged; None: the implementation's.
    block: keys of a block; None: the implementation's.
    part: whether out is to be merged with others, and so in float32 (float64) and not q's dtype.
    """

    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None
    splits: int | None = None
    block: int | None = None
    part: bool = False

    def out_dtype(self, dtype):
        """Of the result for queries of this dtype."""
        return jnp.promote_types(dtype, jnp.float32) if self.part else dtype

    def first(self, lengths, T: int):
        """The first key that any of the last T queries of rows of these lengths sees."""
        return lengths * 0 if self.window is None else (lengths - T - self.window + 1).clip(0)
