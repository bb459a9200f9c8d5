"""Exact union of attention over disjoint sets of keys, by log-sum-exp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(
    parts: Sequence[tuple[jax.Array, jax.Array]], dtype: jnp.dtype | None = None
) -> tuple[jax.Array, jax.Array]:
    """What attention over all keys gives, from attention over parts of them.

    The keys of a shared prefix and of each suffix (Hydragen, arXiv 2402.05099), of the devices of
    a ring, of two masks with different positions (LM-Infinite).

    Args:
      parts: pairs (out [B, T, N, H], lse [B, N, T]) of one shape, as `attention` returns them with
        `return_lse=True`. No key may be in two parts.
      dtype: of the result; default that of the first part. The sum is made in float32, or wider.

    Returns:
      (out, lse) of all keys together. Where every part has lse -inf, out is 0 and lse -inf.
      Differentiable in all outs and lses.

    Raises:
      ValueError: no parts, or shapes that differ.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge: parts is empty; give at least one pair (out, lse)")
    for out, lse in parts:
        expected = (out.shape[0], out.shape[2], out.shape[1]) if out.ndim == 4 else None
        if out.shape != parts[0][0].shape or lse.shape != expected:
            raise ValueError(
                "merge: parts must be pairs (out [B, T, N, H], lse [B, N, T]) of one shape, got "
                + ", ".join(f"({out.shape}, {lse.shape})" for out, lse in parts)
            )
    wide = jnp.promote_types(parts[0][0].dtype, jnp.float32)
    lses = jnp.stack([lse.astype(wide) for _, lse in parts])
    most = jax.lax.stop_gradient(lses.max(0))
    most = jnp.where(most == -jnp.inf, 0, most)
    shares = jnp.exp(lses - most)
    total = shares.sum(0)
    some = total > 0
    divisor = jnp.where(some, total, 1)
    shares = jnp.swapaxes(shares / divisor, 2, 3)[..., None]
    out = sum(share * out.astype(wide) for share, (out, _) in zip(shares, parts, strict=True))
    lse = jnp.where(some, most + jnp.log(divisor), -jnp.inf)
    return out.astype(parts[0][0].dtype if dtype is None else dtype), lse


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], lse [B, N, T]) with exp(sinks[n]) in the sum of each row of head n.

    The others' weights shrink by 1 - its share; a sink has no value of its own. `sinks` is [N].
    """
    sinks = sinks.astype(lse.dtype)[:, None]
    share = jnp.swapaxes(jax.nn.sigmoid(lse - sinks), 1, 2)[..., None]
    return (out * share).astype(out.dtype), jnp.logaddexp(lse, sinks)
