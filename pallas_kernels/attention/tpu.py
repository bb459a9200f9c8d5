"""Attention on TPU: arrays in and out, around the kernels of tpu_forward and tpu_backward.

Compiled for v5e, v5p and v6e and checked in JAX's interpreter; not run on a TPU.
"""

import functools
import operator

import jax.numpy as jnp

from pallas_kernels.attention import tpu_backward, tpu_bias, tpu_forward, tpu_plan, tpu_specs
from pallas_kernels.attention.masks import Full, Heads
from pallas_kernels.attention.settings import Settings

DTYPES = (jnp.bfloat16, jnp.float32, jnp.float16)
HEAD_MOST = 256
# dQ of so many elements (query heads of a key head x T x H) is added up in VMEM.
FUSED_MOST = 4 * 2**20


def forward(q, k, v, bias, alibi, segment_ids, dropout_seed, settings: Settings, interpret=False):
    """out [B, T, N, H] in `settings.out_dtype`, log-sum-exp [B, N, T] in float32; see `api`.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H].
      bias: [#B, #N, #T, S] or None. alibi: [N] or None.
      segment_ids: (int32[B, T], int32[B, S]) or None.
      dropout_seed: uint32[B, N, 2] of dropout.seeds, or None.
      interpret: what pl.pallas_call takes.
    """
    parts = _parts((q, k, v, bias, alibi, segment_ids, dropout_seed), settings)
    found = [_forward(*arrays, settings, interpret) for _, arrays, settings in parts]
    return _join(found, (2, 1))


def _forward(q, k, v, bias, alibi, segment_ids, dropout_seed, settings, interpret):
    T = q.shape[1]
    blocks = _blocks((q, k, v), _forward_keys(settings, segment_ids))
    given = (q, k, v, bias, alibi, segment_ids, dropout_seed, settings)
    shape, plan, inputs, scalars = _prepare(blocks, 0, *given)
    out_dtype = settings.out_dtype(v.dtype)
    out, lse = tpu_forward.run(inputs, shape, plan, scalars, _stored(out_dtype), interpret)
    return jnp.swapaxes(out[:, :, :T], 1, 2).astype(out_dtype), lse[:, :, 0, :T]


def backward(
    q,
    k,
    v,
    bias,
    alibi,
    segment_ids,
    dropout_seed,
    out,
    lse,
    dout,
    dlse,
    settings: Settings,
    interpret=False,
):
    """dq, dk, dv in the inputs' dtypes, and dbias in float32 and bias's shape (None without).

    Args: as `forward`; its results out and lse, and their cotangents (dlse [B, N, T] float32).
    """
    parts = _parts((q, k, v, bias, alibi, segment_ids, dropout_seed), settings)
    found = []
    for heads, arrays, settings in parts:
        rows = (out[:, :, heads], lse[:, heads], dout[:, :, heads], dlse[:, heads])
        found.append(_backward(*arrays, *rows, settings, interpret))
    if bias is not None and bias.shape[1] == 1:
        dbias = functools.reduce(operator.add, [part[3] for part in found])
        return *_join([part[:3] for part in found], (2, 2, 2)), dbias
    return _join(found, (2, 2, 2, 1))


def _backward(
    q, k, v, bias, alibi, segment_ids, dropout_seed, out, lse, dout, dlse, settings, interpret
):
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    given = (q, k, v, bias, alibi, segment_ids, dropout_seed, settings)

    def inputs_of(blocks, by_keys):
        shape, plan, inputs, scalars = _prepare(blocks, by_keys and group, *given)
        inputs["dout"] = tpu_specs.heads_first(dout.astype(inputs["q"].dtype), shape.T)
        inputs["lse"] = tpu_specs.pad(lse, 2, shape.T, constant_values=jnp.inf)[:, :, None]
        inputs["delta"] = tpu_specs.pad(delta, 2, shape.T)[:, :, None]
        return inputs, shape, plan, scalars

    block_kv = _backward_keys(settings, segment_ids, bias, group * T * q.shape[3])
    by_keys = inputs_of(_blocks((q, k, v), block_kv), True)
    shape, plan = by_keys[1:3]
    fused = plan.head is None and group * shape.T * shape.H <= FUSED_MOST
    dtypes = [_stored(x.dtype) for x in (q, k, v)]
    dk, dv, *dq = tpu_backward.run_keys(*by_keys, dtypes, fused, interpret)
    if not dq:
        dq = [
            tpu_backward.run_queries(
                *inputs_of(_blocks((q, k, v), 2048), False), dtypes[0], interpret
            )
        ]
    dbias = None if bias is None else _dbias(bias, by_keys, T, segment_ids, interpret)
    grads = ((dq[0], T, q), (dk, S, k), (dv, S, v))
    return *(jnp.swapaxes(x[:, :, :n], 1, 2).astype(to.dtype) for x, n, to in grads), dbias


def _parts(arrays, settings):
    """(query heads, their arrays, their settings), for heads whose pairs one kernel can hold."""
    q, k, v, bias, alibi, segment_ids, seeds = arrays
    N, K = q.shape[2], k.shape[2]
    count = max(
        tpu_plan.parts(settings.mask, N, K, q.shape[1], k.shape[1], tile)
        for tile in _tilings(q, k, v, segment_ids, settings)
    )
    if count == 1:
        return [(slice(None), arrays, settings)]
    found = []
    for part in range(count):
        heads, keys = (slice(part * n // count, (part + 1) * n // count) for n in (N, K))
        own = (
            q[:, :, heads], k[:, :, keys], v[:, :, keys],
            bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
            None if alibi is None else alibi[heads],
            segment_ids,
            None if seeds is None else seeds[:, heads],
        )  # fmt: skip
        mask = Heads([settings.mask.head(n) for n in range(N)[heads]])
        found.append((heads, own, settings._replace(mask=mask)))
    return found


def _join(found, axes):
    """Results of parts side by side along their axes of heads; None stays None."""
    if len(found) == 1:
        return found[0]
    each = zip(zip(*found, strict=True), axes, strict=True)
    return tuple(None if x[0] is None else jnp.concatenate(x, axis) for x, axis in each)


def _dbias(bias, prepared, T, segment_ids, interpret):
    inputs, shape, _, _ = prepared
    rows, S = bias.shape[2:]
    kinds = tpu_plan.kinds(shape.settings.mask, shape.N, T, S, shape.tile)
    ranges = tpu_specs.segment_ranges(tpu_specs.padded_segments(segment_ids, shape), shape)
    dbias = tpu_bias.run(inputs, shape, kinds, ranges, interpret)
    dbias = jnp.swapaxes(dbias, 2, 3) if rows > 1 else dbias
    return dbias[:, :, :rows, :S]


def unsupported(q, k, v, bias, alibi, segment_ids, dropout_seed, settings: Settings):
    """Why the kernels cannot do this, in words; None where they can. Arrays as in `forward`."""
    (_, T, N, H), S = q.shape, k.shape[1]
    for x in (q, k, v):
        if x.dtype not in DTYPES:
            return f"dtype {x.dtype}; accepted: {', '.join(str(jnp.dtype(d)) for d in DTYPES)}"
    if H > HEAD_MOST or H % 8:
        return f"head size {H}; accepted: multiples of 8 up to {HEAD_MOST}"
    for name in ("block_q", "block_kv"):
        if (getattr(settings, name) or 128) % 128:
            return f"{name} {getattr(settings, name)}; accepted: multiples of 128"
    for tile in _tilings(q, k, v, segment_ids, settings):
        reason = tpu_plan.unsupported(settings.mask, N, k.shape[2], T, S, tile)
        if reason is not None:
            return reason
    return None


def _tilings(q, k, v, segment_ids, settings):
    """Of the forward kernel and of those of the backward pass."""
    T, S = q.shape[1], k.shape[1]
    each = {_forward_keys(settings, segment_ids), 1024, 2048}
    return [tpu_plan.tiling(settings, T, S, *_blocks((q, k, v), block_kv)) for block_kv in each]


def _forward_keys(settings, segment_ids):
    """Keys of a block: twice as many where no mask cuts them into pieces."""
    return 4096 if _whole(settings, segment_ids) else 2048


def _backward_keys(settings, segment_ids, bias, queries):
    """The same of the kernel for keys, where there is memory for it beside the gradient of so many
    elements of queries. Full masks, v6e, by blocks of 1024, 2048 and 4096: 182.5, 171.9 and
    169.2 us at head 128, 223.1, 211.6 and 205.2 at head 256, predicted. Causal ones would gain 4%
    by 2048, with code of 2.5 times the length."""
    room = bias is None and queries <= 2**20
    return 4096 if _whole(settings, segment_ids) and room else 1024


def _whole(settings, segment_ids):
    return settings.mask == Full() and segment_ids is None


def _blocks(arrays, block_kv):
    """The tile a kernel likes best; float32 products are six, so half the sides fill as much."""
    narrow = tpu_specs.compute_dtype(arrays) == jnp.bfloat16
    return (512, block_kv) if narrow else (256, block_kv // 2)


def _stored(dtype):
    """float16 is converted outside of the kernels, which cannot."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _prepare(blocks, group, q, k, v, bias, alibi, segment_ids, dropout_seed, settings):
    """shape, plan, inputs and scalars of a kernel that likes these blocks best."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    tile = tpu_plan.tiling(settings, T, S, *blocks)
    padded = (-(-n // block) * block for n, block in zip((T, S), tile[:2], strict=True))
    shape = tpu_specs.Shape(B, N, K, *padded, H, tile, settings)
    segments = tpu_specs.padded_segments(segment_ids, shape)
    plan = tpu_plan.plan(settings.mask, N, T, S, tile, group, segments is not None)
    inputs = tpu_specs.padded_inputs(q, k, v, bias, alibi, segments, dropout_seed, shape)
    return shape, plan, inputs, tpu_specs.scalars(plan, segments, shape)
