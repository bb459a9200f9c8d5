"""Growth of a TokenFormer: appends keys of zero and fresh values; the function is kept.

Wang et al. 2024, arXiv 2410.23168; see efficient.linears.pattention for why it is kept.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from efficient.errors import UserError
from efficient.linears.pattention import Pattention
from efficient.model import Arrays, init, modules
from efficient.registry import register
from efficient.surgery.common import carry, matching


@register("surgery", "grow_tokens")
class GrowTokens:
    """Multiplies the pairs of every token-parameter attention.

    Args:
      at: which of them; by default all.
      factor: by how much; above 1.
    """

    def __init__(self, *, at: str = ".*", factor: float = 2.0):
        if not 1 < factor < math.inf:
            raise UserError(f"grow_tokens: factor={factor} must be a number above 1, such as 2")
        self.at, self.factor = at, factor

    def apply(self, model: nnx.Module) -> None:
        for _, module in matching(model, self.at, lambda m: isinstance(m, Pattention)):
            module.grow(max(module.tokens + 1, round(module.tokens * self.factor)))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        """The arrays of the grown model, which computes the same function."""
        new = carry(values, model, key)
        for path, module in modules(model):
            if not isinstance(module, Pattention):
                continue
            keys, old = values[f"{path}/keys"], values[f"{path}/values"]
            held, more = keys.shape[0], module.tokens - keys.shape[0]
            if not more:
                continue
            # Another key for each size: the values' own would draw the first rows again.
            drawn = init(module, jax.random.fold_in(key, held), name=lambda p, at=path: f"{at}/{p}")
            new[f"{path}/keys"] = jnp.pad(keys, ((0, more), (0, 0)))
            new[f"{path}/values"] = jnp.concatenate([old, drawn["values"][held:]])
        return new
