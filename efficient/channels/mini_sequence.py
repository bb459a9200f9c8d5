"""Mini-Sequence Transformer: Optimizing Intermediate Memory for Long Sequences Training.

Luo et al. 2024, arXiv 2407.15892 (MsT). What is computed for each token alone, the feed-forward
blocks and the head with its loss, is computed for one piece of the sequence at a time, in a loop
whose backward pass computes each piece again. Only one piece's intermediates ([B, T / M, F], or
[B, T / M, V]) live at a time, and values and gradients are those of the whole. Attention is as it
was. The head with its loss is the objective `mini_sequence_loss`.

The reference code cuts into ceil(T / M) tokens, and so does this: where that does not divide T the
last piece is shorter, and runs after the loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient import registry
from efficient.errors import UserError
from efficient.model import fresh, gathered
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, call

PAPER = Paper(
    slug="mini_sequence",
    status="equations",
    claims=(
        Claim(
            "Losses and gradients are those of the whole sequence.",
            "tests/papers/test_mini_sequence.py::test_loss_and_gradients_are_those_of_the_whole",
            True,
        ),
        Claim(
            "Memory of the head and its loss falls with the number of pieces.",
            "tests/papers/test_mini_sequence.py::test_memory_of_the_loss_falls_with_pieces",
            True,
            "temporaries of the compiled program on CPU",
        ),
        Claim(
            "Memory of the feed-forward block falls with the number of pieces.",
            "tests/papers/test_mini_sequence.py::test_memory_of_the_channel_falls_with_pieces",
            True,
            "temporaries of the compiled program on CPU",
        ),
        Claim(
            "Llama 3 8B trains on sequences 12 times as long at the same throughput.",
            note="needs an 80 GB accelerator",
        ),
    ),
    source="https://github.com/wdlctc/mini-s minis/mini_sequence.py",
    departures=(
        "The backward pass of head and loss computes logits again, where the reference code forms"
        " their gradient in the forward pass.",
    ),
)


def over_pieces(fn: Callable, carry: Any, arrays: Any, count: int) -> tuple[Any, Any]:
    """Loops over `count` pieces of the second axis, recomputing each in the backward pass.

    Args:
      fn: (carry, index of the piece, pieces of `arrays`) -> (carry, tree of [B, t, ...]).
      carry: passed from piece to piece.
      arrays: a tree of [B, T, ...]; None leaves stay None.
      count: pieces of ceil(T / count) tokens; the last may be shorter, and there may be fewer.

    Returns:
      The last carry, and the trees joined to [B, T, ...].
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    size = -(-length // count)
    whole = length // size

    def split(a):
        a = a[:, : whole * size]
        return a.reshape(a.shape[0], whole, size, *a.shape[2:]).swapaxes(0, 1)

    def join(a):
        a = a.swapaxes(0, 1)
        return a.reshape(a.shape[0], whole * size, *a.shape[3:])

    def body(carry, item):
        return fn(carry, *item)

    items = jnp.arange(whole), jax.tree.map(split, arrays)
    carry, outs = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, items)
    outs = jax.tree.map(join, outs)
    if whole * size < length:
        rest = jnp.asarray(whole), jax.tree.map(lambda a: a[:, whole * size :], arrays)
        carry, last = jax.checkpoint(body)(carry, rest)
        outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), outs, last)
    return carry, outs


def of_piece(context: Context, index: Array, tokens: dict[str, Array | None]) -> Context:
    """The context of a piece: its own positions, segments and randomness."""
    rng = None if context.rng is None else jax.random.fold_in(context.rng, index)
    return dataclasses.replace(context, rng=rng, **tokens)


@register("channel", "mini_sequence")
class MiniSequence(nnx.Module):
    """A channel mixer that computes the sequence in pieces.

    What it holds is the slot `base`, so `blocks/3/channel/base/up` is a path. Auxiliary outputs
    are averages over the pieces, which for losses over many tokens (expert balance) are not those
    of the whole.

    Args:
      of: the technique in the slot `base`, unless a rule fills it.
      arguments: of that technique.
      pieces: M, at least 1.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        of: str = "mlp",
        arguments: dict | None = None,
        pieces: int = 8,
    ):
        if pieces < 1:
            raise UserError(f"pieces must be at least 1, got {pieces}")
        if registry.find(of, "channel").declares.get("grid"):
            raise UserError(f"{of!r} looks at neighbouring tokens of an image; it cannot be cut")
        self.pieces = pieces
        self.base = scope.channel("base", width, default=(of, dict(arguments or {})))

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        length = x.shape[1]
        if self.pieces == 1 or length == 1:
            return call(self.base, x, context)
        tokens = {"positions": context.positions, "segment_ids": context.segment_ids}
        whole = gathered(self.base)

        def piece(totals, index, arrays):
            base, check = fresh(whole)
            x, tokens = arrays
            y, aux = call(base, x, of_piece(context, index, tokens))
            check()
            share = x.shape[1] / length
            return {name: totals[name] + share * aux[name] for name in totals}, y

        totals = self._zeros(x, context)
        totals, y = over_pieces(piece, totals, (x, tokens), self.pieces)
        return y, totals

    def _zeros(self, x, context):
        """Zeros of the auxiliary outputs, whose names only a call tells."""
        aux = jax.eval_shape(lambda x: call(fresh(self.base)[0], x, context)[1], x)
        return {name: jnp.zeros(s.shape, s.dtype) for name, s in aux.items()}
