"""Softmax attention: the public function, its checks and its derivative."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import dispatch, dropout, sharded
from pallas_kernels.attention.checks import check
from pallas_kernels.attention.masks import Full, Mask
from pallas_kernels.attention.merge import with_sinks
from pallas_kernels.attention.reference import reference
from pallas_kernels.attention.settings import Settings


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask = Full(),
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    alibi_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T + ...) v, exactly, in memory linear in T and S.

    In order: scores = scale q.k; softcap; + bias; - alibi |t + alibi_offset - s|; hidden by mask
    and segments; softmax over the keys (and the sink); dropout; times v. Float32 inside (float64
    for float64 inputs). Reverse-mode derivatives in q, k, v, bias and sinks, of out and of lse.

    Args:
      q: [B, T, N, H], float32, bfloat16, float16 or float64.
      k, v: [B, S, K, H] in q's dtype; key head n // (N / K) serves query head n. K divides N.
      mask: which query sees which key (`masks`); blocks in which nothing is seen cost nothing.
        Positions count from 0 in q and in k: T queries at the end of S keys are
        `Causal(offset=S - T)`.
      segment_ids: integers [B, T] of the queries and [B, S] of the keys (or one array for both,
        where T == S): a query sees keys of its own segment. Contiguous segments of packed
        sequences skip blocks which have no segment in common.
      bias: added to the scores, [B or 1, N or 1, T or 1, S].
      alibi: float [N], slopes of ALiBi (arXiv 2108.12409). They take no gradient.
      alibi_offset: position of query 0 among the keys; default S - T.
      scale: Python number; default H**-0.5.
      softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2 (arXiv 2408.00118).
      sinks: float [N], learned logits: exp(sinks[n]) joins the softmax's sum (and lse) of every
        row of head n without a value of its own.
      dropout_rate: softmax weights are dropped at this rate, others divided by 1 - rate. Which
        ones depends on dropout_key and the position alone, not on implementation or devices.
      dropout_key: a `jax.random` key; needed where dropout_rate > 0.
      return_lse: return the log-sum-exp of the scores too, of which `merge` makes use.
      sharding: how q is laid out on a mesh, over B and N alone: `NamedSharding(mesh,
        P(batch_axes, None, head_axes, None))`. Each device then works on its part, without
        communication but for gradients of what is replicated. Needed where a TPU or GPU kernel
        runs on a mesh whose axes are of type Auto; not where they are Explicit (it is read off
        q), in `shard_map`, or for blockwise, which XLA partitions.
      implementation: None, by the platform for which the program is lowered; or "reference"
        (memory T x S), "blockwise", "tpu", "gpu" (of the Hopper generation).

    Returns:
      out [B, T, N, H] in v's dtype; with return_lse (out, lse), lse [B, N, T] in float32. A row
      that sees nothing gives out 0, lse -inf (the sink's logit with sinks), and gradients 0.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform.
    """
    if segment_ids is not None and not isinstance(segment_ids, (tuple, list)):
        segment_ids = (segment_ids, segment_ids)
    arrays = {"q": q, "k": k, "v": v, "bias": bias, "alibi": alibi, "sinks": sinks}
    check(
        arrays, segment_ids, mask, scale, softcap, dropout_rate, dropout_key, alibi_offset,
        implementation,
    )  # fmt: skip
    (B, T, N, H), S = q.shape, k.shape[1]
    settings = Settings(
        mask=mask,
        scale=float(H**-0.5 if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        dropout_rate=float(dropout_rate),
        alibi_offset=S - T if alibi_offset is None else int(alibi_offset),
    )
    seeds = dropout.seeds(dropout_key, B, N) if dropout_rate else None
    arrays = (q, k, v, bias, alibi, None if segment_ids is None else tuple(segment_ids), seeds)
    compute = _reference if implementation == "reference" else _attend
    compute = functools.partial(compute, implementation)
    out, lse = sharded.over_mesh(compute, arrays, settings, sharding)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def part(
    q, k, v, *, segment_ids, scale, softcap, implementation, mask=Full()
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) as of `attention`, out in float32 (float64): for `merge`. Checks nothing."""
    settings = _part_settings(q, mask, scale, softcap)
    return _attend(implementation, q, k, v, None, None, segment_ids, None, settings)


def part_gradients(
    q, k, v, out, lse, dout, *, segment_ids, scale, softcap, implementation, mask=Full()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some of the keys contribute to (dq, dk, dv) of attention over all. Checks nothing.

    Weights are computed again from the log-sum-exp over all keys: summed over disjoint sets of keys
    this is the gradient, exactly.

    Args:
      k, v: [B, S, K, H], some of the keys.
      out, lse, dout: of attention over all of them (`merge`), and the cotangent of out.
      segment_ids: a pair, of the queries and of these keys, or None. Others: as in `part`.
    """
    arrays = q, k, v, None, None, segment_ids, None, out, lse, dout, jnp.zeros_like(lse)
    settings = _part_settings(q, mask, scale, softcap)
    return dispatch.run("backward", implementation, settings, *arrays)[:3]


def _part_settings(q, mask, scale, softcap):
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    return Settings(mask=mask, scale=scale, softcap=softcap and float(softcap), part=True)


def _reference(_, q, k, v, bias, alibi, segment_ids, seeds, settings):
    return reference(
        q, k, v, mask=settings.mask, segment_ids=segment_ids, bias=bias, alibi=alibi,
        alibi_offset=settings.alibi_offset, scale=settings.scale, softcap=settings.softcap,
        dropout_rate=settings.dropout_rate, dropout_seeds=seeds,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 8))
def _attend(implementation, q, k, v, bias, alibi, segment_ids, seeds, settings):
    arrays = q, k, v, bias, alibi, segment_ids, seeds
    return dispatch.run("forward", implementation, settings, *arrays)


def _attend_forward(implementation, q, k, v, bias, alibi, segment_ids, seeds, settings):
    # A bias which is constant saves the backward pass a write of T x S: a fact about the trace,
    # kept in the structure of the residuals.
    bias_gradient = None if bias is None or not bias.perturbed else ()
    arrays = jax.tree.map(lambda x: x.value, (q, k, v, bias, alibi, segment_ids, seeds))
    out, lse = dispatch.run("forward", implementation, settings, *arrays)
    return (out, lse), (arrays, out, lse, bias_gradient)


def _attend_backward(implementation, settings, residuals, cotangents):
    arrays, out, lse, bias_gradient = residuals
    dout, dlse = (_instantiate(x) for x in cotangents)
    settings = settings._replace(bias_gradient=bias_gradient is not None)
    gradients = dispatch.run("backward", implementation, settings, *arrays, out, lse, dout, dlse)
    dq, dk, dv, dbias = gradients
    bias = arrays[3]
    dbias = None if dbias is None else dbias.astype(bias.dtype)
    return dq, dk, dv, dbias, None, None, None


def _instantiate(cotangent):
    zero = isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(cotangent.shape, cotangent.dtype) if zero else cotangent


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
