"""The semantics of `monarch_matmul`, one operation a line of its definition."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def reference(x, right, left, bias=None, activation=None, precision=None):
    """y [..., L s] of x [..., K p], right [K, p, q], left [L, r, s], K q = L r."""
    (K, p, _), (L, r, s) = right.shape, left.shape
    lead = x.shape[:-1]
    z = jnp.einsum("...kp,kpq->...kq", x.reshape(*lead, K, p), right, precision=precision)
    z = z.reshape(*lead, r, L)  # feature f goes to block f % L, as its row f // L
    y = jnp.einsum("...rl,lrs->...sl", z, left, precision=precision)
    y = y.reshape(*lead, s * L)
    return finish(y, bias, activation).astype(x.dtype)


def finish(y, bias, activation):
    """activation(y + bias)."""
    y = y if bias is None else y + bias
    return y if activation is None else ACTIVATIONS[activation](y)
