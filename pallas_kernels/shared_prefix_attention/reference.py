"""The semantics of attention over shared prefixes: over the concatenation, made for each sequence.

Every sequence gets its own copy of its prefixes, and a softmax over all of its keys at once.
"""

import jax
import jax.numpy as jnp


def reference(q, levels, k_cache, v_cache, lengths, pages, *, scale, softcap):
    """(out [B, T, N, H] in q's dtype, lse [B, N, T] in float32); see `api`.

    Everything is computed in float32 at the highest precision, in float64 for float64 inputs.
    """
    B, T, N, H = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    keys, values, seen = [], [], []
    for level in levels:
        G, length = level.k.shape[:2]
        groups = jnp.arange(B) // (B // G) if level.groups is None else level.groups
        own = (groups >= 0) & (groups < G)
        groups = jnp.clip(groups, 0, G - 1)
        end = jnp.full(G, length) if level.lengths is None else level.lengths
        used = (jnp.arange(length) < end[groups][:, None]) & own[:, None]
        keys.append(level.k[groups])
        values.append(level.v[groups])
        seen.append(jnp.broadcast_to(used[:, None], (B, T, length)))
    if k_cache is not None:
        if pages is not None:
            k_cache, v_cache = (
                jnp.take(x, pages, axis=0, mode="clip").reshape(B, -1, *x.shape[2:])
                for x in (k_cache, v_cache)
            )
        keys.append(k_cache)
        values.append(v_cache)
        position = lengths[:, None, None] - T + jnp.arange(T)[:, None]
        seen.append(jnp.arange(k_cache.shape[1]) <= position)
    seen = jnp.concatenate(seen, axis=2)
    used = seen.any(1)[..., None, None]
    k, v = (
        jnp.where(used, jnp.concatenate([_heads(x, N) for x in parts], axis=1), 0).astype(wide)
        for parts in (keys, values)
    )
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k, precision="highest")
    scores *= H**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    some = seen.any(-1)[:, None]
    scores = jnp.where(some[..., None], jnp.where(seen[:, None], scores, -jnp.inf), 0)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return out.astype(q.dtype), jnp.where(some, lse, -jnp.inf)


def _heads(x, N):
    return jnp.repeat(x, N // x.shape[2], axis=2)
