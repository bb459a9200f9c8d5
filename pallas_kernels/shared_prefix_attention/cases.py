"""Shapes of attention over shared prefixes that tests, laboratory and benchmarks share."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention.cases import EXCEPTIONS
from pallas_kernels.decode_attention import cases as decode
from pallas_kernels.lab import Case, Program
from pallas_kernels.shared_prefix_attention.api import Level, shared_prefix_attention


def forward(q, k, v, k_cache, v_cache, lengths):
    """out of the platform's kernels, for one prefix that is held heads first, [1, K, P, H]."""
    prefix = Level(*(jnp.swapaxes(x, 1, 2) for x in (k, v)))
    return shared_prefix_attention(q, [prefix], k_cache, v_cache, lengths=lengths)


def _units(q, k, v, *suffix):
    return decode.units(q, *suffix)


def case(name: str, B: int, P: int, S: int, N: int, K: int, H: int) -> Case:
    """One prefix of P keys, B suffixes of S, bfloat16, one new token each.

    FLOPs 4 B N H (P + S). Bytes: prefix and suffixes once, queries, and of each part, in float32,
    results and log-sum-exps.
    """
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    prefix, suffix = of((1, K, P, H)), of((B, S, K, H))
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    rows = 6 * B * N * H + 4 * B * N
    return Case(
        name=name,
        kernels={"forward": Program(forward, from_vectors=EXCEPTIONS, live_steps=_units)},
        args=(of((B, 1, N, H)), prefix, prefix, suffix, suffix, lengths),
        flops={"attention_forward": 4.0 * B * N * P * H, "decode_attention": 4.0 * B * N * S * H},
        hbm_bytes={
            "attention_forward": 4.0 * P * K * H + rows,
            "decode_attention": 4.0 * B * S * K * H + rows,
        },
    )


CASES = [
    case("batch_256_prefix_16k", 256, 16384, 128, 32, 8, 128),
    case("batch_256_prefix_1k", 256, 1024, 128, 32, 8, 128),
    case("mha_batch_256_prefix_16k", 256, 16384, 128, 32, 32, 128),
]
