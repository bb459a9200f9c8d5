"""Solution operators of parametric equations: data [B, I] and parameters [B, P] -> field [B, O].

`Stacked` is the network of Wagner 2023 (arXiv 2312.14979), K linear maps of the data whose weights
depend on the parameters. `Network` is a plain one that reads both at once, for comparison. Any
technique for a linear fits.

Paths: `maps/<k>`, `embed/<i>` and `mix`; `layers/<i>` of the plain one.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.model import walk
from efficient.scope import Context, Scope

Batch = Mapping[str, Array]


def _inputs(model: nnx.Module, batch: Batch) -> list[Array]:
    """Data and parameters in the dtype that the model computes in."""
    dtypes = (variable.dtype for _, variable in walk(model))
    dtype = next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    return [batch[name].astype(dtype) for name in ("data", "parameters")]


class Stacked(nnx.Module):
    """sum_k softmax(e(parameters))_k M_k(data); e is a network of ReLU layers, M_k are linears.

    Args:
      in_features, out_features: I and O.
      parameters: P.
      stacks: K.
      hidden, depth: units and layers of e.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        in_features: int,
        out_features: int,
        parameters: int,
        stacks: int = 8,
        hidden: int = 30,
        depth: int = 8,
    ):
        if min(stacks, hidden, depth) < 1:
            raise UserError(
                f"stacks, hidden and depth must be 1 or more, got {stacks}, {hidden} and {depth}"
            )
        maps = [scope.linear(f"maps/{k}", in_features, out_features) for k in range(stacks)]
        sizes = [parameters] + [hidden] * depth
        pairs = enumerate(itertools.pairwise(sizes))
        self.maps = nnx.List(maps)
        self.embed = nnx.List([scope.linear(f"embed/{i}", a, b, True) for i, (a, b) in pairs])
        self.mix = scope.linear("mix", hidden, stacks, True)

    def weights(self, parameters: Float[Array, "B P"], context: Context) -> Float[Array, "B K"]:
        """How much each map counts; they sum to 1."""
        h = parameters
        for layer in self.embed:
            h = jax.nn.relu(layer(h, context))
        return jax.nn.softmax(self.mix(h, context).astype(jnp.float32))

    def __call__(self, batch: Batch, context: Context) -> Float[Array, "B O"]:
        data, parameters = _inputs(self, batch)
        weights, total = self.weights(parameters, context), 0.0
        for k, linear in enumerate(self.maps):
            total = total + weights[:, k, None] * linear(data, context)
        return total


class Network(nnx.Module):
    """ReLU layers over data and parameters side by side.

    Args:
      in_features, out_features: I and O.
      parameters: P.
      hidden, depth: units and number of hidden layers.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        in_features: int,
        out_features: int,
        parameters: int,
        hidden: int = 64,
        depth: int = 1,
    ):
        if min(hidden, depth) < 1:
            raise UserError(f"hidden and depth must be 1 or more, got {hidden} and {depth}")
        sizes = [in_features + parameters] + [hidden] * depth + [out_features]
        pairs = enumerate(itertools.pairwise(sizes))
        self.layers = nnx.List([scope.linear(f"layers/{i}", a, b, True) for i, (a, b) in pairs])

    def __call__(self, batch: Batch, context: Context) -> Float[Array, "B O"]:
        h = jnp.concatenate(_inputs(self, batch), axis=-1)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h, context))
        return self.layers[-1](h, context).astype(jnp.float32)
