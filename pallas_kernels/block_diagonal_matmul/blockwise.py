"""`block_diagonal_matmul` in XLA operations: one batched product each way.

A stride permutation is a view of x with its axes exchanged, which XLA folds into the product where
the platform's product takes it; any other is a gather.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_diagonal_matmul.permutation import Inverse, permuted
from pallas_kernels.epilogue import finish


def forward(x, blocks, bias, inputs, outputs, activation, precision, platform="cpu"):
    """y [M, K q] in x's dtype, of x [M, K p]."""
    y = _linear(_split(x, inputs, blocks.shape[0]), blocks, precision, platform)
    return finish(_join(y, outputs), bias, activation).astype(x.dtype)


def backward(x, blocks, bias, dy, inputs, outputs, activation, precision, platform="cpu"):
    """dx in x's dtype; gradients of blocks and bias (None without one) in float32 or wider."""
    K, wide = blocks.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    split = _split(x, inputs, K)
    if activation is not None:
        y = _join(_linear(split, blocks, precision, platform), outputs)
        y = finish(y, bias, None).astype(wide)
        _, pull = jax.vjp(lambda y: finish(y, None, activation), y)
        dy = pull(dy.astype(wide))[0].astype(dy.dtype)
    dbias = None if bias is None else jnp.sum(dy, 0, dtype=wide)
    dy = _split(dy, outputs and Inverse(outputs), K)
    dblocks = _product(split, dy, 1, 1, precision, platform)
    dx = _product(dy, blocks, 2, 2, precision, platform).astype(x.dtype)
    return _join(dx, inputs and Inverse(inputs)), dblocks, dbias


def _split(x, permutation, K):
    """[K, M, p] of x [M, K p]."""
    x = permuted(x, permutation)
    return x.reshape(x.shape[0], K, -1).swapaxes(0, 1)


def _join(y, permutation):
    """[M, K q] of y [K, M, q]."""
    return permuted(y.swapaxes(0, 1).reshape(y.shape[1], -1), permutation)


def _linear(x, blocks, precision, platform):
    return _product(x, blocks, 2, 1, precision, platform)


def _product(a, b, of_a, of_b, precision, platform):
    """Products of K matrices, contracted over these axes, in float32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if platform == "cpu":  # which has no fast product of bfloat16
        a, b = a.astype(wide), b.astype(wide)
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((0,), (0,))), precision, preferred_element_type=wide
    )
