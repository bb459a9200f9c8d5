"""Maximum likelihood: of the next token, and of a class."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient.registry import register
from efficient.scope import Context


def cross_entropy(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], smoothing: float = 0.0
) -> Float[Array, "*B"]:
    """-log softmax(logits)[target] in nats, float32; `smoothing` mixes in the uniform target.

    Of logits that are split over V each device sums and looks up its own part, and a few numbers
    a token are summed over devices.
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    log_normalizer = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
    if jax.sharding.get_abstract_mesh().manual_axes:
        # In a pipeline's stage XLA's partitioner aborts on a gather along a split axis. Elsewhere
        # that takes one array of the logits' size less.
        classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
        at_target = jnp.sum(jnp.where(classes == targets[..., None], logits, 0.0), axis=-1)
    else:
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if smoothing:
        at_target = (1 - smoothing) * at_target + smoothing * logits.mean(axis=-1)
    return log_normalizer - at_target


def weighted_mean(values: Float[Array, "*B"], weights: Float[Array, "*B"] | None):
    """The mean of `values` under `weights`, and the sum of the weights (0 / 0 gives 0)."""
    if weights is None:
        return values.mean(), jnp.asarray(values.size, jnp.float32)
    weights = jnp.broadcast_to(weights.astype(jnp.float32), values.shape)
    total = weights.sum()
    return (values * weights).sum() / jnp.maximum(total, 1e-9), total


def auxiliary_loss(aux: dict[str, Array]) -> Float[Array, ""] | float:
    """The sum of the losses that parts of the model have returned (`loss/...`)."""
    return sum((v for name, v in aux.items() if name.startswith("loss/")), start=0.0)


@register("objective", "next_token")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of targets [B, T] under the model's logits; weights [B, T] are optional.

    Args:
      z_loss: weight of mean(log_normalizer^2), which keeps logits from drifting (PaLM).
    """

    z_loss: float = 0.0

    def __call__(self, model, batch, context: Context):
        """(loss in nats a token, metrics; `weight` is the number of tokens they are means of)."""
        h, aux = model.features(batch, context)
        logits = model.logits(h, context)
        loss = cross_entropy(logits, batch["targets"])
        weights = token_weights(batch)
        mean, weight = weighted_mean(loss, weights)
        hit = (logits.argmax(axis=-1) == batch["targets"]).astype(jnp.float32)
        metrics = {"loss": mean, "accuracy": weighted_mean(hit, weights)[0], "weight": weight}
        total = mean + auxiliary_loss(aux)
        if self.z_loss:
            normalizer = jax.nn.logsumexp(logits, axis=-1)
            total = total + self.z_loss * weighted_mean(normalizer**2, weights)[0]
        return total, metrics | aux


@register("objective", "classification")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy of `label` [B] under the model's logits [B, classes].

    Of a language model the class is read as its next token is: at the last token of the example,
    which with `segment_ids` is the last one that is not 0.
    """

    label_smoothing: float = 0.0

    def __call__(self, model, batch, context: Context):
        """(loss in nats an example, metrics; `weight` is the number of examples)."""
        logits, aux = class_logits(model, batch, context)
        loss = cross_entropy(logits, batch["label"], self.label_smoothing)
        mean, weight = weighted_mean(loss, batch.get("weight"))
        hit = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
        accuracy = weighted_mean(hit, batch.get("weight"))[0]
        metrics = {"loss": mean, "accuracy": accuracy, "weight": weight}
        return mean + auxiliary_loss(aux), metrics | aux


def class_logits(model, batch, context: Context) -> tuple[Float[Array, "B C"], dict]:
    """Logits of the class of each example, at its last token if it is of tokens; and `aux`."""
    h, aux = model.features(batch, context)
    return model.logits(last_token(h, batch) if "tokens" in batch else h, context), aux


def last_token(h: Float[Array, "B T D"], batch) -> Float[Array, "B D"]:
    """Hidden states of the last token of each example, before the padding of segment 0."""
    if "segment_ids" not in batch:
        return h[:, -1]
    positions = jnp.arange(h.shape[1])
    last = jnp.where(batch["segment_ids"] > 0, positions, 0).max(axis=-1)
    return jnp.take_along_axis(h, last[:, None, None], axis=1)[:, 0]


def token_weights(batch) -> Float[Array, "B T"] | None:
    """Weights of tokens: where the data gives them, times those of padded examples."""
    weights, rows = batch.get("weights"), batch.get("weight")
    if rows is None:
        return weights
    rows = jnp.broadcast_to(rows[:, None], batch["targets"].shape)
    return rows if weights is None else weights * rows
