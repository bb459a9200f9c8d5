"""The semantics of attention, in plain jnp: readable, O(T S) memory, no block anywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import dropout, masks


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: masks.Mask = masks.Full(),
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    alibi_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seeds: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention as its definition reads, for the arguments of `api.attention`.

    Everything is computed in float32 at the highest precision, in float64 for float64 inputs.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H], K dividing N.
      segment_ids: int32 [B, T] of the queries and [B, S] of the keys.
      bias: broadcasts to [B, N, T, S].
      alibi: [N] slopes; the score falls by slope * |t + alibi_offset - s|.
      alibi_offset: default S - T, the queries at the end of the keys.
      sinks: [N] logits that take part in the softmax and have no value.
      dropout_seeds: uint32[B, N, 2] of `dropout.seeds`.

    Returns:
      out [B, T, N, H] in v's dtype, and the log-sum-exp [B, N, T] of the scores (and the sink) in
      float32. A row that sees nothing gives out 0 and lse -inf (with a sink: the sink's logit).
    """
    (T, N, H), (S, K) = q.shape[1:], k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    out_dtype = v.dtype
    q, k, v = (x.astype(wide) for x in (q, k, v))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    n, t, s = jnp.arange(N)[:, None, None], jnp.arange(T)[:, None], jnp.arange(S)

    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    scores *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.astype(wide)
    if alibi is not None:
        offset = S - T if alibi_offset is None else alibi_offset
        scores -= jax.lax.stop_gradient(alibi.astype(wide))[:, None, None] * abs(t + offset - s)

    seen = jnp.broadcast_to(mask.element(n, t, s), scores.shape)
    if segment_ids is not None:
        of_q, of_kv = segment_ids
        seen &= (of_q[:, :, None] == of_kv[:, None, :])[:, None]

    if bias is not None:
        seen = seen & (scores != -jnp.inf)  # what a bias hides is not seen either
    weights, lse = _softmax(scores, seen, sinks)
    if dropout_rate:
        seed_0, seed_1 = dropout_seeds[..., 0, None, None], dropout_seeds[..., 1, None, None]
        kept = dropout.keep(seed_0, seed_1, t, s, dropout_rate)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return out.astype(out_dtype), lse


def _softmax(scores, seen, sinks):
    """Weights of what is seen, and the log-sum-exp, without a NaN in value or gradient."""
    some = jnp.any(seen, axis=-1)
    scores = jnp.where(seen, scores, -jnp.inf)
    # A row that sees nothing is computed as if it saw everything at score 0, then discarded.
    scores = jnp.where(some[..., None], scores, 0)
    lse = jax.nn.logsumexp(scores, axis=-1)
    lse = jnp.where(some, lse, -jnp.inf)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.astype(lse.dtype)[:, None])
    finite = jnp.where(some, lse, 0)
    return jnp.where(seen, jnp.exp(scores - finite[..., None]), 0), lse
