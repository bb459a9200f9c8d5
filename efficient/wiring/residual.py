"""Pre-norm and post-norm residual blocks, and the sandwich of both (Gemma 2).

A wiring owns its mixer, channel mixer and norms, so that where a norm sits, what is skipped and
what is scaled are one file's decision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.init import Constant
from efficient.linears.layout import by_rows
from efficient.registry import register
from efficient.scope import Context, Scope, call, param


def drop_path(x: Float[Array, "B T D"], rate: float, context: Context, name: str) -> Array:
    """Stochastic depth: drops the whole branch of an example with probability `rate`.

    Huang et al. 2016, arXiv 1603.09382. The survivors are divided by 1 - rate.
    """
    key = context.key(name)
    if rate == 0.0 or not context.train or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class Block(nnx.Module):
    """What the wirings below share: the two sublayers and a one-token form."""

    def __init__(self, scope: Scope, width: int, causal: bool):
        self.mixer = scope.mixer("mixer", width, causal)
        self.channel = scope.channel("channel", width)

    def __call__(self, x: Any, context: Context):
        """x [B, T, D], or what a wiring of its own `begin` and `finish` carries in its place."""
        aux: dict[str, Array] = {}

        def mix(y):
            y, more = call(self.mixer, _enter(self.mixer, y, context), context)
            aux.update(more)
            return _leave(self.mixer, y, context)

        def transform(y):
            y, more = call(self.channel, _enter(self.channel, y, context), context)
            aux.update(more)
            return _leave(self.channel, y, context)

        return self.wire(x, mix, transform, context), aux

    def init_state(self, batch: int, length: int, dtype):
        """The mixer's decoding state."""
        return self.mixer.init_state(batch, length, dtype)

    def step(self, x: Any, state, context: Context):
        """One new token with the mixer's state."""
        new = state

        def mix(y):
            nonlocal new
            y, new = self.mixer.step(y, state, context)
            return y

        def transform(y):
            return call(self.channel, y, context)[0]

        return self.wire(x, mix, transform, context), new

    def wire(self, x, mix, transform, context):
        """x [B, T, D] -> [B, T, D], given the two sublayers as functions."""
        raise NotImplementedError(f"{type(self).__name__} must define wire")


@register("wiring", "pre_norm")
class PreNorm(Block):
    """x + mixer(norm(x)), then x + channel(norm(x)).

    Args:
      layer_scale: initial value of a learned scale [D] on each branch (CaiT); None for no scale.
      drop_path: probability that a branch is dropped for an example while training.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__(scope, width, causal)
        self.mixer_norm = scope.norm("mixer_norm", width)
        self.channel_norm = scope.norm("channel_norm", width)
        self.name, self.rate = scope.name, drop_path
        scaled = layer_scale is not None
        self.mixer_scale = param((width,), Constant(layer_scale)) if scaled else None
        self.channel_scale = param((width,), Constant(layer_scale)) if scaled else None

    def wire(self, x, mix, transform, context):
        y = _scaled(mix(self.mixer_norm(x, context)), self.mixer_scale)
        x = x + drop_path(y, self.rate, context, f"{self.name}/mixer")
        y = _scaled(transform(self.channel_norm(x, context)), self.channel_scale)
        return x + drop_path(y, self.rate, context, f"{self.name}/channel")


@register("wiring", "post_norm")
class PostNorm(Block):
    """norm(x + mixer(x)), then norm(x + channel(x)): the original Transformer."""

    def __init__(self, scope: Scope, width: int, causal: bool):
        super().__init__(scope, width, causal)
        self.mixer_norm = scope.norm("mixer_norm", width)
        self.channel_norm = scope.norm("channel_norm", width)

    def wire(self, x, mix, transform, context):
        x = self.mixer_norm(x + mix(x), context)
        return self.channel_norm(x + transform(x), context)


@register("wiring", "sandwich_norm")
class SandwichNorm(Block):
    """x + norm(mixer(norm(x))), then the same for the channel mixer."""

    def __init__(self, scope: Scope, width: int, causal: bool):
        super().__init__(scope, width, causal)
        self.mixer_norm = scope.norm("mixer_norm", width)
        self.mixer_out_norm = scope.norm("mixer_out_norm", width)
        self.channel_norm = scope.norm("channel_norm", width)
        self.channel_out_norm = scope.norm("channel_out_norm", width)

    def wire(self, x, mix, transform, context):
        x = x + self.mixer_out_norm(mix(self.mixer_norm(x, context)), context)
        return x + self.channel_out_norm(transform(self.channel_norm(x, context)), context)


def _enter(part: nnx.Module, y: Array, context: Context) -> Array:
    """From where residuals lie to what a sublayer reads, and its derivative back."""
    return context.place(y, _read_at(part), gradient="tokens")


def _leave(part: nnx.Module, y: Array, context: Context) -> Array:
    """The reverse, so that sums over devices end in the parts of the residual."""
    return context.place(y, "tokens", gradient=_read_at(part))


def _read_at(part: nnx.Module) -> str:
    return "tokens" if by_rows(part) else "inputs"


def _scaled(x: Array, scale: nnx.Param | None) -> Array:
    return x if scale is None else x * scale[...].astype(x.dtype)
