"""BASIC's contrastive loss of a large batch in the memory of a microbatch.

Pham et al. 2021, arXiv 2111.10050. Of images x_i and texts y_i of a batch of B pairs, embedded
with unit length, and an inverse temperature s,

    loss = mean_i [ CE(s x_i . y_j over j, i) + CE(s y_i . x_j over j, i) ] / 2

so the loss of a pair depends on all others, and averaging the gradients of microbatches is
another loss, with fewer negatives. Here the gradient is exact, in three steps of which each holds
the activations of a microbatch only:

    1. x, y of every microbatch, no activations kept
    2. the loss, and its gradients with respect to x, y and s
    3. each microbatch again, forward and backward from the gradients of its x and y, summed

which is what differentiating a loop of rematerialized microbatches does. The price is one more
forward pass. Similarities [B, B] are not held either: they come a microbatch of rows at a time.

What is random is drawn by each microbatch for itself, the same when it is computed again. Auxiliary
losses of the towers are means over microbatches, which for losses over many tokens (expert balance)
are not those of the whole.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.model import fresh, gathered
from efficient.objectives.likelihood import auxiliary_loss, cross_entropy, weighted_mean
from efficient.papers import Claim, Paper
from efficient.parallel.placement import split_batch
from efficient.registry import register
from efficient.scope import Context
from pallas_kernels.mesh import constrain

PAPER = Paper(
    slug="basic",
    status="equations",
    claims=(
        Claim(
            "Loss and gradients are those of the whole batch.",
            "tests/papers/test_basic.py::test_gradients_are_those_of_the_whole_batch",
            True,
        ),
        Claim(
            "Accumulating gradients of microbatches is another loss, with another gradient.",
            "tests/papers/test_basic.py::test_accumulated_gradients_are_of_another_loss",
            True,
        ),
        Claim(
            "Memory falls to that of a microbatch.",
            "tests/papers/test_basic.py::test_memory_is_that_of_a_microbatch",
            True,
            "temporaries of the compiled program on CPU",
        ),
        Claim(
            "The price is one more forward pass.",
            "tests/papers/test_basic.py::test_the_price_is_one_more_forward_pass",
            True,
            "products counted in the program",
        ),
        Claim("85.7 percent zero-shot on ImageNet.", note="needs 6.6 billion pairs"),
    ),
    source="the abstract, and the README of Gradient Cache (arXiv 2101.06983, luyug/GradCache),"
    " which computes the same gradient; the paper's text was not read. The bounds of the"
    " temperature are CLIP's (arXiv 2103.00020)",
    departures=(
        "The paper's model parallelism is left to the mesh.",
        "Similarities too are computed a microbatch of rows at a time.",
    ),
)


def pair_loss(
    x: Float[Array, "P R E"],
    y: Float[Array, "P R E"],
    scale: Float[Array, ""] | float,
    weight: Float[Array, "P R"] | None = None,
    everywhere: NamedSharding | None = None,
) -> tuple[Float[Array, "P R"], Int[Array, "P R"]]:
    """Cross-entropy of each pair among all B = P R, the mean of both directions, and the number,
    0 to B - 1, of the y nearest to each x.

    Similarities are computed for R rows at a time; of several pieces again in the backward pass.

    Args:
      x, y: float32 unit embeddings in P pieces; those at one place are a pair.
      scale: s.
      weight: pairs of weight 0 are no one's negatives.
      everywhere: the layout of an array that every device has, where rows R are split over them.
    """
    pieces, rows, size = x.shape
    all_x, all_y = (a.reshape(-1, size) for a in (x, y))
    if everywhere is not None:
        all_x, all_y = (constrain(a, everywhere) for a in (all_x, all_y))
    absent = 0.0 if weight is None else jnp.where(weight.ravel() > 0, 0.0, -jnp.inf)

    def piece(index, x, y):
        own = index * rows + jnp.arange(rows)
        # A row of weight 0 keeps itself, so that its loss, which counts for nothing, is finite.
        kept = jnp.where(jnp.arange(pieces * rows) == own[:, None], 0.0, absent)
        to_text = scale * x @ all_y.T + kept
        to_image = scale * y @ all_x.T + kept
        losses = (cross_entropy(to_text, own) + cross_entropy(to_image, own)) / 2
        return losses, to_text.argmax(axis=-1)

    if pieces > 1:
        piece = jax.checkpoint(piece, prevent_cse=False)
    return jax.lax.map(lambda item: piece(*item), (jnp.arange(pieces), x, y))


@register("objective", "contrastive", coupled=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
    """The symmetric contrastive loss of a `dual_encoder` over all pairs of the batch.

    On a mesh the pairs of all devices are contrasted: embeddings and labels are gathered.

    Args:
      microbatches: the towers see batch_size / microbatches pairs at a time, 1 for all at once.
        Where nothing is random it changes memory and time, and numbers by rounding alone;
        `config.accumulate` would change the loss, and is refused.
    """

    microbatches: int = 1

    def __post_init__(self):
        if self.microbatches < 1:
            raise UserError(f"microbatches must be at least 1, got {self.microbatches}")

    def __call__(self, model, batch, context: Context):
        """(loss in nats a pair, metrics): `accuracy` is how often an image finds its text, or one
        of the same `label` [B] where the data gives that.

        Both depend on the number of pairs in a batch. `weight` is that number.
        """
        if not hasattr(model, "embeddings"):
            raise UserError("the objective 'contrastive' needs config.model.name='dual_encoder'")
        # Microbatches take rows from all devices, so the pairs are reordered; all of them alike.
        pieces = self._split(batch, context)
        x, y, aux = self._embed(model, pieces, context)
        weight, placement = pieces.get("weight"), context.placement
        spread = placement is not None and placement.mesh.size > 1
        everywhere = placement.replicated if spread else None
        losses, nearest = pair_loss(x, y, model.scale(), weight, everywhere)
        label = pieces.get("label", jnp.arange(losses.size).reshape(losses.shape))
        hits = (label.ravel()[nearest] == label).astype(jnp.float32)
        loss, count = weighted_mean(losses, weight)
        metrics = {"loss": loss, "accuracy": weighted_mean(hits, weight)[0], "weight": count}
        return loss + auxiliary_loss(aux), metrics | aux

    def _split(self, batch, context):
        size = len(batch["image"])
        ways = 1 if context.placement is None else context.placement.batch_ways
        if size % (self.microbatches * ways):
            raise UserError(
                f"a batch of {size} pairs does not divide into objective.microbatches="
                f"{self.microbatches} over {ways} devices (mesh data x fsdp); change one of them"
            )
        return split_batch(batch, self.microbatches, context.placement)

    def _embed(self, model, pieces, context):
        """Embeddings [P, R, E] of both, and the means over pieces of auxiliary outputs."""
        if self.microbatches == 1:
            x, y, aux = model.embeddings(jax.tree.map(lambda a: a[0], pieces), context)
            return x[None], y[None], aux
        whole = gathered(model)

        def piece(index, batch):
            copy, check = fresh(whole)
            out = copy.embeddings(batch, context.layer(index))
            check()
            return out

        piece = jax.checkpoint(piece, prevent_cse=False)
        items = jnp.arange(self.microbatches), pieces
        x, y, aux = jax.lax.map(lambda item: piece(*item), items)
        return x, y, jax.tree.map(lambda a: a.mean(axis=0), aux)
