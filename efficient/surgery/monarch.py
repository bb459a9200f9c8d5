"""Between dense and Monarch layers: dense-to-sparse fine-tuning and reverse sparsification.

Both are uses of "Monarch: Expressive Structured Matrices for Efficient and Accurate Training"
(Dao et al. 2022, arXiv 2204.00595), whose matrices are in `efficient.linears.monarch`:

- `dense_to_monarch` replaces trained dense layers by their nearest Monarch matrices, to fine-tune;
- `monarch_to_dense` multiplies the factors out, so that a model trained for most of its steps with
  Monarch matrices ends as a dense one (reverse sparsification). The function does not change.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from efficient.errors import check_finite
from efficient.linears.dense import Dense
from efficient.linears.monarch import Monarch, monarch_matrix
from efficient.model import Arrays, modules, replace
from efficient.registry import register
from efficient.scope import Rules, Scope
from efficient.surgery.common import carry, matching


@register("surgery", "dense_to_monarch")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseToMonarch:
    """Projects dense layers onto Monarch matrices; biases are kept.

    Args:
      at: which dense layers, a pattern of whole paths.
      blocks: the number of blocks of each factor.
    """

    at: str
    blocks: int = 4

    def apply(self, model: nnx.Module) -> None:
        for path, layer in matching(model, self.at, lambda m: isinstance(m, Dense)):
            shape, use_bias = layer.kernel.shape, layer.bias is not None
            new = Monarch(Scope(Rules(), path), *shape, use_bias, blocks=self.blocks)
            replace(model, path, new)

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        new = carry(values, model, key)
        for path, layer in modules(model):
            kernel = values.get(f"{path}/kernel")
            if isinstance(layer, Monarch) and kernel is not None:
                check_finite(f"dense_to_monarch: {path}/kernel", kernel)
                factors = layer.project(kernel.astype(jnp.float32))
                new |= {f"{path}/{n}": a.astype(kernel.dtype) for n, a in factors.items()}
        return new


@register("surgery", "monarch_to_dense")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchToDense:
    """Multiplies Monarch factors out into dense kernels; the model's function stays the same.

    Args:
      at: which Monarch layers, a pattern of whole paths; default all.
    """

    at: str = ".*"

    def apply(self, model: nnx.Module) -> None:
        for path, layer in matching(model, self.at, lambda m: isinstance(m, Monarch)):
            shape = layer.in_features, layer.out_features
            replace(model, path, Dense(Scope(Rules(), path), *shape, layer.bias is not None))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        new = carry(values, model, key)
        for path, layer in modules(model):
            right, left = values.get(f"{path}/right"), values.get(f"{path}/left")
            if isinstance(layer, Dense) and right is not None:
                for name, factor in (("right", right), ("left", left)):
                    check_finite(f"monarch_to_dense: {path}/{name}", factor)
                new[f"{path}/kernel"] = monarch_matrix(right, left, *layer.kernel.shape)
        return new
