"""What is static about a call of block_sparse_matmul, and what its forms share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.mask import BlockMask
from pallas_kernels.epilogue import ACTIVATIONS


class Settings(NamedTuple):
    """Static arguments.

    mask: the live blocks.
    activation: None or a name of `epilogue.ACTIVATIONS`.
    precision: of the products.
    """

    mask: BlockMask
    activation: str | None = None
    precision: jax.lax.Precision | None = None


def activation_gradient(name: str | None, before: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of what the activation was given, `before`, in dy's dtype; float32 within."""
    if name is None:
        return dy
    wide = accumulator(dy.dtype)
    _, pull = jax.vjp(ACTIVATIONS[name], before.astype(wide))
    return pull(dy.astype(wide))[0].astype(dy.dtype)


def accumulator(dtype) -> jnp.dtype:
    """The dtype in which sums are held: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def combine(sparse, low, gamma):
    """gamma * sparse + (1 - gamma) * low; the plain sum without gamma. Either may be None."""
    if low is None or sparse is None:
        return low if sparse is None else sparse
    return sparse + low if gamma is None else gamma * sparse + (1 - gamma) * low


def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """x with zeros after `axis` up to a whole multiple: rows or ranks that add nothing."""
    more = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x
