"""Block-sparse attention: whole blocks of scores are seen or not, by a fixed butterfly pattern.

The block-sparse variant of FlashAttention (Dao, Fu, Ermon, Rudra and Re 2022, arXiv 2205.14135)
leaves out the blocks of scores that a pattern calls zero, so that work falls with the share of the
live ones. The pattern here is that of Pixelated Butterfly (Chen et al. 2021, arXiv 2112.00029):
blocks i and j meet where

    i = j,   or   i xor j is one of 1, 2, 4, ..., 2^(factors - 1),   or   min(i, j) < global_blocks

The last stands for the low-rank part. The rule of a pair does not depend on the length, so a longer
text only adds pairs.
"""

import functools

from efficient.mixers.attention import Attention
from efficient.mixers.sparse import at_least
from efficient.registry import register
from efficient.scope import Scope
from pallas_kernels.attention import BlockPattern, Causal, Mask, patterns


@functools.lru_cache(maxsize=64)
def butterfly_mask(
    length: int, block: int, factors: int | None, global_blocks: int, causal: bool
) -> Mask:
    """The flat block butterfly for any length: cut out of that of the next power of two.

    Args:
      length: tokens, T = S.
      block: tokens in a block; the last one may be short.
      factors: how many butterfly factors are summed; None for all.
      global_blocks: so many first blocks see, and are seen by, everything.
      causal: whether later keys are hidden.
    """
    blocks = -(-length // block)
    size = max(2, 1 << (blocks - 1).bit_length())
    most = size.bit_length() - 1
    whole = patterns.flat_butterfly(
        size * block,
        block=block,
        factors=most if factors is None else min(factors, most),
        global_blocks=global_blocks,
    )
    mask = BlockPattern(whole.table()[:, :blocks, :blocks], (block, block))
    return mask & Causal() if causal else mask


@register("mixer", "block_sparse_attention", segments=False, sequence=True)
class BlockSparseAttention(Attention):
    """Attention to the blocks that a flat block butterfly joins to the query's own.

    Args:
      block: tokens in a block; the TPU and Hopper kernels take multiples of 128.
      factors: how many butterfly factors are summed, 2^i apart; None for all, log2 of the blocks.
      global_blocks: so many first blocks see, and are seen by, everything.
      heads, kv_heads, head_size, rope, softcap, kernel, bias: those of `attention`.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        block: int = 128,
        factors: int | None = None,
        global_blocks: int = 0,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope: float | None = None,
        softcap: float | None = None,
        kernel: str | None = None,
        bias: bool = False,
    ):
        at_least("block", block, 1)
        at_least("factors", 1 if factors is None else factors, 1)
        at_least("global_blocks", global_blocks, 0)
        super().__init__(
            scope, width, causal, heads=heads, kv_heads=kv_heads, head_size=head_size, rope=rope,
            softcap=softcap, kernel=kernel, bias=bias,
        )  # fmt: skip
        self.pattern = (block, factors, global_blocks, causal)

    def mask_for(self, length: int) -> Mask:
        return butterfly_mask(length, *self.pattern)
