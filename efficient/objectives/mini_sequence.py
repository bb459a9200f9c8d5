"""The next-token loss of a Mini-Sequence Transformer: the logits of a piece at a time.

Luo et al. 2024, arXiv 2407.15892; see `efficient.channels.mini_sequence` for the paper's record.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efficient.channels.mini_sequence import of_piece, over_pieces
from efficient.errors import UserError
from efficient.model import fresh, gathered
from efficient.objectives.likelihood import auxiliary_loss, cross_entropy, token_weights
from efficient.registry import register
from efficient.scope import Context


@register("objective", "mini_sequence_loss")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniSequenceLoss:
    """`next_token` without ever holding logits [B, T, V]: [B, ceil(T / pieces), V] at most.

    Args:
      pieces: M; at the vocabulary over the width the logits of a piece are as large as the
        hidden states.
      z_loss: weight of mean(log_normalizer^2).
    """

    pieces: int = 16
    z_loss: float = 0.0

    def __post_init__(self):
        if self.pieces < 1:
            raise UserError(f"pieces must be at least 1, got {self.pieces}")

    def __call__(self, model, batch, context: Context):
        """(loss in nats a token, metrics; `weight` is the number of tokens they are means of)."""
        h, aux = model.features(batch, context)
        h = context.place(h, "inputs", gradient="tokens")  # once, not in every piece
        targets, weights = batch["targets"], token_weights(batch)
        weights = jnp.ones(targets.shape) if weights is None else weights
        weights = jnp.broadcast_to(weights.astype(jnp.float32), targets.shape)

        whole = gathered(model)

        def piece(sums, index, arrays):
            head, check = fresh(whole)
            h, targets, weights = arrays
            logits = head.logits(h, of_piece(context, index, {}))
            check()
            terms = {"loss": cross_entropy(logits, targets)}
            terms["accuracy"] = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
            if self.z_loss:
                terms["z"] = jax.nn.logsumexp(logits, axis=-1) ** 2
            return {name: sums[name] + (terms[name] * weights).sum() for name in sums}, None

        names = ("loss", "accuracy", "z") if self.z_loss else ("loss", "accuracy")
        sums = dict.fromkeys(names, jnp.zeros((), jnp.float32))
        sums, _ = over_pieces(piece, sums, (h, targets, weights), self.pieces)
        weight = weights.sum()
        means = {name: value / jnp.maximum(weight, 1e-9) for name, value in sums.items()}
        total = means["loss"] + self.z_loss * means.pop("z", 0.0) + auxiliary_loss(aux)
        return total, means | {"weight": weight} | aux
