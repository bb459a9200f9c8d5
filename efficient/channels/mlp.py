"""The feed-forward block of a Transformer, plain and gated.

Gated linear units: Shazeer 2020, arXiv 2002.05202.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError, nearest
from efficient.linears.matmul import gelu
from efficient.registry import register
from efficient.scope import Context, Scope

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of that name; `gelu` is the tanh approximation."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activated(
    linear: nnx.Module, x: Float[Array, "*B I"], context: Context, name: str
) -> Float[Array, "*B O"]:
    """act(linear(x)), by the linear itself where it lists that activation in `fuses`.

    Not in training, where the gradient would need the argument of the activation, and so the
    product, once more.
    """
    if not context.train and name in getattr(linear, "fuses", ()):
        return linear(x, context, activation=name)
    return activation(name)(linear(x, context))


@register("channel", "mlp")
class MLP(nnx.Module):
    """down(act(up(x))); `hidden` defaults to four times the width."""

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "gelu",
        bias: bool = False,
    ):
        hidden = 4 * width if hidden is None else hidden
        self.activation = activation
        _ = self.act  # an unknown name fails here, not at the first call
        self.up = scope.linear("up", width, hidden, bias)
        self.down = scope.linear("down", hidden, width, bias)

    @property
    def act(self) -> Callable[[Array], Array]:
        return activation(self.activation)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        return self.down(activated(self.up, x, context, self.activation), context)


@register("channel", "glu")
class GLU(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU with `silu`, GeGLU with `gelu`.

    `hidden` defaults to 8/3 of the width rounded up to a multiple of 64, so that the parameters
    are those of an MLP of four times the width.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        hidden: int | None = None,
        activation: str = "silu",
        bias: bool = False,
    ):
        hidden = -(-8 * width // 3 // 64) * 64 if hidden is None else hidden
        self.activation = activation
        _ = self.act
        self.gate = scope.linear("gate", width, hidden, bias)
        self.up = scope.linear("up", width, hidden, bias)
        self.down = scope.linear("down", hidden, width, bias)

    @property
    def act(self) -> Callable[[Array], Array]:
        return activation(self.activation)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        gate = activated(self.gate, x, context, self.activation)
        return self.down(gate * self.up(x, context), context)
