"""Dense layers cut to two factors, the end of a full-rank warm-up.

"Exploring Low Rank Training of Deep Neural Networks", Kamalakara et al. 2022, arXiv 2209.13569:
a dense model trains for a while, then each matrix becomes the nearest one of rank r, as
U_r diag(s_r)^(1/2) times diag(s_r)^(1/2) V_r^T, and training goes on with the factors.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from efficient.errors import check_finite
from efficient.linears.dense import Dense
from efficient.linears.low_rank import LowRank
from efficient.model import Arrays, modules, replace
from efficient.registry import register
from efficient.scope import Rules, Scope
from efficient.surgery.common import carry, matching


@register("surgery", "dense_to_low_rank")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseToLowRank:
    """Projects dense layers onto matrices of a rank; biases are kept.

    Args:
      at: which dense layers, a pattern of whole paths.
      rank: r.
    """

    at: str
    rank: int

    def apply(self, model: nnx.Module) -> None:
        for path, layer in matching(model, self.at, lambda m: isinstance(m, Dense)):
            shape, use_bias = layer.kernel.shape, layer.bias is not None
            new = LowRank(Scope(Rules(), path), *shape, use_bias, rank=self.rank)
            replace(model, path, new)

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        new = carry(values, model, key)
        for path, layer in modules(model):
            kernel = values.get(f"{path}/kernel")
            if isinstance(layer, LowRank) and kernel is not None:
                check_finite(f"dense_to_low_rank: {path}/kernel", kernel)
                factors = layer.project(kernel.astype(jnp.float32))
                new |= {f"{path}/{n}": a.astype(kernel.dtype) for n, a in factors.items()}
        return new
