"""The semantics of decode attention, in plain jnp: the whole cache at once, no block anywhere."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.settings import Settings


def reference(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Decode attention as its definition reads, for the arguments of `api.decode_attention`.

    Everything is computed in float32 at the highest precision, in float64 for float64 inputs.

    Returns:
      out [B, T, N, H] in `settings.out_dtype`, lse [B, N, T] in float32 (float64).
    """
    (_, T, N, _), K = q.shape, k_cache.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if pages is not None:
        k_cache, v_cache = (_contiguous(x, pages) for x in (k_cache, v_cache))
    s = jnp.arange(k_cache.shape[1])
    position = lengths[:, None, None] - T + jnp.arange(T)[:, None]  # of the queries
    seen = s <= position
    if settings.window is not None:
        seen &= s > position - settings.window
    # What is in the cache beyond a row's length is nobody's, a NaN perhaps.
    used = (s < lengths[:, None])[..., None, None]
    k, v = (jnp.where(used, x, 0).astype(wide) for x in (k_cache, v_cache))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))

    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k, precision="highest")
    scores *= settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    some = seen.any(-1)[:, None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    scores = jnp.where(some[..., None], scores, 0)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return out.astype(settings.out_dtype(q.dtype)), jnp.where(some, lse, -jnp.inf)


def _contiguous(cache, pages):
    """[B, max_pages * page_size, K, H] of a paged cache."""
    found = jnp.take(cache, pages, axis=0, mode="clip")
    return found.reshape(pages.shape[0], -1, *cache.shape[2:])
