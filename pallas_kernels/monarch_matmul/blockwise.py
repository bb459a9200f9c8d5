"""`monarch_matmul` in XLA operations: two batched products, z in memory between them."""

import jax
import jax.numpy as jnp

from pallas_kernels.epilogue import finish


def forward(x, right, left, bias, activation, precision, platform="cpu"):
    """y [..., L s] in x's dtype."""
    lead, M = x.shape[:-1], -1
    z = _second_input(x.reshape(M, x.shape[-1]), right, left, precision, platform)
    y = _product(z, left, precision, platform)  # [L, M, s]
    y = y.transpose(1, 2, 0).reshape(*lead, -1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return finish(y.astype(wide), bias, activation).astype(x.dtype)


def backward(x, right, left, dy, precision, platform="cpu"):
    """dx in x's dtype, dright and dleft in float32 or wider."""
    (K, p, q), (L, _, s) = right.shape, left.shape
    flat = x.reshape(-1, x.shape[-1])
    z = _second_input(flat, right, left, precision, platform)
    dy = dy.reshape(-1, s, L).transpose(2, 0, 1)
    dleft = _weights(z, dy, precision, platform)
    dz = _product(dy, left.swapaxes(1, 2), precision, platform)  # [L, M, r]
    dz = dz.transpose(1, 2, 0).reshape(-1, K, q).swapaxes(0, 1)
    dright = _weights(flat.reshape(-1, K, p).swapaxes(0, 1), dz, precision, platform)
    dx = _product(dz, right.swapaxes(1, 2), precision, platform)
    return dx.swapaxes(0, 1).reshape(x.shape), dright, dleft


def _second_input(x, right, left, precision, platform):
    """z [L, M, r], by the blocks of left, of x [M, K p]."""
    K, p, _ = right.shape
    L, r, _ = left.shape
    z = _product(x.reshape(-1, K, p).swapaxes(0, 1), right, precision, platform)  # [K, M, q]
    return z.swapaxes(0, 1).reshape(-1, r, L).transpose(2, 0, 1)


def _product(a, b, precision, platform):
    """[n, M, j] of a [n, M, i] and b [n, i, j], in a's dtype."""
    narrow = _narrow(a, platform)
    return jnp.matmul(a.astype(narrow), b.astype(narrow), precision=precision).astype(a.dtype)


def _weights(a, b, precision, platform):
    """[n, i, j] of a [n, M, i] and b [n, M, j], in float32 or wider."""
    narrow, wide = _narrow(a, platform), jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(
        a.astype(narrow), b.astype(narrow), (((1,), (1,)), ((0,), (0,))),
        precision=precision, preferred_element_type=wide,
    )  # fmt: skip


def _narrow(a, platform):
    # A CPU has no fast product of bfloat16.
    return jnp.promote_types(a.dtype, jnp.float32) if platform == "cpu" else a.dtype
