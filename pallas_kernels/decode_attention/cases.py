"""Shapes of decode attention that tests, laboratory and benchmarks share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.settings import Settings
from pallas_kernels.decode_attention.tpu_plan import plan
from pallas_kernels.lab import Case, Program
from pallas_kernels.lab.case import TPUS


def forward(q, k_cache, v_cache, lengths, pages=None):
    """out of the platform's kernel."""
    return decode_attention(q, k_cache, v_cache, lengths=lengths, pages=pages)


def units(q, k_cache, v_cache, lengths, pages=None):
    """Grid steps where every row is full."""
    found = plan(q, k_cache, pages, Settings())
    return {"decode_attention": found.cores * found.units}


def case(
    name: str,
    B: int,
    S: int,
    N: int,
    K: int,
    H: int,
    T: int = 1,
    page: int = 0,
    targets: tuple[str, ...] = TPUS,
) -> Case:
    """Full rows in bfloat16. FLOPs 4 B T N S H; bytes: the cache once, q, out and lse."""
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    cache = of((B, S, K, H)) if not page else of((B * S // page, page, K, H))
    args = [of((B, T, N, H)), cache, cache, integers((B,))]
    if page:
        args.append(integers((B, S // page)))
    moved = 4 * np.prod(cache.shape, dtype=float) + 4 * B * T * N * H + 4 * B * T * N
    return Case(
        name=name,
        kernels={"forward": Program(forward, live_steps=units)},
        args=tuple(args),
        flops={"forward": 4.0 * B * T * N * S * H},
        hbm_bytes={"forward": moved},
        targets=targets,
    )


CASES = [
    case("gqa_8k", 32, 8192, 32, 8, 128),
    case("gqa_8k_pages_of_64", 32, 8192, 32, 8, 128, page=64),
    case("gqa_8k_pages_of_16", 32, 8192, 32, 8, 128, page=16),
    case("gqa_8k_4_tokens", 32, 8192, 32, 8, 128, T=4),
    case("mha_4k", 16, 4096, 32, 32, 128),
    case("mqa_8k_h256", 64, 8192, 8, 1, 256),
    case("gqa_8k_2_heads", 64, 8192, 16, 2, 128),
    case("suffix_128", 256, 128, 32, 8, 128),
    # 17 GB, more than a v5e has.
    case("batch_256_16k", 256, 16384 + 128, 32, 8, 128, targets=TPUS[1:]),
]
