"""`butterfly_matmul` in XLA operations: products of a few factors at a time, which are matrices."""

import jax
import jax.numpy as jnp

from pallas_kernels.butterfly_matmul.compose import compose, groups

# Columns of a block of composed factors: five scalar factors are one product of matrices 32 wide
# and one pass over memory, at 3.2 times their operations.
WIDTH = 32


def forward(x, twiddle, increasing, precision, platform="cpu"):
    """y [M, n b] in x's dtype; what lies between two products is rounded to it on accelerators."""
    stages, b = twiddle.shape[0], twiddle.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    narrow = wide if platform == "cpu" else x.dtype  # a CPU has no fast product of bfloat16
    y = x
    for first, count in groups(stages, b, WIDTH, increasing):
        weights = compose(twiddle, first, count, increasing).astype(narrow)
        D, S = weights.shape[:2]
        weights = weights.reshape(D, S, 2**count, b, 2**count, b)
        y = y.astype(narrow).reshape(x.shape[0], D, 2**count, S, b)
        y = jnp.einsum(
            "mdrsl,dsrlok->mdosk", y, weights, precision=precision, preferred_element_type=wide
        )
    return y.reshape(x.shape).astype(x.dtype)


def backward(x, twiddle, dy, increasing, precision, platform="cpu"):
    """dx in x's dtype, and the gradient of twiddle in its dtype."""
    _, pull = jax.vjp(lambda *a: forward(*a, increasing, precision, platform), x, twiddle)
    return pull(dy)


def flops(stages: int, b: int) -> int:
    """Operations of the products of `forward` for one row, composing apart."""
    found = groups(stages, b, WIDTH, True)
    return sum(2 * 2**stages * b * 2**count * b for _, count in found)
