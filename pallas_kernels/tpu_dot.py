"""Products of matrices in TPU kernels."""

import jax
import jax.numpy as jnp


def dot(a, b, precision, of_a: int = 1, of_b: int = 0):
    """a b in float32, contracted over these axes, at the nearest precision that Mosaic has.

    Products of bfloat16 are exact whatever is asked for; of float32 there are one pass of bfloat16
    and the highest.
    """
    if a.dtype == jnp.bfloat16 or precision in (None, "default", jax.lax.Precision.DEFAULT):
        precision = None
    else:
        precision = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision, preferred_element_type=jnp.float32
    )
