"""S2-Attention: every head attends to its own shard of the context, all of it among them.

"Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads", Lin,
Zhang, Ge, Ren, Patra, Chaudhary, Peng and Song 2024, arXiv 2407.17678. The context is cut into
blocks; i and j are the blocks of query t and key s. The n-th of K kv heads sees s where s <= t and

    i - j < l    or    (j + n e) mod r = 0

with l local blocks, a stride r and a step e from head to head. With e = 1 and K >= r every block is
in some head's shard, so that the union over heads is the whole context, while a head does 1 / r of
the work of the far blocks and needs the keys and values of its shard and of the last l blocks only.

The rule is `pallas_kernels.attention.patterns.s2_attention`; here are the mixer, for which blocks
without a seen key are no work, and its cache. The query heads of a kv head share its shard.
"""

from efficient.errors import UserError
from efficient.mixers.sparse import Kept, SparseAttention, at_least
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Scope
from pallas_kernels.attention import patterns

_TEST = "tests/papers/test_s2_attention.py"

PAPER = Paper(
    slug="s2_attention",
    status="equations",
    claims=(
        Claim(
            "each head attends to a partition of the context, and the union of all is the context",
            f"{_TEST}::test_union_over_heads_is_the_whole_context",
            True,
        ),
        Claim(
            "the work of a head shrinks with its share of the context",
            f"{_TEST}::test_work_is_that_of_the_live_blocks",
            True,
            "FLOPs counted, forward and backward, are those of the live blocks exactly: 42% of"
            " causal attention's for 16 blocks at stride 4 with 2 local blocks",
        ),
        Claim(
            "the cache of keys and values shrinks for free",
            f"{_TEST}::test_cache_holds_what_the_head_will_see",
            True,
            "at 8,192 tokens, blocks of 64, stride 16 and 1 local block a head holds 576",
        ),
        Claim(
            "the quality of training is on par with full attention",
            note="needs large models; the small one of the config ends at 2.618 bits per byte, full"
            " attention at 2.612",
        ),
        Claim("attention is 25.3 times as fast as FlashAttention-2", note="needs accelerators"),
        Claim("end-to-end training is 6 times and inference 10 times as fast", note="likewise"),
        Claim("perfect needle retrieval over 32K tokens", note="needs a long-context model"),
    ),
    source="the rule of github.com/linxihui/dkernel, as in patterns.s2_attention; the abstract",
    departures=(
        "where the paper keeps some layers dense, a config says so by its rules",
        "with `dense_heads` the cache of all heads is as long as the context",
    ),
)


@register("mixer", "s2_attention", causal=(True,), segments=False, sequence=True)
class S2Attention(SparseAttention):
    """Causal attention in which kv head n keeps every `stride`-th block of the context.

    Args:
      stride: r, of so many blocks a head keeps one.
      block: tokens in a block; kernels leave out the most at multiples of their own 128.
      local_blocks: l, the last blocks that every head sees, the query's own included.
      dense_heads: how many of the last kv heads see everything before them.
      step: e, by how many blocks the shards of neighbouring kv heads differ.
      heads, kv_heads, head_size, rope, softcap, kernel, bias: those of `attention`.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        stride: int,
        block: int = 128,
        local_blocks: int = 1,
        dense_heads: int = 0,
        step: int = 1,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope: float | None = None,
        softcap: float | None = None,
        kernel: str | None = None,
        bias: bool = False,
    ):
        for name, value, least in (
            ("stride", stride, 1), ("block", block, 1), ("local_blocks", local_blocks, 1),
            ("step", step, 0), ("dense_heads", dense_heads, 0),
        ):  # fmt: skip
            at_least(name, value, least)
        heads = heads or max(1, width // 64)
        kv_heads = kv_heads or heads
        if dense_heads > kv_heads:
            raise UserError(f"dense_heads={dense_heads} exceeds the {kv_heads} kv heads")
        shards = [Kept(-n * step % stride, stride, block) for n in range(kv_heads - dense_heads)]
        super().__init__(
            scope, width, causal, heads=heads, kv_heads=kv_heads, head_size=head_size, rope=rope,
            softcap=softcap, kernel=kernel, bias=bias,
            kept=(*shards, *[Kept(0, 1, block)] * dense_heads), keep_window=local_blocks * block,
        )  # fmt: skip
        self.mask = patterns.s2_attention(
            heads, stride=stride, block=block, local_blocks=local_blocks, kv_heads=kv_heads,
            dense_heads=dense_heads, step=step,
        )  # fmt: skip
