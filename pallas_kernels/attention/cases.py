"""Shapes of attention that tests, laboratory and benchmarks share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.masks import Causal, Full, Mask, Window
from pallas_kernels.lab import Case, Program, peers

# The TPU kernels' branches that ask for a vector's value are for scores that leave the range of
# their reference value, and 0 where none does. Taken to be so in the laboratory; the times of such
# exceptions depend on the data.
EXCEPTIONS = 0
_GRAIN = 128  # side of the blocks by which the live part of the scores is counted


def forward(q, k, v, *, mask: Mask = Full()):
    """out of the platform's kernel."""
    return attention(q, k, v, mask=mask)


def backward(q, k, v, dout, *, mask: Mask = Full()):
    """dq, dk, dv; runs the forward kernel too."""
    return jax.vjp(functools.partial(forward, mask=mask), q, k, v)[1](dout)


def live(mask: Mask, heads: int, T: int, S: int) -> float:
    """Fraction of the scores which are in blocks that are not empty, diagonal blocks by half."""
    states = mask.blocks(heads, T, S, _GRAIN, _GRAIN)
    return float(np.mean(states) / 2)


def case(
    name: str,
    B: int,
    T: int,
    N: int,
    K: int,
    H: int,
    mask: Mask = Full(),
    splash: str | None = None,
) -> Case:
    """Self-attention in bfloat16, with FLOPs and bytes by formula.

    Forward 4 B N T S H FLOPs of the live part, backward 10: five products. Two kernels do seven,
    the one for queries (splash: dq) three, the one for keys (splash: dkv) four. Bytes: q, k, v,
    out and lse once; backward reads q, k, v, dout, lse and delta, and writes dq, dk, dv.
    """
    query = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((B, T, K, H), jnp.bfloat16)
    product = 2 * B * N * T * T * H * live(mask, N, T, T)
    q_bytes, k_bytes, row_bytes = 2 * B * T * N * H, 2 * B * T * K * H, 4 * B * N * T
    forward_bytes = 2 * q_bytes + 2 * k_bytes + row_bytes
    backward_bytes = 3 * q_bytes + 4 * k_bytes + 2 * row_bytes
    queries_bytes = 3 * q_bytes + 2 * k_bytes + 2 * row_bytes
    keys_bytes = 2 * q_bytes + 4 * k_bytes + 2 * row_bytes
    window = {"left": mask.left - 1} if isinstance(mask, Window) else {}
    return Case(
        name=name,
        kernels={
            role: Program(functools.partial(fn, mask=mask), from_vectors=EXCEPTIONS)
            for role, fn in (("forward", forward), ("backward", backward))
        },
        args={"forward": (query, key, key), "backward": (query, key, key, query)},
        flops={
            "forward": 2 * product, "fwd": 2 * product, "backward": 5 * product,
            "backward_queries": 3 * product, "backward_keys": 4 * product,
            "dq": 3 * product, "dkv": 4 * product, "dkv_fused": 5 * product,
        },
        hbm_bytes={
            "forward": forward_bytes, "fwd": forward_bytes, "backward": backward_bytes,
            "backward_queries": queries_bytes, "backward_keys": keys_bytes,
            "dq": queries_bytes, "dkv": keys_bytes, "dkv_fused": backward_bytes,
        },
        peers={} if splash is None else peers.attention(splash, **window),
    )  # fmt: skip


CASES = [
    case("full_4k_h128", 1, 4096, 4, 4, 128, splash="full"),
    case("full_4k_h64", 1, 4096, 4, 4, 64, splash="full"),
    case("full_4k_h256", 1, 4096, 4, 4, 256, splash="full"),
    case("causal_4k_h128", 1, 4096, 4, 4, 128, Causal(), "causal"),
    case("causal_512_h128", 8, 512, 4, 4, 128, Causal(), "causal"),
    case("gqa_causal_4k_h128", 1, 4096, 8, 2, 128, Causal(), "causal"),
    case("window_16k_h128", 1, 16384, 2, 2, 128, Window(1024), "window"),
    case("full_4k_h80", 1, 4096, 4, 4, 80),
    case("full_4k_h192", 1, 4096, 4, 4, 192),
]


def _on_hopper(q, k, v, *, mask: Mask):
    """out of the Hopper kernel."""
    return attention(q, k, v, mask=mask, implementation="gpu")


def _backward_on_hopper(q, k, v, dout, *, mask: Mask):
    return jax.vjp(functools.partial(_on_hopper, mask=mask), q, k, v)[1](dout)


def hopper(name: str, H: int, mask: Mask = Full()) -> Case:
    """4,096 tokens, 4 heads, for an H200. Above a head of 128 dK and dV are a kernel each.

    Of those two no more than three of the five products is useful work, which both rows get.
    """
    base = case(name, 1, 4096, 4, 4, H, mask)
    flops = dict(base.flops)
    if H > 128:
        flops["backward_keys"] = flops["backward_queries"]
    functions = {"forward": _on_hopper, "backward": _backward_on_hopper}
    kernels = {role: Program(functools.partial(fn, mask=mask)) for role, fn in functions.items()}
    return dataclasses.replace(base, kernels=kernels, flops=flops, targets=("h200",))


CASES += [
    hopper("hopper_4k_h64", 64),
    hopper("hopper_4k_h128", 128),
    hopper("hopper_4k_h256", 256),
    hopper("hopper_causal_4k_h128", 128, Causal()),
]
