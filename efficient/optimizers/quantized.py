"""Moments in 8 bits: blocks of 256 numbers, each a code of a dynamic map times the block's maximum.

"8-bit Optimizers via Block-wise Quantization", Dettmers et al. 2022, arXiv 2110.02861, as in
bitsandbytes (`create_dynamic_map` and its block-wise Adam kernel). The map's 256 values lie in
decades: 10^(i-6) times the middles of 2^i equal parts of [0.1, 1] for i = 0 ... 6 and both signs
(2^(i+1) parts where there is no sign), and 0 and 1. A value takes the nearest code; a negative one
that is nearest to 0 takes the largest negative code instead, so that no momentum loses its sign.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 256


class Quantized(NamedTuple):
    """An array of n elements: a code for each and the largest magnitude of each block."""

    codes: UInt8[Array, "..."]
    largest: Float[Array, "blocks"]


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 float32 values that codes stand for, in ascending order."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(values, np.float32))


def _blocks(x: Array) -> Array:
    """[ceil(n/256), 256], the last block filled with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def quantize(x: Float[Array, "..."], signed: bool) -> Quantized:
    """The codes of a float32 array, of 0 or more unless `signed`."""
    values = dynamic_map(signed)
    blocks = _blocks(x)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    relative = blocks / jnp.where(largest > 0, largest, 1.0)[:, None]
    codes = jnp.searchsorted(jnp.asarray((values[:-1] + values[1:]) / 2), relative)
    zero = int(np.searchsorted(values, 0.0))
    codes = jnp.where((relative < 0) & (codes == zero), zero - 1, codes).astype(jnp.uint8)
    return Quantized(codes.reshape(-1)[: x.size].reshape(x.shape), largest)


def dequantize(q: Quantized, signed: bool) -> Float[Array, "..."]:
    """The float32 array that the codes stand for."""
    blocks = jnp.asarray(dynamic_map(signed))[_blocks(q.codes)] * q.largest[:, None]
    return blocks.reshape(-1)[: q.codes.size].reshape(q.codes.shape)
