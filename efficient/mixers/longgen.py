"""LongGen's sparse layers: recent tokens, and sinks or strided blocks of the rest.

"A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts",
Ge, Lin, Zhang, Han and Peng 2024, arXiv 2410.01485. A pretrained model is made a hybrid while its
context is extended: the middle third of its layers keeps full attention, so that every token is in
direct reach, and the layers below and above, two thirds, attend sparsely. A query t of these sees

    s <= t   and   (t - s < w  or  s < n)                        window and attention sinks, or
    s <= t   and   (t - s < w  or  s // block mod r = 0)         window and every r-th block

and the layer keeps keys and values of what is seen only. With a share c of the context kept by a
sparse layer, and two thirds of the layers sparse, the cache shrinks by 2 (1 - c) / 3.

Which layers are full is a matter of a config's rules: `configs/longgen.py` has them.
"""

from efficient.errors import UserError
from efficient.mixers.sparse import Kept, SparseAttention, at_least
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Scope
from pallas_kernels.attention import patterns

_TEST = "tests/papers/test_longgen.py"

PAPER = Paper(
    slug="longgen",
    status="equations",
    claims=(
        Claim(
            "layers of windows and sinks, or of strided blocks of tokens, need part of the context",
            f"{_TEST}::test_mixer_equals_numpy",
            True,
        ),
        Claim(
            "one third of the layers, in the middle, are full, two thirds sparse",
            f"{_TEST}::test_the_middle_third_is_full",
            True,
        ),
        Claim(
            "the KV cache shrinks by what the sparse layers let go",
            f"{_TEST}::test_cache_follows_the_formula",
            True,
            "as allocated for Llama-2 7B's shape at 128K tokens; 11 of 32 layers full allow 65.6%"
            " at most, and 62.5% where sparse ones keep a window of 2,048 and 1 block in 32",
        ),
        Claim(
            "KV cache memory shrinks by 62%",
            note="the paper's window and stride could not be read; the sizes above were picked to"
            " come near",
        ),
        Claim(
            "a sparse layer works on part of the context only",
            f"{_TEST}::test_work_is_that_of_the_live_blocks",
            True,
            "FLOPs counted: those of the live blocks, 54% of causal attention's for 16 blocks of"
            " which each query sees every fourth and its last two or three",
        ),
        Claim("training at 128K tokens is 1.55 times as fast", note="needs accelerators"),
        Claim("prefill is 1.67 and decoding 1.41 times as fast", note="needs accelerators"),
        Claim(
            "lightweight training extends the context from 4K to 128K",
            note="needs Llama-2 and 5B tokens; the config extends a small model from 128 to 512"
            " bytes, where the hybrid ends at 1.885 bits per byte and full attention at 1.889",
        ),
    ),
    source="the abstract; 'middle' is from the caption of figure 1, as a review quotes it",
    departures=(
        "how long the window is, how far apart the blocks lie and where their stride starts were"
        " not to be read; `patterns.strided_blocks` starts at the first block",
    ),
)


@register("mixer", "longgen", causal=(True,), segments=False, sequence=True)
class LongGen(SparseAttention):
    """Causal attention to the last `window` keys and to `sinks` first ones or to strided blocks.

    Args:
      window: w, how many keys up to the query's own are seen in any case.
      sinks: n, the first keys, seen by all; or
      stride: r, of so many blocks one is seen by all, the first block on.
      block: tokens in a block of the stride.
      heads, kv_heads, head_size, rope, softcap, kernel, bias: those of `attention`.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        window: int,
        sinks: int | None = None,
        stride: int | None = None,
        block: int = 64,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope: float | None = None,
        softcap: float | None = None,
        kernel: str | None = None,
        bias: bool = False,
    ):
        if (sinks is None) == (stride is None):
            raise UserError(f"give sinks or stride, one of them; got {sinks} and {stride}")
        for name, value in (("window", window), ("sinks", sinks), ("stride", stride),
                            ("block", block)):  # fmt: skip
            at_least(name, 1 if value is None else value, 1)
        kept = Kept(block=sinks) if stride is None else Kept(0, stride, block)
        super().__init__(
            scope, width, causal, heads=heads, kv_heads=kv_heads, head_size=head_size, rope=rope,
            softcap=softcap, kernel=kernel, bias=bias, kept=(kept,), keep_window=window,
        )  # fmt: skip
        if stride is None:
            self.mask = patterns.lambda_shaped(sinks, window)
        else:
            self.mask = patterns.strided_blocks(window, stride, block)
