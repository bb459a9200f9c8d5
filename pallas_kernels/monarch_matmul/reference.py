"""The semantics of `monarch_matmul`, one operation a line of its definition."""

import jax.numpy as jnp

from pallas_kernels.epilogue import finish


def reference(x, right, left, bias=None, activation=None, precision=None):
    """y [..., L s] of x [..., K p], right [K, p, q], left [L, r, s], K q = L r."""
    (K, p, _), (L, r, s) = right.shape, left.shape
    lead = x.shape[:-1]
    z = jnp.einsum("...kp,kpq->...kq", x.reshape(*lead, K, p), right, precision=precision)
    z = z.reshape(*lead, r, L)  # feature f goes to block f % L, as its row f // L
    y = jnp.einsum("...rl,lrs->...sl", z, left, precision=precision)
    y = y.reshape(*lead, s * L)
    return finish(y, bias, activation).astype(x.dtype)
