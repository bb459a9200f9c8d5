"""What is static about a call of block_sparse_matmul, and the activations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.mask import BlockMask


class Settings(NamedTuple):
    """Static arguments.

    mask: the live blocks.
    activation: None or a name of `ACTIVATIONS`.
    precision: of the products.
    """

    mask: BlockMask
    activation: str | None = None
    precision: jax.lax.Precision | None = None


def _gelu(x):
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"gelu": _gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}


def activate(name: str | None, x: jax.Array) -> jax.Array:
    """The activation of `x`, in its dtype."""
    return x if name is None else ACTIVATIONS[name](x)


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
