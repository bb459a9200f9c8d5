"""The semantics of `block_diagonal_matmul`, one operation a line of its definition."""

import jax.numpy as jnp

from pallas_kernels.epilogue import finish


def reference(x, blocks, bias=None, inputs=None, outputs=None, activation=None, precision=None):
    """y [..., K q] of x [..., K p] and blocks [K, p, q]; permutations are gathers."""
    K, p, q = blocks.shape
    if inputs is not None:
        x = x[..., inputs.order(K * p)]
    x = x.reshape(*x.shape[:-1], K, p)
    y = jnp.einsum("...kp,kpq->...kq", x, blocks, precision=precision)
    y = y.reshape(*y.shape[:-2], K * q)
    if outputs is not None:
        y = y[..., outputs.order(K * q)]
    return finish(y, bias, activation).astype(x.dtype)
