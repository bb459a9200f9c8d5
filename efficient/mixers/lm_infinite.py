"""LM-Infinite: a model trained on short texts reads long ones, with no change of its parameters.

"LM-Infinite: Simple On-the-Fly Length Generalization for Large Language Models" (also "Zero-Shot
Extreme Length Generalization for Large Language Models"), Han, Wang, Xiong, Chen, Ji and Wang 2023,
arXiv 2308.16137. A query t sees the last L keys and the first n, the sinks,

    s <= t   and   (t - s < L  or  s < n)                    a mask shaped like a Lambda

and no key is farther than L: with rotary positions R the score of query q_t and key k_s is

    q_t^T R(-min(t - s, L)) k_s / sqrt(H)

L is the length of training, so that neither the number of keys near a query nor any distance is new
to the model. Work and memory are linear in length, a decoding cache is of n + L tokens. For texts
of at most L tokens this is rotary attention itself, so one trained model serves both.

Near keys, t - s < L, are rotated by their positions as ever; the sinks beyond are left as they are
and their query is rotated by the constant L. The two sets of keys do not meet, and two calls of
attention are merged by their log-sum-exp. All layers and heads are alike.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient.mixers.attention import rotary
from efficient.mixers.sparse import Kept, SparseAttention, at_least
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope
from pallas_kernels.attention import attention, merge, patterns

_TEST = "tests/papers/test_lm_infinite.py"

PAPER = Paper(
    slug="lm_infinite",
    status="equations",
    claims=(
        Claim(
            "a Lambda-shaped mask and a limit on distances, no parameter changed",
            f"{_TEST}::test_mixer_equals_numpy",
            True,
        ),
        Claim(
            "texts of at most the training length see no difference",
            f"{_TEST}::test_up_to_the_window_it_is_rotary_attention",
            True,
            "bit for bit",
        ),
        Claim(
            "perplexity stays flat far beyond the training length, where the model itself fails",
            f"{_TEST}::test_flat_beyond_the_training_length_where_attention_fails",
            True,
            "up to 16 times the training length, also docs/lm_infinite.png; a sliding window"
            " without sinks and limit is as flat in so small a model",
        ),
        Claim(
            "time and memory are linear in length",
            f"{_TEST}::test_work_and_cache_are_linear_in_length",
            True,
            "matrix FLOPs and the tokens in the cache, counted",
        ),
        Claim("decodes 2.72 times as fast at 32k tokens", note="needs accelerators"),
        Claim("retrieves passkeys beyond the training length", note="needs large models"),
    ),
    source="github.com/Glaciohound/LM-Infinite, models/llama.py and models/lambda_attention.py",
    departures=(
        "rotary positions only; the authors serve ALiBi (MPT-7B) too, whose bias stops to grow",
        "their option to bring back a few keys of the middle for retrieval is not here",
        "L is both the reach of the window and the limit of distances, as in the authors' drop-in"
        " conversion; their command line can set them apart",
    ),
)


@register("mixer", "lm_infinite", causal=(True,), segments=False)
class LMInfinite(SparseAttention):
    """Rotary attention to the last `window` keys and to the first `sinks`, no farther than that.

    Args:
      window: L, the length of training.
      sinks: n, the first keys, which all later queries see; the authors take 10 to 100.
      rope: base of the rotary frequencies.
      heads, kv_heads, head_size, softcap, kernel, bias: those of `attention`.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        window: int,
        sinks: int = 10,
        rope: float = 10_000.0,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        softcap: float | None = None,
        kernel: str | None = None,
        bias: bool = False,
    ):
        at_least("window", window, 1)
        at_least("sinks", sinks, 1)
        super().__init__(
            scope, width, causal, heads=heads, kv_heads=kv_heads, head_size=head_size,
            softcap=softcap, kernel=kernel, bias=bias, rope=rope,
            kept=(Kept(block=sinks),), keep_window=window,
        )  # fmt: skip
        self.limit, self.sinks = window, sinks
        self.mask = patterns.lambda_shaped(sinks, window)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        positions = context.positions
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        q, k, v = self._heads_of(x, context)
        near, far = patterns.lambda_parts(self.sinks, self.limit)
        rotated = rotary(q, positions, self.rope), rotary(k, positions, self.rope), v
        parts = [self._attend(*rotated, near, context)]
        if x.shape[1] > self.limit:
            q = rotary(q, jnp.full((1, 1), self.limit), self.rope)
            parts.append(self._attend(q, k[:, : self.sinks], v[:, : self.sinks], far, context))
        y = merge(parts)[0] if len(parts) > 1 else parts[0][0]
        return self.out(y.reshape(*y.shape[:2], -1), context)

    def _attend(self, q, k, v, mask, context):
        return attention(
            q, k, v, mask=mask, softcap=self.softcap, sharding=context.layout("heads", q.shape),
            implementation=self.kernel, return_lse=True,
        )  # fmt: skip

    def _project_one(self, x, index, context):
        del index  # rotated by distance when they meet
        return self._heads_of(x, context)

    def _turn(self, keys: Array, held: Array, index: Array) -> Array:
        distance = jnp.clip(index - held[:, 0], 0, self.limit)
        return rotary(keys, -distance[None], self.rope)
