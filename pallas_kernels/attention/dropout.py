"""Dropout whose bits depend on the position of a weight alone.

A weight is dropped by a hash of (key, batch, head, t, s). So every implementation, every tiling,
the forward and the backward pass drop the same weights, and nothing of size T x S is stored.

The hash of an element has two rounds of an integer finaliser (multiply, xor with a shift), each
of which takes in another 32-bit word of its row, so that rows are as apart as 64 bits can make
them while an element costs two multiplications. All of it is uint32 arithmetic that a TPU's and a
GPU's kernel languages have.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Numbers of D. Wellons' "lowbias32" search for 32-bit finalisers, and 2**32 / golden ratio.
_FIRST, _SECOND, _GOLDEN = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(0x9E3779B9)


def seeds(key: jax.Array, batch: int, heads: int) -> jax.Array:
    """uint32[B, N, 2]: two words for each sequence and query head, from a PRNG key.

    They are made outside of kernels for the whole batch, so that a device that holds a part of
    the batch or of the heads drops what one device would have dropped.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1)
    return _finalise(_finalise(index * _GOLDEN + words) + words[::-1])


def keep(seed_0: jax.Array, seed_1: jax.Array, t: jax.Array, s: jax.Array, rate: float):
    """Whether the weight of query t and key s is kept; True with probability 1 - rate.

    Args:
      seed_0, seed_1: the words of `seeds` for the batch entry and head.
      t, s: int32 positions. All arrays broadcast; with t as a column and s as a row, what depends
        on one of them alone is computed once a row or column.
      rate: Python number in [0, 1), kept to 24 bits.
    """
    t, s = t.astype(jnp.uint32), s.astype(jnp.uint32)
    row_0 = _finalise(t * _GOLDEN + seed_0)
    row_1 = _finalise(t * _FIRST + seed_1)
    x = (s * _GOLDEN) ^ row_0
    x = (x ^ (x >> 16)) * _FIRST
    x = x ^ row_1
    x = (x ^ (x >> 15)) * _SECOND
    # Compared as a signed number of 24 bits: vector units need not know unsigned comparison.
    return ((x ^ (x >> 16)) >> 8).astype(jnp.int32) >= np.int32(round(rate * 2**24))


def _finalise(x):
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 16)
