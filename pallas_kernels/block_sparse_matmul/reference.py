"""The semantics of block_sparse_matmul: blocks are put into a dense matrix."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.settings import Settings, accumulator, combine
from pallas_kernels.epilogue import finish


def matrix(blocks: jax.Array, mask) -> jax.Array:
    """The dense [I, O] of blocks [nnz, bi, bo]: zero where no block is."""
    _, bi, bo = blocks.shape
    whole = jnp.zeros((*mask.shape, bi, bo), blocks.dtype)
    whole = whole.at[mask.live.nonzero()].set(blocks)
    return whole.transpose(0, 2, 1, 3).reshape(mask.shape[0] * bi, mask.shape[1] * bo)


def reference(x, blocks, u, v, gamma, bias, settings: Settings) -> jax.Array:
    """act(gamma x B + (1 - gamma) (x U) V + bias), [M, I] -> [M, O]; see `api`."""
    wide = accumulator(x.dtype)

    def dot(a, b):
        return jnp.matmul(a, b, precision=settings.precision, preferred_element_type=wide)

    sparse = dot(x, matrix(blocks, settings.mask))
    low = None if u is None else dot(dot(x, u).astype(x.dtype), v)
    return finish(combine(sparse, low, gamma), bias, settings.activation).astype(x.dtype)
