"""Attention from tokens to parameters in place of a linear projection.

"TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters", Wang et al. 2024,
arXiv 2410.23168. With n learned keys K [n, I] and values V [n, O], for each token x [I]:

    s = K x                                   scores
    y = gelu(sqrt(n) s / ||s||_2)^T V         (GELU by the error function)

All projections of attention become this (n = I at first), and the feed-forward block becomes one
(n = 4 D, the channel `tokenformer`); block norms have no parameters. The scale of K does not
matter, so x and K need no scaling of their own.

Growth appends pairs (surgery `grow_tokens`). A key of zeros has score 0, which leaves ||s|| as it
is, and weight gelu(0) = 0, so the function is kept, provided that sqrt(n) is not changed either:
it stays that of the model before growth (`scale_tokens`; `zoom_dim` in the authors' TPU code; their
PyTorch code takes sqrt of the present n, which rescales all scores when the model grows). New
values are drawn like the first: the gradient of a new key is 0.5 sqrt(n) / ||s|| (dy . v) x, so
with values of zero as well neither would ever move. A new value moves once its key has.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, FanIn, Normal
from efficient.linears.matmul import dense
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param

EPSILON = 1e-10  # beside ||s||^2; keeps the gradient at x = 0 finite


def token_weights(
    x: Float[Array, "*B I"], keys: Float[Array, "n I"], scale_tokens: int
) -> Float[Array, "*B n"]:
    """gelu(sqrt(scale_tokens) s / ||s||) of the scores s = x K^T, in float32 or more."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scores = jnp.einsum("...i,ni->...n", x, keys.astype(x.dtype), preferred_element_type=wide)
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(scores), axis=-1, keepdims=True) + EPSILON)
    return jax.nn.gelu(scores * (inverse * math.sqrt(scale_tokens)), approximate=False)


@register("linear", "pattention")
class Pattention(nnx.Module):
    """Token-parameter attention: [..., I] -> [..., O]. It is no matrix: no `materialize`.

    Args:
      tokens: n; default in_features.
      key_std: standard deviation of the keys.
      value_std: of the values; None draws with variance 1 / n. The authors take 2 / (L sqrt(D)).
      bias: overrides what the host asks for; the paper has none.
    """

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        tokens: int | None = None,
        key_std: float = 0.02,
        value_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        tokens = in_features if tokens is None else tokens
        if tokens < 1:
            raise UserError(f"pattention: tokens={tokens} must be at least 1")
        self.scale_tokens = tokens
        self.keys = param((tokens, in_features), Normal(key_std))
        values = FanIn() if value_std is None else Normal(value_std)
        self.values = param((tokens, out_features), values)
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    @property
    def tokens(self) -> int:
        """How many pairs of a key and a value there are."""
        return self.keys.shape[-2]

    def grow(self, tokens: int) -> None:
        """Declares that many pairs, in place; the scale stays that of the first."""
        for variable in (self.keys, self.values):
            shape = (tokens, variable.shape[-1])
            variable.set_value(jax.ShapeDtypeStruct(shape, variable.dtype))

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        weights = token_weights(x, self.keys[...], self.scale_tokens)
        bias = None if self.bias is None else self.bias[...]
        return dense(weights.astype(x.dtype), self.values[...], bias)

    def flops(self) -> int:
        """Floating-point operations a token of the two products."""
        return 2 * self.tokens * (self.keys.shape[-1] + self.values.shape[-1])


TEST = "tests/papers/test_tokenformer.py"
PAPER = Paper(
    slug="tokenformer",
    status="equations",
    claims=(
        Claim(
            "Projections are attention to parameters, with L2-normalized scores under a GELU.",
            f"{TEST}::test_against_the_equation",
            True,
        ),
        Claim(
            "Appending pairs whose keys are zero leaves the outputs as they are.",
            f"{TEST}::test_growth_keeps_the_function",
            True,
            "with sqrt(n) held at its first value; with sqrt of the present n it does not",
        ),
        Claim(
            "What was appended is trained from there.",
            f"{TEST}::test_new_pairs_are_trained",
            True,
            "new keys at once, new values one step later",
        ),
        Claim(
            "Growing from 124M to 1.4B matches Transformers trained from scratch at half the cost.",
            note="needs OpenWebText and models of that size",
        ),
    ),
    source="https://github.com/Haiyang-W/TokenFormer (megatron/model/tokenformer.py,"
    " configs/tokenformer, tokenformer-tpu/MaxText/layers/tokenformer.py)",
    departures=(
        "1e-10 beside the square of the norm.",
        "New values are drawn by the initializer; the scale stays that of the first n.",
        "The config has learned positions, not rotary ones on a quarter of the features.",
    ),
)
