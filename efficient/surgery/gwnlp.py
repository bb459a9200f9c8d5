"""Weight-normalized low-rank reparametrization: the model's half of GradNormLoRP.

"Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", Huang et al. 2024,
arXiv 2412.19616. Its optimizer and its record are in `efficient.optimizers.gwnlp`.

    W = m * V / ||V||_c,    V = W0 + (alpha / r) A B    to adapt a trained matrix W0
                            V itself is trained         to train a matrix whole, with `rank=None`

with A [I, r] Gaussian and B [r, O] zero as in LoRA. The norm is that of each output's column of
V [I, O], and m [O] starts as ||W0||_c, so that the function is as before; a run that starts with
this surgery has no W0 yet and begins with m = 1, so put it in a second phase.

The gradients are those of weight normalization (Salimans and Kingma 2016, arXiv 1602.07868):

    dm = sum_i (V / ||V||) dW        dV = m / ||V|| (dW - V / ||V|| dm)

The authors' optimizer, and PEFT's DoRA through which they also fine-tune, take the norm as a
constant in the gradient, which leaves out the second term of dV; so does `constant_norm`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError, check_finite
from efficient.init import ONES, ZEROS, FanIn
from efficient.linears.dense import Dense
from efficient.linears.matmul import dense
from efficient.model import Arrays, bind, modules, replace
from efficient.registry import register
from efficient.scope import Context, param
from efficient.surgery.common import carry, features, former_path, innermost, linears, merged_arrays

TRAINED = r".*/(lora_a|lora_b|magnitude)"


def column_norm(matrix: Float[Array, "I O"]) -> Float[Array, "O"]:
    """The L2 norm of each output's column, at least 1e-12; summed in float32 or more."""
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(wide), axis=-2), 1e-24)).astype(matrix.dtype)


class WeightNormLinear(nnx.Module):
    """A dense layer whose columns are m times a unit vector: [..., I] -> [..., O]."""

    def __init__(self, base: nnx.Module, rank: int | None, alpha: float, constant_norm: bool):
        in_features, out_features = features(base)
        self.base = base
        self.scale = None if rank is None else alpha / rank
        self.constant_norm = constant_norm
        if rank is not None:
            self.lora_a = param((in_features, rank), FanIn())
            self.lora_b = param((rank, out_features), ZEROS)
        self.magnitude = param((out_features,), ONES)

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        bias = innermost(self).bias
        return dense(x, self.materialize().astype(x.dtype), None if bias is None else bias[...])

    def flops(self) -> int:
        """Floating-point operations a token; the matrix is made once a step."""
        return self.base.flops()

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W of y = x W + b."""
        direction = self.base.materialize()
        if self.scale is not None:
            direction += self.scale * (self.lora_a[...] @ self.lora_b[...])
        norm = column_norm(direction)
        if self.constant_norm:
            norm = jax.lax.stop_gradient(norm)
        return direction * (self.magnitude[...] / norm)

    def merged(self) -> Arrays:
        """The base's arrays with W as the kernel."""
        return merged_arrays(self.base) | {"kernel": self.materialize()}


@register("surgery", "gwnlp")
class WeightNorm:
    """Puts dense layers into the form m * V / ||V||_c.

    Args:
      at: which linears.
      rank: r of A B, with V = W0 + A B; None adds no factors, for V to be trained whole.
      alpha: A B is scaled by alpha / r.
      constant_norm: no gradient through the norm.
    """

    def __init__(
        self,
        *,
        at: str = r".*/(mixer|channel)/.*",
        rank: int | None = 8,
        alpha: float = 16.0,
        constant_norm: bool = False,
    ):
        if rank is not None and rank < 1:
            raise UserError(f"gwnlp: rank must be at least 1, or None for no factors, got {rank}")
        self.at, self.rank, self.alpha, self.constant_norm = at, rank, alpha, constant_norm

    def apply(self, model: nnx.Module) -> None:
        for path, linear in linears(model, self.at):
            if not isinstance(innermost(linear), Dense):
                raise UserError(
                    f"gwnlp: {path} is a {type(linear).__name__}; only dense layers can"
                )
            new = WeightNormLinear(linear, self.rank, self.alpha, self.constant_norm)
            replace(model, path, new)

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        """The arrays of the changed model, which computes the same function."""
        new = carry(values, model, key)
        for path, module in modules(model):
            if isinstance(module, WeightNormLinear) and f"{path}/magnitude" not in values:
                start = f"{path}/base/"
                own = {p.removeprefix(start): v for p, v in new.items() if p.startswith(start)}
                for name, array in own.items():
                    check_finite(f"gwnlp: {former_path(start + name, values)}", array)
                matrix = bind(module.base, own).materialize()
                new[f"{path}/magnitude"] = column_norm(matrix)
        return new
