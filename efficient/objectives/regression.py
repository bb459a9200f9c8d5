"""Least squares: a field that the model predicts, against the one that is known."""

import dataclasses

import jax.numpy as jnp

from efficient.objectives.likelihood import weighted_mean
from efficient.registry import register
from efficient.scope import Context


@register("objective", "regression")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """The mean square of model(batch) - `target`, [B, O]."""

    def __call__(self, model, batch, context: Context):
        """(loss, metrics): `relative_error` is the mean over examples of |error| / |target|."""
        target = batch["target"].astype(jnp.float32)
        error = model(batch, context).astype(jnp.float32) - target
        loss, weight = weighted_mean(jnp.square(error).mean(axis=-1), batch.get("weight"))
        size, whole = (jnp.sqrt(jnp.square(a).sum(axis=-1)) for a in (error, target))
        share = size / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)
        relative, _ = weighted_mean(share, batch.get("weight"))
        return loss, {"loss": loss, "relative_error": relative, "weight": weight}
