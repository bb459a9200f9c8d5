"""Butterfly factors of numbers as a Monarch matrix, for whose products there are kernels.

Factors of strides 1 to W / 2 together are N / W blocks of W x W (`compose`). Those of strides W to
N / 2 join a feature with the N / W features at its distance, W blocks of [N / W, N / W]; W^2 / N of
them, interleaved, are one block of `left`, with zeros between them. So the matrix is

    increasing strides   monarch(right [N / W, W, W], left [N / W, W, W])
    decreasing strides   the transposed one of the transposed blocks

with 2 M N W multiplications, zeros included, in place of 2 M N log2(N) that no matrix unit does. In
bfloat16 at M 8192, predicted beside a kernel whose larger strides were sums of registers (libtpu
0.0.52, microseconds, v5e / v5p / v6e):

                            those sums          so
    4096, forward        165 /  55 / 103    166 /  52 /  83
    4096, backward       470 / 200 / 339    287 / 131 / 135
    1024, backward        85 /  37 /  62     66 /  31 /  34
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.butterfly_matmul.compose import compose


def factors(twiddle, increasing: bool, width: int):
    """right and left, [N / W, W, W] in float32 or wider, of twiddle [log2(N), N / 2, 2, 2, 1, 1].

    Args:
      width: W, a power of two, W^2 at least N.
    """
    stages, N = twiddle.shape[0], 2 * twiddle.shape[1]
    within, R = width.bit_length() - 1, N // width
    small, large = (0, within) if increasing else (stages - within, 0)
    right = compose(twiddle, small, within, increasing).reshape(R, width, width)
    joined = compose(twiddle, large, stages - within, increasing).reshape(width // R, R, R, R)
    apart = jnp.eye(width // R, dtype=joined.dtype)  # feature s = j R + l of the joined is in l
    left = joined.transpose(1, 2, 0, 3)[:, :, :, :, None] * apart[:, None, :]  # l r j r' j'
    left = left.reshape(R, width, width)
    return (right, left) if increasing else (right.swapaxes(1, 2), left.swapaxes(1, 2))


def unsupported(kernels, x, increasing, width, backward) -> str | None:
    """Why `kernels`, Monarch's of a platform, cannot do this; None where they can."""
    N = x.shape[1]
    if not 2 * width <= N <= width**2:
        return f"{N} features, not {2 * width} to {width**2} of them"
    shape = jax.ShapeDtypeStruct((N // width, width, width), x.dtype)
    return kernels.unsupported(x, shape, shape, backward, transposed=not increasing)


def forward(kernels, x, twiddle, increasing, precision, width, **how):
    """y [M, N] of x [M, N]."""
    weights = (w.astype(x.dtype) for w in factors(twiddle, increasing, width))
    if increasing:
        return kernels.forward(x, *weights, None, None, precision, **how)
    return kernels.transposed(x, *weights, precision, **how)


def backward(kernels, x, twiddle, dy, increasing, precision, width, **how):
    """dx in x's dtype and the gradient of twiddle, of right's and left's as the kernels have them:
    on a TPU of one core rounded to x's dtype."""
    make = functools.partial(factors, increasing=increasing, width=width)
    weights, pull = jax.vjp(make, twiddle)
    rounded = (w.astype(x.dtype) for w in weights)
    how["transposed"] = not increasing
    dx, *gradients = kernels.backward(x, *rounded, dy, precision, **how)
    return dx, pull(tuple(gradients))[0]
