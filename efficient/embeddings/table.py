"""Token embedding by a table, and positions: learned, or none (RoPE belongs to attention)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.init import Normal
from efficient.registry import register
from efficient.scope import Context, Scope, param


@register("embedding", "table")
class Table(nnx.Module):
    """One row of `table` [V, D] a token.

    Args:
      init_std: standard deviation of the rows.
      scale_by_width: multiplies embeddings by sqrt(D), as Gemma does.
    """

    def __init__(
        self,
        scope: Scope,
        vocab_size: int,
        width: int,
        *,
        init_std: float = 0.02,
        scale_by_width: bool = False,
    ):
        self.name = scope.name
        self.table = param((vocab_size, width), Normal(init_std))
        self.scale = math.sqrt(width) if scale_by_width else 1.0

    def __call__(self, tokens: Int[Array, "B T"], context: Context) -> Float[Array, "B T D"]:
        x = context.rows(self.name, self.table[...], tokens)
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, x.dtype)

    def attend(self, x: Float[Array, "*B D"], context: Context) -> Float[Array, "*B V"]:
        """Logits of a head that is tied to the table."""
        del context
        return jax.lax.dot_general(x, self.table[...], (((x.ndim - 1,), (1,)), ((), ())))


@register("position", "no_position")
class NoPosition(nnx.Module):
    """Adds nothing."""

    def __init__(self, scope: Scope, width: int, max_length: int):
        del scope, width, max_length

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        del context
        return x


@register("position", "learned")
class LearnedPosition(nnx.Module):
    """Adds a learned row of `table` [max_length, D] for each position."""

    def __init__(self, scope: Scope, width: int, max_length: int, *, init_std: float = 0.02):
        del scope
        self.table = param((max_length, width), Normal(init_std))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        length, limit = x.shape[1], self.table.shape[0]
        if length > limit:
            raise UserError(
                f"{length} positions but learned positions for {limit}; raise model.max_length"
            )
        if context.positions is None:
            return x + self.table[...][:length]
        return x + jnp.take(self.table[...], context.positions, axis=0)
