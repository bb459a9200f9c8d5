"""JAX's own Pallas kernels as peers, and tokamax's, with the block sizes to choose the best of.

A case names them by role, and the laboratory compiles every choice and reports the fastest:

    Case(..., peers={"forward": {"splash": peers.splash_forward("causal")}})

Shapes are those of this package: attention takes q [B, T, N, H] and k, v [B, S, K, H]. Splash does
not scale by H**-0.5 itself; the peers scale q outside the kernel, which costs the kernel nothing.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lab.case import Program

# (block_q, block_kv, block_kv_compute); those longer than the sequence are left out, those that do
# not fit in VMEM are refused by the compiler.
FORWARD_BLOCKS = (
    (512, 512, 512),
    (1024, 1024, 512),
    (1024, 2048, 512),
    (2048, 2048, 512),
)
# (block_q, block_kv, block_kv_compute) of the dK/dV kernel, (block_q, block_kv) of the dQ kernel.
BACKWARD_BLOCKS = (
    ((512, 512, 512), (512, 512)),
    ((1024, 1024, 512), (1024, 1024)),
    ((1024, 2048, 512), (2048, 1024)),
)
# tokamax has only the fused backward kernel, of (block_q, block_kv, block_kv_compute).
TOKAMAX_BACKWARD_BLOCKS = ((512, 512, 512), (1024, 1024, 512), (1024, 2048, 512))
_GRADIENTS_FORWARD = (512, 512, 512)  # the forward kernel beside them; `splash_forward` tunes it
# (rows, columns, contraction) of a tile.
MATMUL_TILES = (
    (512, 512, 512),
    (512, 1024, 512),
    (1024, 512, 512),
    (512, 512, 1024),
    (1024, 1024, 512),
    (1024, 1024, 256),
)


def attention(
    mask: str = "full", left: int | None = None
) -> Mapping[str, Mapping[str, list[Program]]]:
    """Every peer of attention that is installed, by role: jax's splash, and tokamax's."""
    found = {
        "forward": {"splash": splash_forward(mask, left=left)},
        "backward": {"splash": splash_backward(mask, left=left)},
    }
    if importlib.util.find_spec("tokamax"):
        found["forward"]["tokamax"] = tokamax_forward(mask, left=left)
        found["backward"]["tokamax"] = tokamax_backward(mask, left=left)
    return found


def splash_forward(
    mask: str = "full",
    blocks: Sequence[tuple[int, int, int]] = FORWARD_BLOCKS,
    left: int | None = None,
) -> list[Program]:
    """jax's splash attention, forward: functions of (q, k, v).

    Args:
      mask: "full", "causal", or "window": causal, with `left` keys before the query's own.
      blocks: (block_q, block_kv, block_kv_compute) to try.
      left: of "window".
    """
    return [
        Program(
            functools.partial(_splash, mask=mask, left=left, sizes=_forward_sizes(b)),
            label=f"q {b[0]} kv {b[1]} compute {b[2]}",
            live_steps=functools.partial(_live_forward, mask=mask, left=left, block=b[:2]),
        )
        for b in blocks
    ]


def splash_backward(
    mask: str = "full",
    blocks: Sequence[tuple[tuple[int, int, int], tuple[int, int]]] = BACKWARD_BLOCKS,
    left: int | None = None,
    fused: bool | None = None,
) -> list[Program]:
    """jax's splash attention, gradients: functions of (q, k, v, dO) that run forward and backward.

    The kernels are named `..._fwd_...`, `..._dq_...` and `..._dkv_...`; the one that gives dQ too
    is reported as `..._dkv_fused_...`.

    Args:
      mask, left: as for `splash_forward`.
      blocks: of the dK/dV kernel and the dQ kernel, to try.
      fused: only the fused dK/dV/dQ kernel (True), only the two kernels (False), or both.
    """
    programs = []
    for dkv, dq in blocks:
        for one in (False, True) if fused is None else (fused,):
            text = f"dkv q {dkv[0]} kv {dkv[1]} compute {dkv[2]}"
            sizes = _backward_sizes(dkv, None if one else dq)
            programs.append(
                Program(
                    functools.partial(_splash_gradient, mask=mask, left=left, sizes=sizes),
                    label=f"{text} fused" if one else f"{text} dq q {dq[0]} kv {dq[1]}",
                    live_steps=functools.partial(
                        _live_backward, mask=mask, left=left, dkv=dkv[:2], dq=dq
                    ),
                    rename={"_dkv_": "_dkv_fused_"} if one else {},
                )
            )
    return programs


def tokamax_forward(
    mask: str = "full",
    blocks: Sequence[tuple[int, int, int]] = FORWARD_BLOCKS,
    left: int | None = None,
) -> list[Program]:
    """tokamax's splash attention, forward, with its base-2 exponent and both of its schedulers.

    Arguments as for `splash_forward`. tokamax has no public name for the kernel alone.
    """
    return [
        Program(
            functools.partial(_tokamax, mask=mask, left=left, sizes=_tokamax_sizes(b, None, s)),
            label=f"q {b[0]} kv {b[1]} compute {b[2]}{s * ' scheduler'}",
            live_steps=functools.partial(_live_forward, mask=mask, left=left, block=b[:2]),
        )
        for b in blocks
        for s in (False, True)
    ]


def tokamax_backward(
    mask: str = "full",
    blocks: Sequence[tuple[int, int, int]] = TOKAMAX_BACKWARD_BLOCKS,
    left: int | None = None,
) -> list[Program]:
    """tokamax's splash attention, gradients, by one fused kernel: functions of (q, k, v, dO)."""
    return [
        Program(
            functools.partial(
                _tokamax_gradient, mask=mask, left=left, sizes=_tokamax_sizes(None, b, s)
            ),
            label=f"dkv q {b[0]} kv {b[1]} compute {b[2]} fused{s * ' scheduler'}",
            live_steps=functools.partial(_live_backward, mask=mask, left=left, dkv=b[:2], dq=b[:2]),
            rename={"_dkv_": "_dkv_fused_"},
        )
        for b in blocks
        for s in (False, True)
    ]


def matmul(tiles: Sequence[tuple[int, int, int]] = MATMUL_TILES) -> list[Program]:
    """jax's Pallas matmul: functions of (x [M, K], y [K, N])."""
    return [Program(functools.partial(_matmul, tile=t), label=_tile(t)) for t in tiles]


def megablox(tiles: Sequence[tuple[int, int, int]] = MATMUL_TILES) -> list[Program]:
    """jax's megablox: functions of (lhs [M, K], rhs [G, K, N], group_sizes [G] int32)."""
    return [
        Program(
            functools.partial(_megablox, tile=t),
            label=_tile(t),
            live_steps=functools.partial(_live_tiles, tile=t),
        )
        for t in tiles
    ]


def _tile(tile: tuple[int, int, int]) -> str:
    return f"m {tile[0]} n {tile[1]} k {tile[2]}"


def _matmul(x, y, *, tile):
    from jax.experimental.pallas.ops.tpu.matmul import matmul as op

    rows, columns, contraction = tile
    _check_divides(x.shape + y.shape[1:], (rows, contraction, columns))
    return op(x, y, block_shape=(rows, columns), block_k=contraction)


def _megablox(lhs, rhs, group_sizes, *, tile):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, columns, contraction = tile
    return gmm(lhs, rhs, group_sizes, lhs.dtype, tiling=(rows, contraction, columns))


def _live_tiles(lhs, rhs, group_sizes, *, tile) -> dict[str, int]:
    """Tiles where every group ends at a tile; each that does not may add one a column of tiles."""
    rows, columns, contraction = tile
    (M, K), N = lhs.shape, rhs.shape[-1]
    return {"gmm": -(-M // rows) * -(-N // columns) * -(-K // contraction)}


def _check_divides(sizes, blocks) -> None:
    for size, block in zip(sizes, blocks, strict=True):
        if size % block:
            raise ValueError(f"a block of {block} does not divide {size}")


def _forward_sizes(block: tuple[int, int, int]) -> dict[str, int]:
    return {"block_q": block[0], "block_kv": block[1], "block_kv_compute": block[2]}


def _backward_sizes(dkv, dq) -> dict:
    sizes = {
        **_forward_sizes(_GRADIENTS_FORWARD),
        "block_q_dkv": dkv[0],
        "block_kv_dkv": dkv[1],
        "block_kv_dkv_compute": dkv[2],
        "use_fused_bwd_kernel": dq is None,
    }
    return sizes if dq is None else {**sizes, "block_q_dq": dq[0], "block_kv_dq": dq[1]}


def _splash(q, k, v, *, mask: str, left: int | None, sizes: dict) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _check_blocks(sizes, q, k)
    heads = masks.MultiHeadMask([_mask(masks, mask, left, q.shape[1], k.shape[1])] * q.shape[2])
    attend = kernel.make_splash_mha_single_device(heads, block_sizes=kernel.BlockSizes(**sizes))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(jax.vmap(attend)(q, k, v), 1, 2)


def _splash_gradient(q, k, v, do, **how):
    out, pull = jax.vjp(lambda *qkv: _splash(*qkv, **how), q, k, v)
    return out, pull(do)


def _tokamax_sizes(forward, backward, scheduler: bool) -> dict:
    sizes = _forward_sizes(forward or _GRADIENTS_FORWARD)
    sizes["use_experimental_scheduler"] = scheduler
    if backward is not None:
        sizes |= {f"{name}_dkv": n for name, n in zip(("block_q", "block_kv"), backward)}
        sizes["block_kv_dkv_compute"] = backward[2]
    return sizes


def _tokamax(q, k, v, *, mask: str, left: int | None, sizes: dict) -> jax.Array:
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _check_blocks(sizes, q, k)
    seen = _mask(masks, mask, left, q.shape[1], k.shape[1])
    attend = kernel.make_splash_mha_single_device(seen, config=kernel.SplashConfig(**sizes))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jnp.swapaxes(jax.vmap(attend)(q, k, v), 1, 2)


def _tokamax_gradient(q, k, v, do, **how):
    out, pull = jax.vjp(lambda *qkv: _tokamax(*qkv, **how), q, k, v)
    return out, pull(do)


def _check_blocks(sizes: Mapping, q, k) -> None:
    for name, size in sizes.items():
        length = q.shape[1] if "block_q" in name else k.shape[1]
        if "block" in name and length % size:
            raise ValueError(f"{name} {size} does not divide {length}")


def _mask(masks, mask: str, left: int | None, T: int, S: int):
    if mask == "full":
        return masks.FullMask((T, S))
    if mask == "causal":
        return masks.CausalMask((T, S))
    if mask == "window" and left is not None:
        return masks.LocalMask((T, S), (left, 0), offset=0)
    raise ValueError(f"mask {mask!r} is none of full, causal, window (with left=...)")


def _live_forward(q, k, v, *, mask, left, block) -> dict[str, int]:
    return {"fwd": _live_blocks(q, k, mask, left, block)}


def _live_backward(q, k, v, do, *, mask, left, dkv, dq) -> dict[str, int]:
    live: Callable = functools.partial(_live_blocks, q, k, mask, left)
    return {"fwd": live(_GRADIENTS_FORWARD[:2]), "dkv": live(dkv), "dq": live(dq)}


def _live_blocks(q, k, mask, left, block) -> int:
    """Blocks of scores that are not empty, over all heads and the batch."""
    (B, T, N), S = q.shape[:3], k.shape[1]
    if mask == "full":
        per_head = -(-T // block[0]) * -(-S // block[1])
    else:
        t = np.arange(0, T, block[0])[:, None]
        s = np.arange(0, S, block[1])[None, :]
        seen = s <= t + block[0] - 1
        if mask == "window":
            seen &= s + block[1] - 1 >= t - left
        per_head = int(seen.sum())
    return B * N * per_head
