"""Attention over shared prefixes: the public function and its composition of two other ops.

Hydragen (Juravsky et al. 2024, arXiv 2402.05099): softmax attention over the union of disjoint sets
of keys is the average of attention over each, weighted by the exponentials of their log-sum-exps.
So a prefix that many sequences share is read once, for the queries of all of them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import mesh
from pallas_kernels.attention import api as attention
from pallas_kernels.attention import merge
from pallas_kernels.decode_attention import api as decode
from pallas_kernels.shared_prefix_attention.checks import check
from pallas_kernels.shared_prefix_attention.reference import reference


class Level(NamedTuple):
    """One level of a tree of prefixes: G of them, each shared by the sequences of its group.

    Attributes:
      k, v: [G, P, K, H], keys and values of the G prefixes.
      lengths: integers [G], keys of each prefix; None where all have P. Those beyond are not seen.
      groups: integers [B], the prefix of each sequence, in any order; one outside of 0 to G - 1
        means none. None where G divides B and neighbours share: sequence b has prefix b // (B / G).
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array | None = None
    groups: jax.Array | None = None


def shared_prefix_attention(
    q: jax.Array,
    prefixes: Sequence[Level],
    k_cache: jax.Array | None = None,
    v_cache: jax.Array | None = None,
    *,
    lengths: jax.Array | None = None,
    pages: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of each sequence to its prefix of every level and to its own suffix, exactly.

    Equal to attention over the concatenation [prefix of level 0, of level 1, ..., suffix]. A flat
    batch has one level with G = 1; a tree has a level for each depth, from the root, with as many
    prefixes as nodes. Each level is one call of `attention`, in which the queries of all sequences
    of a group, and all query heads of a key head, are rows of one product; the suffix is
    `decode_attention`. The parts are made and merged in float32, by their log-sum-exps, and rounded
    to q's dtype once. Positions are in the keys already (rotary), so nothing here depends on them.

    The TPU's `attention` has heads before lengths: hold prefixes as [G, K, P, H] from one step to
    the next and pass `jnp.swapaxes(k, 1, 2)`, which costs nothing then; [G, P, K, H] in memory is
    transposed, read and written once more a call.

    Args:
      q: [B, T, N, H], float32, bfloat16, float16 or float64: the last T tokens of each suffix (or
        the T tokens that follow the prefixes).
      prefixes: the levels; k and v in q's dtype, K dividing N. Every query sees all keys of them.
      k_cache, v_cache, lengths, pages, splits: of the suffixes, as for `decode_attention`, lengths
        counting from the suffix's start; all None for no suffixes.
      scale: Python number; default H**-0.5.
      softcap: scores become softcap * tanh(scores / softcap).
      return_lse: return the log-sum-exp of the scores too.
      sharding: how q is laid out on a mesh, over B and N alone: `NamedSharding(mesh,
        P(batch_axes, None, head_axes, None))`. Suffixes are laid out alike; prefixes over K, and
        whole on every device of the batch's axes. The heads' axes must divide K.
      implementation: None, by the platform for which the program is lowered; or "reference" (over
        the concatenation), "blockwise", "tpu".

    Returns:
      out [B, T, N, H] in q's dtype; with return_lse (out, lse), lse [B, N, T] in float32. A query
      that sees nothing gives out 0 and lse -inf.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a derivative where
        there are suffixes (but for "reference").
    """
    suffixes = {"k_cache": k_cache, "v_cache": v_cache, "lengths": lengths}
    of_them = {"pages": pages, "splits": splits}
    levels = check(q, prefixes, Level, suffixes, of_them, scale, softcap, implementation)
    how = {"scale": scale, "softcap": softcap, "implementation": implementation}
    arrays = (q, levels, k_cache, v_cache, lengths, pages)
    if implementation == "reference":
        compute = jax.jit(functools.partial(reference, scale=scale, softcap=softcap))
    else:
        compute = functools.partial(_compute, splits=splits, how=how)
    out, lse = _over_mesh(compute, arrays, sharding)
    return (out, lse) if return_lse else out


def _compute(q, levels, k_cache, v_cache, lengths, pages, *, splits, how):
    parts = [_level(q, level, how) for level in levels]
    if k_cache is not None:
        own = {"lengths": lengths, "pages": pages, "splits": splits}
        parts.append(decode.part(q, k_cache, v_cache, **own, **how))
    return merge(parts, q.dtype)


def _level(q, level: Level, how):
    """(out [B, T, N, H], lse [B, N, T]) over one level's prefixes, in float32 (float64)."""
    (B, T, N, _), (G, length, K, _) = q.shape, level.k.shape[:4]
    s = jnp.arange(length)
    unused = None if level.lengths is None else s >= level.lengths[:, None]
    if level.groups is None:
        segments = None
        if unused is not None:
            rows = B // G * T * (N // K)
            segments = jnp.zeros((G, rows), jnp.int32), unused.astype(jnp.int32)
        return _fold(q, level.k, level.v, G, segments, how)
    # In one row of keys: even ids tell prefixes apart, odd ones are of keys beyond a prefix's end.
    # Sequences in the order of their ids let `attention` skip blocks of other prefixes.
    own = (level.groups >= 0) & (level.groups < G)
    groups = jnp.where(own, level.groups, -1)
    order = jnp.argsort(groups, stable=True)
    of_q = jnp.repeat(2 * groups[order], T * (N // K))[None]
    of_kv = jnp.broadcast_to(2 * jnp.arange(G)[:, None], (G, length))
    of_kv = of_kv if unused is None else of_kv + unused
    k, v = (x.reshape(1, G * length, *x.shape[2:]) for x in level[:2])
    segments = of_q.astype(jnp.int32), of_kv.reshape(1, -1).astype(jnp.int32)
    out, lse = _fold(q[order], k, v, 1, segments, how)
    back = jnp.argsort(order)
    return out[back], lse[back]


def _fold(q, k, v, G, segments, how):
    """Attention with a group's sequences and a key head's query heads as rows of queries."""
    (B, T, N, H), K = q.shape, k.shape[2]
    r, g = B // G, N // K
    rows = q.reshape(G, r, T, K, g, H).transpose(0, 1, 2, 4, 3, 5).reshape(G, r * T * g, K, H)
    out, lse = attention.part(rows, k, v, segment_ids=segments, **how)
    out = out.reshape(G, r, T, g, K, H).transpose(0, 1, 2, 4, 3, 5).reshape(B, T, N, H)
    lse = lse.reshape(G, K, r, T, g).transpose(0, 2, 1, 4, 3).reshape(B, N, T)
    return out, lse


def _over_mesh(compute, arrays, sharding):
    """compute(*arrays) -> (out, lse), in shard_map where the layout of q is known."""
    q, levels, k_cache, v_cache, lengths, pages = arrays
    found = mesh.layout("shared_prefix_attention", q, sharding)
    if found is None:
        return compute(*arrays)
    devices, b, n, explicit = found
    B, heads = q.shape[0], mesh.size(devices, n)
    keys = [x.shape[2] for x in (k_cache, *(level.k for level in levels)) if x is not None]
    if B % mesh.size(devices, b) or any(K % heads for K in keys):
        raise ValueError(
            f"shared_prefix_attention: sharding must divide q's batch {B} and the key heads "
            f"{sorted(set(keys))}; mesh axes {b} have size {mesh.size(devices, b)}, {n} {heads}"
        )
    # A device's sequences need not be whole groups, so each names its own.
    levels = [x if x.groups is not None else x._replace(groups=_neighbours(x, B)) for x in levels]
    shared = P(None, None, n, None)
    cache = None if k_cache is None else shared if pages is not None else P(b, None, n, None)
    rows = None if lengths is None else P(b)
    specs = (
        P(b, None, n, None),
        [Level(shared, shared, None if x.lengths is None else P(), P(b)) for x in levels],
        cache, cache, rows, None if pages is None else P(b, None),
    )  # fmt: skip
    arrays = q, levels, k_cache, v_cache, lengths, pages
    arrays = jax.tree.map(lambda x, spec: mesh.place(x, devices, spec, explicit), arrays, specs)
    return mesh.shard_map(
        compute,
        mesh=devices,
        in_specs=specs,
        out_specs=(specs[0], P(b, n, None)),
    )(*arrays)


def _neighbours(level, B):
    return jnp.arange(B) // (B // level.k.shape[0])
