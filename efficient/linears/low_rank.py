"""A projection of two factors, for the queries, keys and values of low-rank attention heads.

"Stable Language Model Pre-training by Reducing Embedding Variability", Chung et al. 2024,
arXiv 2409.07787: multi-head low-rank attention (MLRA) factorizes the projections of attention,

    y = x D U + b        D [I, r], U [r, O]

so that the variance of a layer's output, and with it that of the embeddings layer by layer, grows
less. With independent entries of standard deviation s in D and U and features of mean square q in x
the output has variance I r s^4 q, that is r s^2 of a full matrix' I s^2 q: 0.15 at r = 384 and
GPT-2's s = 0.02. So has that of a full matrix of standard deviation sqrt(r) s^2. With variances of
1 / fan-in (`init_std=None`) it is q whatever the rank, so that the claim rests on an initialization
that does not correct for the second factor.

For low-rank training of whole models the factors may start as the leading parts of a random matrix
(`init`); `efficient.optimizers.frobenius_adamw` holds that study's record and its decay.

Token embedding variability (TEV), the paper's proxy for stability, is the standard deviation of
the features of a token's embedding, averaged over the vocabulary.

What could be read of the paper is its abstract and what others report of it. Not established:
its rank, so `rank` has no default; whether heads share the factor D, as they do here; which
initialization it trains with; and whether TEV divides by D - 1, as the one program does that was
found to compute it, or by D.
"""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, FanIn, Normal
from efficient.linears.matmul import dense
from efficient.linears.spectral import SpectralFactor
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param


def token_embedding_variability(table: Float[Array, "V D"]) -> Float[Array, ""]:
    """The mean over tokens of the standard deviation of an embedding's features, in float32."""
    return jnp.mean(jnp.std(table.astype(jnp.float32), axis=-1, ddof=1))


@register("linear", "low_rank")
class LowRank(nnx.Module):
    """[..., I] -> [..., O] through r features, with factors `down` [I, r] and `up` [r, O].

    Args:
      rank: r. At I O / (I + O) it has as many parameters as a dense layer.
      init: `normal` draws the factors; `spectral` gives the r leading parts of a Gaussian matrix,
        their singular values split evenly; `spectral_ones` the same directions, with ones.
      init_std: standard deviation of both factors, with `spectral` of the matrix; None draws with
        variance 1 / fan-in.
      bias: overrides what the host asks for.
    """

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        rank: int,
        init: Literal["normal", "spectral", "spectral_ones"] = "normal",
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        if not 1 <= rank <= min(in_features, out_features):
            raise UserError(
                f"low_rank: rank={rank} must be from 1 to {min(in_features, out_features)}, the"
                f" rank of a {in_features} x {out_features} matrix"
            )
        down = up = FanIn() if init_std is None else Normal(init_std)
        if init != "normal":
            std = in_features**-0.5 if init_std is None else init_std
            ones = init == "spectral_ones"
            down, up = (
                SpectralFactor(in_features, out_features, std, right, ones)
                for right in (False, True)
            )
        self.down = param((in_features, rank), down)
        self.up = param((rank, out_features), up)
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        bias = None if self.bias is None else self.bias[...]
        return dense(dense(x, self.down[...]), self.up[...], bias)

    def flops(self) -> int:
        """Floating-point operations a token of the two products."""
        (in_features, rank), out_features = self.down.shape[-2:], self.up.shape[-1]
        return 2 * rank * (in_features + out_features)

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        return self.down[...] @ self.up[...]

    def project(self, matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """The nearest parameters to `matrix`, its singular values split evenly between them."""
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        rank = self.down.shape[-1]
        root = jnp.sqrt(s[:rank])
        return {"down": u[:, :rank] * root, "up": root[:, None] * vt[:rank]}


TEST = "tests/papers/test_low_rank_heads.py"
PAPER = Paper(
    slug="low_rank_heads",
    status="equations",
    claims=(
        Claim(
            "Factorized projections limit how the variance of embeddings grows with depth: at"
            " initialization, with one standard deviation s for all factors, attention adds about"
            " r s^2 of what full projections make it add.",
            f"{TEST}::test_variance_grows_less_with_depth",
            True,
            "by the scale of the product, not by its rank: full matrices of standard deviation"
            " sqrt(r) s^2 do the same. At r s^2 = 0.154 it adds 0.146 of that in the first of 12"
            " blocks of width 64 and 0.117 over all, where the variance is 1.72 against 2.36; mean"
            " of 16 draws; both grow linearly, not exponentially",
        ),
        Claim(
            "A projection's variance falls by r s^2.",
            f"{TEST}::test_variance_of_a_projection",
            True,
            "derived here; with variances of 1 / fan-in it stays",
        ),
        Claim(
            "Token embedding variability is a cheap proxy of the gradients' variance.",
            note="the metric is here; the correlation needs pretraining runs that diverge",
        ),
        Claim(
            "GPT-2 with MLRA is more stable and has a lower perplexity, deeper models the more.",
            note="needs pretraining of deep GPT-2 models",
        ),
    ),
    source="arXiv 2409.07787 (abstract); a program by others that computes TEV of checkpoints",
    departures=(
        "Rank, initialization and whether heads share a factor could not be established.",
        "TEV divides by D - 1.",
    ),
)
