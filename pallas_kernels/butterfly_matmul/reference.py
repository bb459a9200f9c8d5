"""The semantics of `butterfly_matmul`, a factor at a time."""

import jax.numpy as jnp


def strides(stages: int, increasing: bool) -> list[int]:
    """The stride of each factor, in blocks, in the order in which they are applied."""
    found = [2**i for i in range(stages)]
    return found if increasing else found[::-1]


def reference(x, twiddle, increasing=True, precision=None):
    """y [..., n b] of x [..., n b] and twiddle [log2(n), n / 2, 2, 2, b, b]; sums in float32."""
    stages, pairs, b = twiddle.shape[0], twiddle.shape[1], twiddle.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    lead, y, twiddle = x.shape[:-1], x.astype(wide), twiddle.astype(wide)
    for factor, s in zip(twiddle, strides(stages, increasing), strict=True):
        y = y.reshape(*lead, pairs // s, 2, s, b)
        factor = factor.reshape(pairs // s, s, 2, 2, b, b)
        y = jnp.einsum("...djsl,dsijkl->...disk", y, factor, precision=precision)
    return y.reshape(x.shape).astype(x.dtype)
