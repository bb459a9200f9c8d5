"""Attention in XLA operations, by blocks of scores: memory linear in length, on any platform.

One loop over the live pairs of a q block and a kv block (`schedule`), forward with the running
maximum and sum of FlashAttention-2 (arXiv 2307.08691), backward from the log-sum-exp: a block's
weights are computed again and give all of dq, dk, dv. Empty blocks are no iterations. Results are
read and written in place, in arrays as large as q, k and v.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import schedule
from pallas_kernels.attention.block import Inputs, Plan, Tile, scores, scores_gradient, weights
from pallas_kernels.attention.masks import Prefix

# A CPU runs up to so many blocks as straight code, which is faster and takes longer to compile.
_UNROLL = 16


def block_sizes(T: int, S: int, platform: str) -> tuple[int, int]:
    """block_q and block_kv.

    On a CPU a quarter of the length, which leaves 10 of 16 blocks under a causal mask, from 64 to
    512. Forward and backward in ms, causal float32, medians on two shared x86-64 cores, sides of
    64 / 128 / 256 / 512, each row in one run with attention that keeps its T x S weights, four
    blocks of queries at a time (the machine was not idle, and up to 10 blocks were written out):

        B 16, N 6, T  128, H 32     16 /   23                  17
        B  8, N 4, T  256, H 64     21 /   28 /   39           23
        B  8, N 4, T  512, H 64     89 /   78 /   99           67
        B  4, N 4, T 1024, H 64    157 /  151 /  140          102
        B  1, N 8, T 2048, H 64          265 /  267 / 233     168
        B  1, N 8, T 4096, H 64         1176 / 1134 / 996    1142

    An accelerator wants large products and has the memory: 512. Not measured.
    """
    side = min(max(min(T, S) // 4, 64), 512) if platform == "cpu" else 512
    return min(side, -(-T // 8) * 8), min(side, -(-S // 8) * 8)


def forward(q, k, v, bias, alibi, segment_ids, dropout_seed, settings, platform="cpu"):
    """out [B, T, N, H] in `settings.out_dtype`, log-sum-exp [B, N, T]; see `api.attention`.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H]. bias: [#B, #N, #T, S] or None. alibi: [N] or None.
      segment_ids: ([B, T], [B, S]) or None. dropout_seed: uint32[B, N, 2] or None.
      settings: `settings.Settings`.
      platform: "cpu", or anything else for an accelerator; decides block sizes and dtypes.
    """
    outs, lses, order = [], [], []
    for plan in _plans(q, k, settings, platform):
        inputs = _inputs(plan, q, k, v, bias, alibi, segment_ids, dropout_seed)
        out, lse = _forward(inputs, plan)
        outs.append(_to_heads(out, q.shape[1]))
        lses.append(_to_heads(lse[..., None], q.shape[1])[..., 0])
        order.append(plan.heads)
    back = np.argsort(np.concatenate(order))
    out, lse = (_pick(jnp.concatenate(x, 1), back, 1) for x in (outs, lses))
    return jnp.swapaxes(out, 1, 2).astype(settings.out_dtype(v.dtype)), lse


def backward(
    q, k, v, bias, alibi, segment_ids, dropout_seed, out, lse, dout, dlse, settings, platform="cpu"
):
    """dq, dk, dv in their inputs' dtypes, and dbias in float32 and bias's shape.

    dbias is None without bias or without `settings.bias_gradient`.

    Args: as `forward`, its results, and their cotangents.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    delta = jnp.einsum("btnh,btnh->bnt", dout.astype(wide), out.astype(wide)) - dlse
    # Weights of a row that sees nothing, and of padding, are exp(. - inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    plans = _plans(q, k, settings, platform)
    total = None
    for plan in plans:
        inputs = _inputs(plan, q, k, v, bias, alibi, segment_ids, dropout_seed)
        by_row = [
            _group(dout.astype(inputs.v.dtype), plan, 0),
            _group(jnp.swapaxes(lse, 1, 2)[..., None], plan, jnp.inf)[..., 0],
            _group(jnp.swapaxes(delta, 1, 2)[..., None], plan, 0)[..., 0],
        ]
        dq, dk, dv, dbias = _backward(inputs, *by_row, plan)
        found = (
            _to_heads(dq, q.shape[1]),
            dk[:, :, : k.shape[1]],
            dv[:, :, : k.shape[1]],
            None if dbias is None else _merge_bias(dbias, bias.shape),
        )
        total = found if len(plans) == 1 else _add(total, found, plan, (q, k, v, bias))
    dq, dk, dv = (jnp.swapaxes(x, 1, 2).astype(y.dtype) for x, y in zip(total, (q, k, v)))
    return dq, dk, dv, total[3]


def _forward(inputs, plan):
    """out [B, K, G, T, H] and lse [B, K, G, T], with padded rows."""
    q, v = inputs.q, inputs.v
    wide = jnp.promote_types(q.dtype, jnp.float32)
    start = (
        jnp.zeros((*q.shape[:4], v.shape[-1]), wide),
        jnp.full(q.shape[:4], -jnp.inf, wide),
        jnp.zeros(q.shape[:4], wide),
    )
    update = functools.partial(_absorb, inputs, plan)
    out, most, total = _loop(update, start, ("rows", "rows", "rows"), inputs, plan)
    some = total > 0
    divisor = jnp.where(some, total, 1)
    return out / divisor[..., None], jnp.where(some, most + jnp.log(divisor), -jnp.inf)


def _absorb(inputs, plan, tile, old):
    """The running output, maximum and sum of a q block after one more kv block."""
    out, most, total = old
    x = scores(inputs, plan, tile)[0]
    new_most = jnp.maximum(most, x.max(-1))
    finite = jnp.where(new_most == -jnp.inf, 0, new_most)
    old_share = jnp.exp(most - finite)
    p = jnp.exp(x - finite[..., None])
    total = total * old_share + p.sum(-1)
    p = weights(p, inputs, plan, tile)[0].astype(inputs.v.dtype)
    some_out = _einsum("bkgts,bksh->bkgth", p, tile.cut_keys(inputs.v))
    return out * old_share[..., None] + some_out, new_most, total


def _backward(inputs, dout, lse, delta, plan):
    """dq [B, K, G, T, H], dk and dv [B, K, S, H], dbias like inputs.bias; all wide and padded."""
    wide = jnp.promote_types(inputs.q.dtype, jnp.float32)
    start = [jnp.zeros(x.shape, wide) for x in (inputs.q, inputs.k, inputs.v)]
    where = ["rows", "keys", "keys"]
    if inputs.bias is not None and plan.settings.bias_gradient:
        start.append(jnp.zeros(inputs.bias.shape, wide))
        where.append("bias")

    def add_gradients(tile, old):
        q, k, v = tile.cut_rows(inputs.q), tile.cut_keys(inputs.k), tile.cut_keys(inputs.v)
        some_dout = tile.cut_rows(dout)
        x, capped = scores(inputs, plan, tile)
        p = jnp.exp(x - tile.cut_rows(lse)[..., None])
        dp = _einsum("bkgth,bksh->bkgts", some_dout, v)
        kept, dp = weights(p, inputs, plan, tile, dp)
        dx = p * (dp - tile.cut_rows(delta)[..., None])
        draw = scores_gradient(dx, capped, plan).astype(q.dtype)
        # A CPU's products are slow where their operand is fused with what makes it.
        draw, kept = jax.lax.optimization_barrier((draw, kept))
        new = (
            old[0] + _einsum("bkgts,bksh->bkgth", draw, k),
            old[1] + _einsum("bkgts,bkgth->bksh", draw, q),
            old[2] + _einsum("bkgts,bkgth->bksh", kept.astype(dout.dtype), some_dout),
        )
        return new if len(old) == 3 else (*new, old[3] + _sum_like(dx, old[3]))

    dq, dk, dv, *dbias = _loop(add_gradients, tuple(start), where, inputs, plan)
    return dq * plan.settings.scale, dk * plan.scale, dv, dbias[0] if dbias else None


def _loop(update, start, where, inputs, plan):
    """The state after update(tile, parts of the state) -> new parts, for each live pair.

    where: of each array of the state, which part of it belongs to a tile: "rows", "keys", "bias".
    """
    if not len(plan.pairs):
        return start
    start = tuple(_vary_like(x, inputs) for x in start)
    live = None if inputs.of_q is None else _segments_meet(inputs, plan)
    if plan.unroll:
        return _unrolled(update, start, where, live, plan)

    def visit(state, pair):
        pair, live = pair
        tile = Tile.of(pair, plan)
        old = tuple(tile.cut(x, part) for x, part in zip(state, where))
        new = _where_live(live, functools.partial(update, tile), old)
        return tuple(tile.put(x, y, part) for x, y, part in zip(state, new, where)), None

    return jax.lax.scan(visit, start, (jnp.asarray(plan.pairs), live))[0]


def _unrolled(update, start, where, live, plan):
    """The loop written out, the state in as many arrays as it has parts."""
    axis, size = {"rows": 3, "keys": 2}, {"rows": plan.rows, "keys": plan.columns}
    state = [
        jnp.split(x, x.shape[axis[part]] // size[part], axis[part]) if part in axis else [x]
        for x, part in zip(start, where)
    ]
    for i, pair in enumerate(plan.pairs.tolist()):
        tile = Tile.of(pair, plan)
        at = {"rows": pair[schedule.Q], "keys": pair[schedule.KV], "bias": 0}
        old = tuple(
            x[at[part]] if part in axis else tile.cut(x[0], part) for x, part in zip(state, where)
        )
        alive = None if live is None else live[i]
        new = _where_live(alive, functools.partial(update, tile), old)
        for x, y, part in zip(state, new, where):
            x[at[part]] = y if part in axis else tile.put(x[0], y, part)
    return tuple(
        jnp.concatenate(x, axis[part]) if part in axis else x[0] for x, part in zip(state, where)
    )


def _where_live(live, compute, old):
    return compute(old) if live is None else jax.lax.cond(live, compute, lambda old: old, old)


def _segments_meet(inputs, plan):
    """bool[P]: whether a pair's q and kv block can have a segment in common, by min and max."""
    q, kv = plan.pairs[:, schedule.Q], plan.pairs[:, schedule.KV]
    of_q = inputs.of_q.reshape(len(inputs.of_q), -1, plan.rows)[:, q]
    of_kv = inputs.of_kv.reshape(len(inputs.of_kv), -1, plan.columns)[:, kv]
    meet = (of_q.min(-1) <= of_kv.max(-1)) & (of_kv.min(-1) <= of_q.max(-1))
    return meet.any(0)


def _vary_like(x, inputs):
    """Inside shard_map the state must be marked from the start as differing by device."""
    axes = frozenset().union(*(varying_axes(array) for array in jax.tree.leaves(inputs)))
    axes = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def varying_axes(x):
    """Mesh axes of a shard_map with check_vma=True along which an array differs."""
    return jax.typeof(x).manual_axis_type.varying


def _einsum(subscripts, a, b):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=wide)


def _sum_like(dx, part):
    """Summed over the axes along which a bias was broadcast."""
    axes = tuple(i for i, size in enumerate(part.shape) if size == 1 and dx.shape[i] > 1)
    return dx.sum(axes, keepdims=True)


def _plans(q, k, settings, platform):
    """One plan where all heads share a schedule, else one for each of the distinct schedules."""
    (_, T, N, _), (S, K) = q.shape, k.shape[1:3]
    block_q, block_kv = block_sizes(T, S, platform)
    block_q, block_kv = settings.block_q or block_q, settings.block_kv or block_kv
    found = schedule.schedule(settings.mask, N, T, S, block_q, block_kv)
    # A CPU has no fast product of bfloat16; where q is wide anyway the scale goes into it.
    widen = platform == "cpu" or q.dtype.itemsize >= 4
    scale = 1.0 if widen else settings.scale
    plans = []
    for index, pairs in enumerate(found.pairs):
        heads = np.flatnonzero(found.heads == index)
        kv_heads = np.arange(K) if len(found.pairs) == 1 else heads // (N // K)
        pairs, masks = _mask_padding(pairs, found.masks, S, block_kv)
        unroll = platform == "cpu" and len(pairs) <= _UNROLL
        plan = Plan(
            heads, kv_heads, pairs, masks, block_q, block_kv, settings, widen, scale, unroll
        )
        plans.append(plan)
    return plans


def _mask_padding(pairs, masks, S, block_kv):
    """Without rows that see nothing; with the keys beyond S masked in the last kv block.

    Only the masks that occur are kept: each becomes a branch of the loop.
    """
    pairs = pairs[pairs[:, schedule.KIND] != 0]
    kinds = pairs[:, schedule.KIND]
    if S % block_kv:
        kinds = kinds + (pairs[:, schedule.KV] == S // block_kv) * len(masks)
        masks = masks + tuple(mask & Prefix(S) for mask in masks)
    occur, kinds = np.unique(kinds, return_inverse=True)
    pairs = np.column_stack([pairs[:, : schedule.KIND], kinds]).astype(np.int32)
    return pairs, tuple(masks[kind] for kind in occur)


def _inputs(plan, q, k, v, bias, alibi, segment_ids, dropout_seed):
    if plan.widen:
        q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
        q = q * plan.settings.scale
    B, K = q.shape[0], len(plan.kv_heads)
    k, v = (jnp.swapaxes(_pick(x, plan.kv_heads, 2), 1, 2) for x in (k, v))
    if bias is not None:
        bias = _pick(bias, plan.heads, 1) if bias.shape[1] > 1 else bias
        grouped = (1, 1) if bias.shape[1] == 1 else (K, bias.shape[1] // K)
        bias = bias.reshape(bias.shape[0], *grouped, *bias.shape[2:])
        bias = _pad(bias, 4, plan.columns)
        bias = _pad(bias, 3, plan.rows) if bias.shape[3] > 1 else bias
    if alibi is not None:
        alibi = jax.lax.stop_gradient(alibi)[plan.heads].reshape(K, -1, 1, 1)
    if dropout_seed is not None:
        dropout_seed = dropout_seed[:, plan.heads].reshape(B, K, -1, 2)
    of_q, of_kv = (None, None) if segment_ids is None else segment_ids
    if of_q is not None:  # repeated, so that padding widens no block's range of ids
        of_q, of_kv = _pad(of_q, 1, plan.rows, "edge"), _pad(of_kv, 1, plan.columns, "edge")
    k, v = _pad(k, 2, plan.columns), _pad(v, 2, plan.columns)
    return Inputs(_group(q, plan, 0), k, v, bias, alibi, dropout_seed, of_q, of_kv)


def _group(x, plan, fill):
    """[B, T, N, ...] -> [B, K, G, padded T, ...] of the plan's heads."""
    x = jnp.swapaxes(_pick(x, plan.heads, 2), 1, 2)
    x = _pad(x, 2, plan.rows, constant_values=fill)
    return x.reshape(x.shape[0], len(plan.kv_heads), -1, *x.shape[2:])


def _to_heads(x, T):
    """[B, K, G, padded T, H] -> [B, K * G, T, H]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :, :T]


def _pick(x, index, axis):
    """x at these indices of an axis; x itself where that is all of them in order."""
    same = len(index) == x.shape[axis] and (index == np.arange(len(index))).all()
    return x if same else jnp.take(x, index, axis)


def _pad(x, axis, multiple, mode="constant", **how):
    rest = -x.shape[axis] % multiple
    if not rest:
        return x
    return jnp.pad(x, [(0, rest * (i == axis)) for i in range(x.ndim)], mode=mode, **how)


def _merge_bias(dbias, shape):
    """[#B, #K, #G, padded #T, padded S] -> bias's own [#B, heads here, #T, S]."""
    dbias = dbias.reshape(dbias.shape[0], -1, *dbias.shape[3:])
    return dbias[:, :, : shape[2], : shape[3]]


def _add(total, found, plan, inputs):
    """Adds the gradients of a plan's heads to those of all heads, heads on axis 1."""
    q, k, v, bias = inputs
    if total is None:
        wide = found[0].dtype
        shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
        total = [jnp.zeros(shape, wide) for shape in shapes]
        total.append(None if found[3] is None else jnp.zeros(bias.shape, wide))
    dq, dk, dv, dbias = total
    if dbias is not None:
        heads = plan.heads if bias.shape[1] > 1 else np.zeros(1, int)
        dbias = dbias.at[:, heads].add(found[3])
    dq = dq.at[:, plan.heads].set(found[0])
    return dq, dk.at[:, plan.kv_heads].add(found[1]), dv.at[:, plan.kv_heads].add(found[2]), dbias
