"""Decode attention: the public function, its checks, its dispatch and its layout on a mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, mesh
from pallas_kernels.attention.merge import with_sinks
from pallas_kernels.decode_attention import blockwise, tpu
from pallas_kernels.decode_attention.checks import check
from pallas_kernels.decode_attention.reference import reference
from pallas_kernels.decode_attention.settings import Settings


def decode_attention(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    splits: int | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of the last T tokens of each row to the row's cached keys and values, exactly.

    The new tokens' own keys and values are in the cache already. Query t of row b stands at
    position lengths[b] - T + t and sees the keys up to its own position. Of the cache no more is
    read than the rows hold (TPU; elsewhere: than the longest row holds). For inference: a
    derivative is refused, but for `implementation="reference"`.

    Args:
      q: [B, T, N, H], float32, bfloat16, float16 or float64; T is small.
      k_cache, v_cache: [B, S, K, H], or with `pages` [pages, page_size, K, H], in q's dtype; key
        head n // (N / K) serves query head n. K divides N. What lies beyond a row's length may be
        anything, NaN too.
      lengths: integers [B], keys of each row, the T new ones included; more than the cache holds
        counts as what it holds. A row of length 0 sees nothing.
      pages: integers [B, max_pages]; keys i * page_size and on of row b are page pages[b, i].
        Entries beyond a row's length may be anything.
      scale: Python number; default H**-0.5.
      softcap: scores become softcap * tanh(scores / softcap).
      window: a query sees keys at a distance below this. Pages before it are not read.
      sinks: float [N], learned logits: exp(sinks[n]) joins the sum (and lse) of head n's rows.
      return_lse: return the log-sum-exp of the scores too, of which `merge` makes use.
      splits: parts into which each row's keys are cut, merged in float32 by log-sum-exp, so that
        few long rows occupy many cores. None: one on a CPU and TPU, by B and K elsewhere.
      sharding: how q is laid out on a mesh, over B and N alone, as for `attention`. A contiguous
        cache is laid out over B and K alike, a paged one over K, and is whole along the batch's
        axes: each device has all pages that it may need. The heads' axes must divide K.
      implementation: None, by the platform for which the program is lowered; or "reference"
        (whole cache at once), "blockwise" (XLA operations; what GPUs get), "tpu".

    Returns:
      out [B, T, N, H] in q's dtype; with return_lse (out, lse), lse [B, N, T] in float32. Where a
      query sees nothing, out is 0 and lse -inf (the sink's logit with sinks).

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform; a derivative.
    """
    settings = Settings(scale, softcap, window, splits)
    arrays = q, k_cache, v_cache, lengths, pages, sinks
    out, lse = _attend(*arrays, settings, sharding, implementation)
    return (out, lse) if return_lse else out


def part(
    q, k_cache, v_cache, *, lengths, pages, scale, softcap, splits, implementation
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) as of `decode_attention`, out in float32 (float64): for `merge`."""
    settings = Settings(scale, softcap, None, splits, part=True)
    return _attend(q, k_cache, v_cache, lengths, pages, None, settings, None, implementation)


def _attend(q, k_cache, v_cache, lengths, pages, sinks, settings, sharding, implementation):
    check(q, k_cache, v_cache, lengths, pages, sinks, settings, implementation)
    scale, softcap, window, splits = settings[:4]
    settings = settings._replace(
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        softcap=None if softcap is None else float(softcap),
        window=None if window is None else int(window),
        splits=None if splits is None else int(splits),
    )
    size = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, size)
    pages = None if pages is None else pages.astype(jnp.int32)
    compute = functools.partial(_decode, implementation)
    if implementation == "reference":
        compute = jax.jit(reference, static_argnums=5)
    out, lse = _over_mesh(compute, q, k_cache, v_cache, lengths, pages, settings, sharding)
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


def _over_mesh(compute, q, k_cache, v_cache, lengths, pages, settings, sharding):
    """compute(...) -> (out, lse), in shard_map where the layout of q is known."""
    found = mesh.layout("decode_attention", q, sharding)
    if found is None:
        return compute(q, k_cache, v_cache, lengths, pages, settings)
    devices, b, n, explicit = found
    B, K = q.shape[0], k_cache.shape[2]
    if B % mesh.size(devices, b) or K % mesh.size(devices, n):
        raise ValueError(
            f"decode_attention: sharding must divide q's batch {B} and the cache's heads {K}; mesh "
            f"axes {b} have size {mesh.size(devices, b)}, {n} {mesh.size(devices, n)}"
        )
    cache = P(b if pages is None else None, None, n, None)
    specs = (P(b, None, n, None), cache, cache, P(b), None if pages is None else P(b, None))
    arrays = (q, k_cache, v_cache, lengths, pages)
    arrays = jax.tree.map(lambda x, spec: mesh.place(x, devices, spec, explicit), arrays, specs)
    return mesh.shard_map(
        lambda *arrays: compute(*arrays, settings),
        mesh=devices,
        in_specs=specs,
        out_specs=(specs[0], P(b, n, None)),
    )(*arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 6))
def _decode(implementation, q, k_cache, v_cache, lengths, pages, settings):
    return _run(implementation, settings, q, k_cache, v_cache, lengths, pages)


@_decode.defjvp
def _refuse(*_):
    raise ValueError(
        "decode_attention: it is for inference and has no derivative; implementation='reference' "
        "has one, and pallas_kernels.attention is for training"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(implementation, settings, *arrays):
    on_cpu = functools.partial(_call, blockwise, settings, platform="cpu")
    elsewhere = functools.partial(_call, blockwise, settings, platform="accelerator")
    reason = tpu.unsupported(*arrays, settings)
    if dispatch.manual(arrays):
        reason = "inside shard_map a kernel needs check_vma=False"
    kernels = {"tpu": dispatch.Kernel("tpu", functools.partial(_call, tpu, settings), reason)}
    return dispatch.choose(
        "decode_attention", implementation, arrays, on_cpu, elsewhere, kernels
    )  # fmt: skip


def _call(module, settings, *arrays, **options):
    return module.forward(*arrays, settings, **options)
