"""Hydragen: attention of a batch that shares prefixes, each prefix read once for all sequences.

"Hydragen: High-Throughput LLM Inference with Shared Prefixes", Juravsky et al. 2024, arXiv
2402.05099. With keys and values of a sequence in two parts, [K1; K2] and [V1; V2],

    o_i = softmax(q K_i^T / sqrt(H)) V_i,    l_i = logsumexp(q K_i^T / sqrt(H)),
    o = (o_1 exp(l_1) + o_2 exp(l_2)) / (exp(l_1) + exp(l_2))

is attention over both, exactly, and so for any number of parts. Where part 1 is a prefix that B
sequences share, their T queries each are B T queries of one sequence: one product of matrices, for
which the prefix is read once, in place of B products with it. Prefixes of prefixes nest: the tree
of a batch is a list of levels.

The work is `pallas_kernels.shared_prefix_attention`. Keys carry their positions (rotary) already;
suffix positions go on from the prefix's end. Generation with shared prompts is not here yet.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.papers import Claim, Paper
from pallas_kernels.shared_prefix_attention import Level, shared_prefix_attention

_TEST = "tests/papers/test_hydragen.py"

PAPER = Paper(
    slug="hydragen",
    status="equations",
    claims=(
        Claim(
            "attention over prefix and suffix apart, merged by log-sum-exp, is exact",
            f"{_TEST}::test_decomposition_is_exact",
            True,
            "flat, tree and ragged batches against one softmax in float64",
        ),
        Claim(
            "queries of all sequences attend to the prefix in one product of matrices",
            f"{_TEST}::test_prefix_is_one_product_of_all_queries",
            True,
        ),
        Claim(
            "redundant reads of the prefix go",
            f"{_TEST}::test_bytes_by_count",
            True,
            "batch 256, prefix 16,384, suffix 128, 32 heads, 8 of keys: the blocks that the TPU"
            " kernels copy are 64 times fewer bytes than those of decoding with a cache of its own"
            " for each sequence; nothing was run. Of all that crosses HBM in the programs compiled"
            " for v6e it is 63 times (test_compiled_programs_copy_no_cache)",
        ),
        Claim(
            "a prefix of 16K in place of 1K costs far less than without sharing",
            f"{_TEST}::test_growth_with_the_prefix",
            True,
            "bytes of keys and values grow 1.9 times, without sharing 14.3 times",
        ),
        Claim(
            "it applies to trees of prefixes",
            f"{_TEST}::test_decomposition_is_exact",
            True,
        ),
        Claim(
            "end-to-end throughput is up to 32 times that of competitive baselines",
            note="needs an accelerator, and generation with shared prompts",
        ),
        Claim(
            "throughput falls by less than 15% from a prefix of 1K to 16K, baselines' by over 90%",
            note="needs an accelerator, and generation with shared prompts",
        ),
        Claim(
            "sharing by a tree takes 55% off the time of competitive programming problems",
            note="needs CodeLlama, the problems and an accelerator",
        ),
    ),
    source="github.com/ScalingIntelligence/hydragen, hydragen/attention.py and README.md; arXiv"
    " 2402.05099's abstract",
    departures=(
        "the groups of a level may be of any sizes and orders, where the reference code has equal"
        " neighbouring ones",
        "query heads of a key head are rows of the prefix's product too",
        "the parts are made and merged in float32; the queries' dtype rounds their sum alone",
    ),
)


def hydragen_attention(
    q: Float[Array, "B T N H"],
    prefixes: Sequence[Level],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    kernel: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of the last T tokens of each suffix to its prefixes and to the suffix.

    Args:
      q: queries of the new tokens.
      prefixes: levels of the tree, from the root; `Level(k, v)` with [G, P, K, H] arrays.
      k_cache, v_cache: of the suffixes, the new tokens included.
      lengths: tokens in each suffix, the new ones included.
      kernel: implementation of `shared_prefix_attention`; None is that of the platform.
    """
    return shared_prefix_attention(
        q, prefixes, k_cache, v_cache, lengths=lengths, implementation=kernel
    )


def kv_bytes(
    batch: int,
    prefix: int,
    suffix: int,
    kv_heads: int,
    head_size: int,
    *,
    reads: int | None = None,
    itemsize: int = 2,
) -> int:
    """Bytes of keys and values that cross HBM when each sequence of a batch attends once.

    Args:
      batch: B, sequences with one prefix.
      prefix, suffix: keys of the prefix and of each suffix.
      reads: times that the prefix crosses HBM: 1 at the least, B without Hydragen (None).
      itemsize: bytes of a number.
    """
    reads = batch if reads is None else reads
    if min(batch, reads, kv_heads, head_size, itemsize) < 1 or min(prefix, suffix) < 0:
        raise UserError("kv_bytes takes positive sizes; only prefix and suffix may be 0")
    return 2 * itemsize * kv_heads * head_size * (reads * prefix + batch * suffix)
