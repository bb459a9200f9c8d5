"""What is static about a call of attention: hashable, shared by all implementations."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention.masks import Full, Mask


class Settings(NamedTuple):
    """Static arguments of attention.

    mask: which query sees which key.
    scale: q k^T is multiplied by it.
    softcap: scores become softcap * tanh(scores / softcap), before bias and ALiBi.
    dropout_rate: of the softmax weights, in [0, 1).
    alibi_offset: position of query 0 among the keys, for ALiBi.
    bias_gradient: whether the backward pass has to give bias's gradient.
    block_q, block_kv: rows and columns of a block of scores; None: the implementation chooses.
    part: whether out is to be merged with others, and so in float32 (float64) and not v's dtype.
    """

    mask: Mask = Full()
    scale: float = 1.0
    softcap: float | None = None
    dropout_rate: float = 0.0
    alibi_offset: int = 0
    bias_gradient: bool = True
    block_q: int | None = None
    block_kv: int | None = None
    part: bool = False

    def out_dtype(self, dtype):
        """Of the result for values of this dtype."""
        return jnp.promote_types(dtype, jnp.float32) if self.part else dtype
