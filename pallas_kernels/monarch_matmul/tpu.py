"""`monarch_matmul` on a TPU, for the arrays of `api`."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.interleave import LANES
from pallas_kernels.monarch_matmul import (
    tpu_backward,
    tpu_forward,
    tpu_plan,
    tpu_stages,
    tpu_transposed,
)


def unsupported(x, right, left, backward, transposed=False):
    """Why the kernels cannot do this; None where they can."""
    plan = tpu_plan.plan(rows(x), right, left, x.dtype.itemsize, backward, transposed)
    return tpu_plan.unsupported(plan, x.dtype.name)


def keeps(x, right, left) -> bool:
    """Whether the forward pass keeps what is between the factors for the backward pass."""
    return tpu_plan.keeps(rows(x), right, left, x.dtype)


def kept(x, right):
    """Shape and dtype of what `forward` keeps."""
    packed = 4 // x.dtype.itemsize
    shape = rows(x) // packed, right.shape[0] * right.shape[2]
    return shape, jnp.int32 if packed > 1 else x.dtype


def rows(x) -> int:
    """How many rows x [..., I] has."""
    return int(np.prod(x.shape[:-1]))


def forward(x, right, left, bias, activation, precision, interpret=False, keep=False):
    """y [..., L s]; where `keep`, and the inner features for `backward`, words or float32."""
    plan = tpu_plan.plan(rows(x), right, left, x.dtype.itemsize, False, kept=keep)
    if bias is not None:
        bias = _bias_in_order(bias, plan)
    flat = x.reshape(plan.M, plan.inputs)
    found = tpu_forward.forward(flat, right, left, bias, plan, activation, precision, interpret)
    y = found["y"].reshape(*x.shape[:-1], plan.outputs)
    return (y, found["z"]) if keep else y


def backward(x, right, left, dy, precision, interpret=False, transposed=False, z=None):
    """dx in x's dtype, dright and dleft in float32, of one core already rounded to x's dtype.

    z: what `forward` kept, or None.
    """
    M, how = rows(x), {"precision": precision, "interpret": interpret}
    flat, dy = (a.reshape(M, a.shape[-1]) for a in (x, dy))
    if z is not None:
        plan = tpu_plan.kept_backward(M, right, left, x.dtype.itemsize)
        kernel = tpu_backward if plan.backward else tpu_stages
        dx, dright, dleft = kernel.backward(flat, right, left, dy, z, plan, **how)
    else:
        plan = tpu_plan.plan(M, right, left, x.dtype.itemsize, True, transposed)
        missing = -M % plan.rows  # rows of the last step that are none would enter the sums
        if missing:
            flat, dy = (jnp.pad(a, ((0, missing), (0, 0))) for a in (flat, dy))
            plan = plan._replace(M=M + missing)
        if transposed:
            dx, dright, dleft = tpu_transposed.backward(flat, right, left, dy, plan, **how)
        else:
            dx, dright, dleft = tpu_backward.backward(flat, right, left, dy, None, plan, **how)
    dright, dleft = (jnp.sum(each, 0, dtype=jnp.float32) for each in (dright, dleft))
    return dx[:M].reshape(x.shape), dright, dleft


def transposed(x, right, left, precision, interpret=False):
    """x [..., L s] times the transposed matrix, [..., K p]; `backward` is its derivative too."""
    plan = tpu_plan.plan(rows(x), right, left, x.dtype.itemsize, False, True)
    flat = x.reshape(plan.M, plan.outputs)
    y = tpu_transposed.forward(flat, right, left, plan, precision, interpret)["y"]
    return y.reshape(*x.shape[:-1], plan.inputs)


def _bias_in_order(bias, plan):
    """[L, s] of [L s]: that of a block, by the lanes for `interleave.spread`."""
    each = LANES // plan.L
    block, lane = np.arange(plan.L)[:, None], np.arange(plan.s)
    tile, lane = lane // LANES * LANES, lane % LANES
    place = (lane - block) % LANES  # j * L + t of feature t * (128 / L) + j
    feature = tile + place % plan.L * each + place // plan.L
    return bias[feature * plan.L + block]
