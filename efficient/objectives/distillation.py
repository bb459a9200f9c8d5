"""Distillation: a student learns what a teacher would say, beside what is right.

"Distilling the Knowledge in a Neural Network", Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
With q_T = softmax(logits / T) of the teacher and p_T of the student

    loss = (1 - w) CE(label, p_1) + w T^2 KL(q_T || p_T)

(section 2 has the cross-entropy with q_T, which differs by the teacher's entropy, a constant). The
teacher is a `companion` of the model, and nothing in it is random or trained.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.objectives.likelihood import (
    auxiliary_loss,
    cross_entropy,
    token_weights,
    weighted_mean,
)
from efficient.registry import register
from efficient.scope import Context


def divergence(
    teacher: Float[Array, "*B V"], student: Float[Array, "*B V"], temperature: float
) -> Float[Array, "*B"]:
    """KL(softmax(teacher / T) || softmax(student / T)) in nats, float32."""
    scaled = (logits.astype(jnp.float32) / temperature for logits in (teacher, student))
    q, p = map(jax.nn.log_softmax, scaled)
    return (jnp.exp(q) * (q - p)).sum(axis=-1)


@register("objective", "distillation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """Next tokens or labels, and the logits of a teacher.

    Args:
      weight: w.
      temperature: T.
      teacher: how the `companion` is called.
    """

    weight: float = 0.5
    temperature: float = 2.0
    teacher: str = "teacher"

    def __post_init__(self):
        if not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise UserError(
                "distillation: weight must be 0 to 1 and temperature above 0, got"
                f" {self.weight} and {self.temperature}"
            )

    def __call__(self, model, batch, context: Context):
        """(loss, metrics): `loss` is the cross-entropy, `divergence` T^2 times the KL."""
        teacher = getattr(model, self.teacher, None)
        if teacher is None:
            raise UserError(
                f"distillation: the model has no {self.teacher!r}; begin the phase's surgery with"
                f" {{'name': 'companion', 'called': {self.teacher!r}}}"
            )
        quiet = dataclasses.replace(context, train=False, rng=None)
        known = jax.lax.stop_gradient(teacher.logits(teacher.features(batch, quiet)[0], quiet))
        h, aux = model.features(batch, context)
        logits = model.logits(h, context)
        tokens = "targets" in batch
        target = batch["targets"] if tokens else batch["label"]
        weights = token_weights(batch) if tokens else batch.get("weight")
        loss, weight = weighted_mean(cross_entropy(logits, target), weights)
        apart, _ = weighted_mean(divergence(known, logits, self.temperature), weights)
        apart = self.temperature**2 * apart
        hit = (logits.argmax(axis=-1) == target).astype(jnp.float32)
        metrics = {"loss": loss, "divergence": apart, "weight": weight}
        metrics["accuracy"] = weighted_mean(hit, weights)[0]
        total = (1 - self.weight) * loss + self.weight * apart
        return total + auxiliary_loss(aux), metrics | aux
