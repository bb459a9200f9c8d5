"""`butterfly_matmul` on Hopper GPUs: arrays in and out, around kernels of others.

Factors of numbers are a Monarch matrix (`as_monarch`), by its kernels. Factors of blocks of b
features are a product each, of the two blocks of a pair side by side by [2 b, 2 b], with rows in
and out of memory in their places: nothing is permuted. The backward pass makes what the factors
started from again.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import hopper, hopper_blocks, hopper_weights
from pallas_kernels.butterfly_matmul import as_monarch
from pallas_kernels.butterfly_matmul.reference import strides
from pallas_kernels.hopper import Machine
from pallas_kernels.hopper_blocks import TALL
from pallas_kernels.monarch_matmul import gpu as monarch


def unsupported(x, twiddle, increasing, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    b = twiddle.shape[-1]
    if b == 1:
        return as_monarch.unsupported(monarch, x, increasing, width(x), backward)
    if (reason := hopper.unsupported(x.dtype)) is not None:
        return reason
    if b % TALL:
        return f"blocks of {b} features, no multiple of {TALL}"
    if hopper_blocks.plan(TALL, 1, 2 * b, 2 * b, 1) is None:
        return f"blocks of {b} features are too large for shared memory"
    return None


def forward(x, twiddle, increasing, precision, machine=Machine()):
    """y [M, N] of x [M, N]."""
    if twiddle.shape[-1] == 1:
        how = increasing, precision, width(x)
        return as_monarch.forward(monarch, x, twiddle, *how, machine=machine)
    *_, y = _values(x, twiddle, increasing, machine)
    return y[: len(x)]


def backward(x, twiddle, dy, increasing, precision, machine=Machine()):
    """dx and the gradient of twiddle in their dtype."""
    if twiddle.shape[-1] == 1:
        how = increasing, precision, width(x)
        return as_monarch.backward(monarch, x, twiddle, dy, *how, machine=machine)
    values, dy = (
        _values(x, twiddle[:-1], increasing, machine, len(twiddle)),
        hopper_blocks.whole_tiles(dy),
    )
    gradients = []
    for value, factor, stride in reversed(_steps(values, twiddle, increasing)):
        gradients.insert(0, _gradient(value, dy, factor.shape, stride, machine))
        dy = _product("butterfly_dx", dy, _pairs(factor).swapaxes(1, 2), stride, machine)
    return dy[: len(x)], jnp.stack(gradients).astype(twiddle.dtype)


def _steps(values, twiddle, increasing):
    """What each factor starts from, the factor and its stride, in blocks."""
    return list(zip(values, twiddle, strides(len(twiddle), increasing), strict=True))


def _values(x, twiddle, increasing, machine, stages: int | None = None):
    """x in whole tiles and what each of the first factors, of `stages`, makes of it."""
    found = [hopper_blocks.whole_tiles(x)]
    of = strides(stages or len(twiddle), increasing)
    for factor, stride in zip(twiddle, of, strict=False):
        found.append(_product("butterfly_y", found[-1], _pairs(factor), stride, machine))
    return found


def _pairs(factor):
    """[n / 2, 2 b, 2 b] of a factor [n / 2, 2, 2, b, b]; rows are inputs."""
    pairs, b = factor.shape[0], factor.shape[-1]
    return factor.transpose(0, 2, 4, 1, 3).reshape(pairs, 2 * b, 2 * b)


def _product(name, x, weights, stride, machine):
    at = hopper_blocks.plan(len(x), *weights.shape, machine.cores)
    return hopper_blocks.to_rows(name, x, weights, at, machine, stride)


def _gradient(x, dy, shape, stride, machine):
    """float32 [n / 2, 2, 2, b, b], a product for each block of each pair."""
    pairs, b = shape[0], shape[-1]
    d, t = np.divmod(np.arange(pairs), stride)
    block = (2 * d + np.arange(2)[:, None]) * stride + t  # [2, pairs]
    inputs, outputs = np.broadcast_arrays(block[None], block[:, None])  # [outputs, inputs, pairs]
    starts = b * np.stack([inputs, outputs], -1).transpose(2, 0, 1, 3).reshape(-1, 2)
    found = hopper_weights.gradients("butterfly_dtwiddle", x, dy, starts, b, b, machine=machine)
    return found.swapaxes(1, 2).reshape(shape)


def width(x) -> int:
    """Of Monarch's blocks: eight features or more of one go to a block of the other factor."""
    return next((w for w in (128, 256) if w * w >= 8 * x.shape[-1]), 512)
