"""Attention on Hopper GPUs: arrays in and out, around gpu_forward and gpu_backward.

They need compute capability 9.0. Beside cuDNN on an H200, 16,384 tokens of width 2048 in sequences
of 4096: as fast forward (0.94 to 1.13 times its speed over heads of 64, 128 and 256, full and
causal), 0.78 to 0.97 times backward, where the products for dQ and for dK and dV are made apart.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_backward, gpu_forward, gpu_plan, masks
from pallas_kernels.attention.gpu_ops import LOG2_E, TILE_ROWS, Lists, Machine, Shape
from pallas_kernels.attention.settings import Settings

DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_MOST = 256


def forward(q, k, v, bias, alibi, segment_ids, dropout_seed, settings: Settings, machine=Machine()):
    """out [B, T, N, H] in v's dtype and the log-sum-exp [B, N, T] in float32; see api.attention.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H]. bfloat16 or float16.
      segment_ids: (int32[B, T], int32[B, S]) or None.
      bias, alibi, dropout_seed: None; see `unsupported`.
      machine: the chip, or an interpreter of it.
    """
    T = q.shape[1]
    shape, work, given, lists = _prepare(
        q, k, v, segment_ids, settings, _columns(q.shape[3], "forward")
    )
    inputs = gpu_forward.Inputs(*given[:3], *given[3:], lists)
    out, lse = gpu_forward.run(inputs, shape, work.masks, machine)
    return out[:, :T], lse[:, :, :T]


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
    machine=Machine(),
):
    """dq, dk, dv in the inputs' dtypes, and None for dbias.

    Args: as `forward`; its results out and lse, and their cotangents (dlse [B, N, T] float32).
    """
    H, (T, S) = q.shape[3], (q.shape[1], k.shape[1])
    delta = jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=jnp.float32) - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2_E)
    dout = dout.astype(q.dtype)

    def run(kernel, columns, by_keys, **options):
        shape, work, given, lists = _prepare(q, k, v, segment_ids, settings, columns, by_keys)
        rows = (
            _pad(dout, 1, shape.T),
            _pad(lse, 2, shape.T, jnp.inf),
            _pad(delta, 2, shape.T),
        )
        inputs = gpu_backward.Inputs(*given[:3], *rows, *given[3:], lists)
        return kernel(inputs, shape, work.masks, machine, **options)

    dq = run(gpu_backward.run_queries, _columns(H, "dq", settings.softcap), False)
    found = []
    for results in _parts(H, settings, segment_ids):
        columns = _columns(H, results[0])
        found += run(gpu_backward.run_keys, columns, True, results=results)
    return dq[:, :T], found[0][:, :S], found[1][:, :S], None


def unsupported(q, k, v, bias, alibi, segment_ids, dropout_seed, settings: Settings):
    """Why the kernels cannot do this, in words; None where they can. Arrays as in `forward`."""
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    here = _capability()
    if here not in (None, "9.0"):
        return f"a GPU of compute capability {here}; the kernels are for 9.0 (Hopper)"
    for x in (q, k, v):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            return f"dtype {x.dtype}; accepted: bfloat16 or float16, the same for q, k and v"
    if H > HEAD_MOST or H % 16:
        return f"head size {H}; accepted: multiples of 16 up to {HEAD_MOST}"
    for name, given in (("bias", bias), ("alibi", alibi), ("dropout", dropout_seed)):
        if given is not None:
            return f"{name} is not done in the Hopper kernels"
    if settings.part:
        return "a part in float32 for `merge` is not done in the Hopper kernels"
    if not settings.scale > 0:
        return f"scale {settings.scale}; accepted: above 0"
    if settings.block_q not in (None, TILE_ROWS):
        return f"block_q {settings.block_q}; accepted: {TILE_ROWS}"
    return _unsupported_mask(settings, N, K, T, S, H)


@functools.cache
def _capability():
    """Of this process' GPU; None without one, where a program for CUDA is taken to be for Hopper.

    A program lowered for CUDA does not say for which GPU.
    """
    try:
        return jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None


def _unsupported_mask(settings, N, K, T, S, H):
    if settings.block_kv is not None and settings.block_kv != _columns(H, "forward"):
        return f"block_kv {settings.block_kv}; accepted: None"
    if max(T, S) > 32 * gpu_plan.MOST_COLUMNS:
        return f"lengths {T} and {S}; accepted: up to {32 * gpu_plan.MOST_COLUMNS}"
    if N // K > gpu_plan.MOST_HEADS:
        return f"{N // K} query heads of a key head; accepted: up to {gpu_plan.MOST_HEADS}"
    kernels = {"forward": False, "dq": False, "dk": True, "dv": True}
    for kernel, by_keys in kernels.items():
        columns = _columns(H, kernel, settings.softcap)
        work = _work(settings.mask, N, K, T, S, columns, by_keys)
        for mask in work.masks:
            reason = _unsupported_part(mask)
            if reason is not None:
                return reason
    return None


def _unsupported_part(mask):
    """Why what remains of a mask in a block cannot be computed in registers."""
    for part in getattr(mask, "masks", ()):
        reason = _unsupported_part(part)
        if reason is not None:
            return reason
    if isinstance(mask, masks.BlockPattern):
        return "a BlockPattern whose blocks are no multiples of 128"
    return None


def _parts(H, settings, segment_ids):
    """What the kernels that run by keys give: dK and dV together where registers allow it."""
    plain = segment_ids is None and settings.softcap is None
    most = 128 if plain else 64
    return [("dk", "dv")] if most >= H else [("dk",), ("dv",)]


def _columns(H, kernel, softcap=None):
    """Keys (for dk, dv: queries) of a block: what fits in 227 KB and in 240 registers a thread."""
    by_head = {
        "forward": ((128, 128), (256, 64)),
        "dq": ((64 if softcap is None else 0, 128), (192, 64), (256, 32)),
        "dk": ((192, 64), (256, 32)),
        "dv": ((256, 64),),
    }[kernel]
    return next(columns for most, columns in by_head if most >= H)


def _work(mask, N, K, T, S, columns, by_keys):
    if by_keys:
        return gpu_plan.work(mask, N, T, S, columns, TILE_ROWS, N // K)
    return gpu_plan.work(mask, N, T, S, TILE_ROWS, columns)


def _prepare(q, k, v, segment_ids, settings, columns, by_keys=False):
    """shape, work, (q, k, v, q_ids, kv_ids) padded to whole blocks and tiles, and lists."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    padded = (-(-T // TILE_ROWS) * TILE_ROWS, -(-S // TILE_ROWS) * TILE_ROWS)
    shape = Shape(B, N, K, *padded, H, columns, settings)
    work = _work(settings.mask, N, K, T, S, columns, by_keys)
    ids, ranges = (None, None), (None, None)
    if segment_ids is not None:
        ids = [_pad(x.astype(jnp.int32), 1, n, mode="edge")
               for x, n in zip(segment_ids, padded, strict=True)]  # fmt: skip
        blocks = (columns, TILE_ROWS) if by_keys else (TILE_ROWS, columns)
        ranges = [_ranges(x, block) for x, block in zip(ids, blocks, strict=True)]
        ranges = ranges[::-1] if by_keys else ranges
    given = (_pad(q, 1, padded[0]), _pad(k, 1, padded[1]), _pad(v, 1, padded[1]), *ids)
    return shape, work, given, Lists(*gpu_plan.lists(work, *ranges))


def _ranges(ids, block):
    """Least and greatest segment id of each block, int32[B, blocks]."""
    blocks = ids.reshape(len(ids), -1, block)
    return blocks.min(2), blocks.max(2)


def _pad(x, axis, length, value=0, mode="constant"):
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    options = {"constant_values": value} if mode == "constant" else {}
    return jnp.pad(x, widths, mode=mode, **options)
