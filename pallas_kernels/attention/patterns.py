"""Masks of the literature, as functions that return a Mask."""

import numpy as np

from pallas_kernels.attention.masks import BlockPattern, Causal, Heads, Mask, Sinks, Stride, Window


def lambda_shaped(sinks: int, window: int, offset: int = 0) -> Mask:
    """The first `sinks` keys and the last `window` keys of each query (its own included), causal.

    The mask of LM-Infinite (arXiv 2308.16137) and of StreamingLLM (arXiv 2309.17453).
    """
    return Causal(offset) & (Window(window, None, offset) | Sinks(sinks))


def lambda_parts(sinks: int, window: int, offset: int = 0) -> tuple[Mask, Mask]:
    """`lambda_shaped` in two disjoint parts: (near, far).

    LM-Infinite clamps the distance to the sinks beyond the window, so that queries and keys of
    `far` are rotated otherwise than those of `near`: attend twice and `merge` by log-sum-exp.
    """
    return Window(window, 0, offset), Causal(offset - window) & Sinks(sinks)


def strided_blocks(window: int, stride: int, block: int, offset: int = 0) -> Mask:
    """The last `window` keys and every stride-th block of keys from the first on, causal.

    The blockwise sparse attention of LongGen (arXiv 2410.01485). The paper says: strided blocks of
    tokens beside the local ones; where the stride starts is not said and is the first block here,
    so that the sinks are among what is kept.
    """
    return Causal(offset) & (Window(window, None, offset) | Stride(stride, 0, block))


def s2_attention(
    heads: int,
    *,
    stride: int,
    block: int = 128,
    local_blocks: int = 4,
    kv_heads: int | None = None,
    dense_heads: int = 0,
    step: int | None = None,
    shift: int = 0,
) -> Mask:
    """S2-Attention (arXiv 2407.17678): each head sees its own shard of the context's blocks.

    Query block i of the h-th kv head sees key block j <= i where i - j < local_blocks, or where
    (j + h * step + shift) % stride == 0; within blocks on the diagonal attention is causal. The
    query heads of a kv head share its shard. With at least `stride` kv heads (and step 1) the
    heads together cover the whole context. This is the rule of the authors' kernel repository.

    Args:
      heads: query heads.
      stride: of so many key blocks a head keeps one.
      block: tokens in a block. A multiple of 128 is what the kernels' own blocks lie within; with
        less, most of these are partly seen, and work falls less than the share of what is seen.
      local_blocks: blocks up to the query's own that every head sees.
      kv_heads: key heads; default as many as query heads.
      dense_heads: how many of the last kv heads see everything before them.
      step: shift between neighbouring kv heads; default max(1, stride // heads).
      shift: of all heads.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads or not 0 <= dense_heads <= kv_heads:
        raise ValueError(
            f"s2_attention: kv_heads must divide heads {heads} and dense_heads be at most "
            f"kv_heads, got kv_heads {kv_heads}, dense_heads {dense_heads}"
        )
    step = max(1, stride // heads) if step is None else step
    local = Window(local_blocks, 0, block=block)
    shards = [Stride(stride, (n * step + shift) % stride, block) for n in range(kv_heads)]
    sparse = [Causal() & (local | shard) for shard in shards[: kv_heads - dense_heads]]
    each = sparse + [Causal()] * dense_heads
    return Heads([mask for mask in each for _ in range(heads // kv_heads)])


def flat_butterfly(
    length: int,
    *,
    block: int,
    size: int | None = None,
    factors: int | None = None,
    global_blocks: int = 0,
) -> Mask:
    """Pixelated Butterfly's flat block butterfly mask (arXiv 2112.00029), for T = S = length.

    The sum of the first `factors` butterfly factors of `size` x `size`: blocks i and j meet where
    i == j or i ^ j is one of 1, 2, 4 ... 2 ** (factors - 1). A `size` below length / block
    stretches the pattern. The paper adds a low-rank part, for which attention has global tokens.

    Args:
      length: tokens, a multiple of `block`.
      block: tokens in a block.
      size: a power of two that divides length / block; default length / block.
      factors: 1 to log2(size); default all.
      global_blocks: so many first blocks see, and are seen by, everything.
    """
    blocks, rest = divmod(length, block)
    size = blocks if size is None else size
    if rest or size < 2 or size & (size - 1) or blocks % size:
        raise ValueError(
            f"flat_butterfly: size must be a power of two, at least 2, that divides length / block "
            f"= {length} / {block}, and block divide length; got size {size}"
        )
    most = size.bit_length() - 1
    factors = most if factors is None else factors
    if not 1 <= factors <= most:
        raise ValueError(f"flat_butterfly: factors must be from 1 to {most}, got {factors}")
    index = np.arange(blocks) // (blocks // size)
    live = np.isin(index[:, None] ^ index, [0, *(2**power for power in range(factors))])
    live[:global_blocks] = live[:, :global_blocks] = True
    return BlockPattern(live, (block, block))
