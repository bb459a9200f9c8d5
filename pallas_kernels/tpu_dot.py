"""Products of matrices in TPU kernels."""

import jax
import jax.numpy as jnp

_ONE_PASS = (None, "default", "fastest", "bfloat16", jax.lax.Precision.DEFAULT)


def dot(a, b, precision, of_a: int = 1, of_b: int = 0):
    """a b in float32, contracted over these axes, at the nearest precision that Mosaic has.

    Products of bfloat16 are exact whatever is asked for; of float32 there are one pass of bfloat16
    and the highest. None is what `jax.default_matmul_precision` says, as outside of kernels.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision
    of_both = precision if isinstance(precision, tuple) else (precision,)
    low = a.dtype == jnp.bfloat16 or all(p in _ONE_PASS for p in of_both)
    precision = jax.lax.Precision.DEFAULT if low else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision, preferred_element_type=jnp.float32
    )
