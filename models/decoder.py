"""A decoder-only Transformer of slots; GPT-2, Llama and Gemma are configs of it.

Paths: `embed`, `position`, `blocks/<i>` (a wiring that holds `mixer`, `channel` and its norms),
`final_norm`, and `head` where it is not tied to `embed`.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.model import Stack
from efficient.scope import Context, Scope

Batch = Mapping[str, Array]


class Decoder(nnx.Module):
    """tokens [B, T] -> logits [B, T, V].

    Args:
      vocab_size: V.
      width: D.
      depth: number of blocks.
      max_length: the longest sequence; sizes learned positions and decoding caches.
      tied: whether the head shares the embedding's table.
      logit_softcap: logits become c * tanh(logits / c); None for none (Gemma 2).
      remat: `none`, `dots`, `products` or `full`: what a block's backward pass computes again.
      scan_from: alike neighbouring blocks are scanned when there are at least this many.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        vocab_size: int,
        width: int,
        depth: int,
        max_length: int,
        tied: bool = True,
        logit_softcap: float | None = None,
        remat: str = "none",
        scan_from: int = 6,
    ):
        sizes = {"vocab_size": vocab_size, "width": width, "depth": depth, "max_length": max_length}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"config.model.{name} must be 1 or more, got {size}")
        self.max_length, self.logit_softcap, self.causal = max_length, logit_softcap, True
        self.embed = scope.fill("embedding", "embed", vocab_size, width)
        self.position = scope.fill("position", "position", width, max_length)
        blocks = [scope.fill("wiring", f"blocks/{i}", width, True) for i in range(depth)]
        self.blocks = Stack(blocks, remat, scan_from)
        self.final_norm = scope.norm("final_norm", width)
        self.head = None if tied else scope.linear("head", width, vocab_size)
        if tied and not hasattr(self.embed, "attend"):
            raise UserError("this embedding cannot be tied to the head; set model.tied=False")

    def features(self, batch: Batch, context: Context) -> tuple[Float[Array, "B T D"], dict]:
        """Final hidden states and the auxiliary outputs of the blocks."""
        context = dataclasses.replace(
            context, positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
        )
        # Whole sequences of rows first: each device looks up its part of the vocabulary.
        x = context.place(self.embed(batch["tokens"], context), "inputs")
        x = self.position(context.place(x), context)
        x, aux = self.blocks(x, context)
        return self.final_norm(x, context), aux

    def logits(self, h: Float[Array, "*B D"], context: Context) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states."""
        if h.ndim == 3:
            h = context.place(h, "inputs", gradient="tokens")
        out = self.head(h, context) if self.head is not None else self.embed.attend(h, context)
        out = out.astype(jnp.float32)
        if self.logit_softcap is not None:
            out = self.logit_softcap * jnp.tanh(out / self.logit_softcap)
        return context.place(out, "logits") if out.ndim == 3 else out

    def __call__(self, batch: Batch, context: Context) -> Float[Array, "B T V"]:
        return self.logits(self.features(batch, context)[0], context)

    def init_state(self, batch: int, length: int, dtype=jnp.float32):
        """Decoding state for up to `length` tokens."""
        return jnp.zeros((), jnp.int32), self.blocks.init_state(batch, length, dtype)

    def step(self, tokens: Array, state, context: Context):
        """One new token each: tokens [B, 1] -> (logits [B, V], state)."""
        index, states = state
        context = dataclasses.replace(context, positions=jnp.full(tokens.shape, index))
        x = self.position(self.embed(tokens, context), context)
        x, states = self.blocks.step(x, states, context)
        h = self.final_norm(x, context)
        return self.logits(h[:, 0], context), (index + 1, states)
