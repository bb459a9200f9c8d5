"""Decode attention in XLA operations: a block of the cache at a time, on any platform.

The loop ends with the longest row's keys, whatever the cache could hold, and gathers a block's
pages only, so that no copy of a paged cache is made. Splits of the keys are done side by side.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.blockwise import varying_axes
from pallas_kernels.attention.merge import merge

# Rows of queries and splits that keep an accelerator busy. Not measured.
_ROWS = 128


def forward(q, k_cache, v_cache, lengths, pages, settings, platform="cpu"):
    """out [B, T, N, H] in `settings.out_dtype` and lse [B, N, T] in float32; see `api`."""
    B, T, N, H = q.shape
    K = k_cache.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # A CPU has no fast product of bfloat16.
    narrow = wide if platform == "cpu" else q.dtype
    size = k_cache.shape[1] if pages is None else pages.shape[1] * k_cache.shape[1]
    unit = 1 if pages is None else k_cache.shape[1]
    block = -(-min(settings.block or 512, size) // unit) * unit
    splits = settings.splits
    if splits is None:
        splits = 1 if platform == "cpu" else max(1, min(_ROWS // (B * K), size // block))
    first = settings.first(lengths, T).min() // block
    blocks = -(-lengths.max() // block) - first
    each = -(-blocks // splits)
    grouped = q.astype(narrow).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    position = (lengths[:, None] - T + jnp.arange(T))[:, None, None, :, None]

    def absorb(i, old):
        out, most, total = old
        # The last block starts early rather than end beyond the cache.
        start = jnp.minimum(i * block, size - block)
        s = start + jnp.arange(block)
        seen = (s >= i * block) & (s <= position)
        if settings.window is not None:
            seen &= s > position - settings.window
        k, v = (_block(x, pages, start, block) for x in (k_cache, v_cache))
        v = jnp.where((s < lengths[:, None])[..., None, None], v, 0)
        x = _einsum("bkgth,bskh->bkgts", grouped, k.astype(narrow)) * settings.scale
        if settings.softcap is not None:
            x = settings.softcap * jnp.tanh(x / settings.softcap)
        x = jnp.where(seen, x, -jnp.inf)
        new = jnp.maximum(most, x.max(-1))
        finite = jnp.where(new == -jnp.inf, 0, new)
        share, p = jnp.exp(most - finite), jnp.exp(x - finite[..., None])
        some = _einsum("bkgts,bskh->bkgth", p.astype(narrow), v.astype(narrow))
        return out * share[..., None] + some, new, total * share + p.sum(-1)

    def part(p):
        rows = grouped.shape[:4]
        start = jnp.zeros((*rows, H), wide), jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide)
        start = tuple(_vary_like(x, (q, k_cache, v_cache, lengths, pages)) for x in start)
        step = lambda i, old: absorb(first + p * each + i, old)  # noqa: E731
        out, most, total = jax.lax.fori_loop(0, each, step, start)
        divisor = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, most + jnp.log(divisor), -jnp.inf)
        out = (out / divisor[..., None]).transpose(0, 3, 1, 2, 4).reshape(q.shape)
        return out, lse.reshape(B, N, T)

    outs, lses = jax.vmap(part)(jnp.arange(splits)) if splits > 1 else (
        x[None] for x in part(0)
    )  # fmt: skip
    return merge(list(zip(outs, lses, strict=True)), settings.out_dtype(q.dtype))


def _block(cache, pages, start, block):
    """[B, block, K, H] from position `start` on."""
    if pages is None:
        return jax.lax.dynamic_slice_in_dim(cache, start, block, axis=1)
    page = cache.shape[1]
    index = jax.lax.dynamic_slice_in_dim(pages, start // page, block // page, axis=1)
    found = jnp.take(cache, index, axis=0, mode="clip")
    return found.reshape(pages.shape[0], block, *cache.shape[2:])


def _vary_like(x, arrays):
    """Inside shard_map the loop's state must be marked from the start as differing by device."""
    axes = frozenset().union(*(varying_axes(array) for array in jax.tree.leaves(arrays)))
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _einsum(subscripts, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)
