"""An image tower and a text tower whose embeddings of a matching pair agree, as in CLIP and BASIC.

Paths: `image/...` as in `models.vision`, whose `image/head` projects; `text/...` as in
`models.decoder`, `text_head`, and `log_scale`, the logarithm of the learned inverse temperature.
"""

import math
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import Constant
from efficient.objectives.likelihood import last_token
from efficient.scope import Context, Scope, param
from models.decoder import Decoder
from models.vision import Vision

MOST_SCALE = 100.0  # of the learned inverse temperature, and what it begins with, as in CLIP
FIRST_SCALE = 1 / 0.07


class DualEncoder(nnx.Module):
    """image [B, height, width, channels], tokens [B, T] -> unit embeddings [B, E] of each.

    The text tower is causal and is read at the last token, before padding of segment 0.

    Args:
      image_size, channels, stages, pooling: of the image tower, as of `vision`.
      vocab_size, max_length: of the text.
      text: {width, depth} of the text tower.
      embedding: E.
      remat, scan_from: of both towers' blocks.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        image_size: int | tuple[int, int],
        channels: int,
        stages: list[dict],
        vocab_size: int,
        max_length: int,
        text: dict,
        embedding: int,
        pooling: Literal["mean", "class_token"] = "mean",
        remat: str = "none",
        scan_from: int = 6,
    ):
        if embedding < 1:
            raise UserError(f"config.model.embedding must be 1 or more, got {embedding}")
        if set(text) != {"width", "depth"}:
            raise UserError(f"config.model.text must give width and depth, got {dict(text)}")
        self.image = Vision(
            scope.at("image"),
            image_size=image_size,
            channels=channels,
            num_classes=embedding,
            stages=stages,
            pooling=pooling,
            remat=remat,
            scan_from=scan_from,
        )
        self.text = Decoder(
            scope.at("text"),
            vocab_size=vocab_size,
            max_length=max_length,
            remat=remat,
            scan_from=scan_from,
            **text,
        )
        self.text_head = scope.linear("text_head", text["width"], embedding)
        self.log_scale = param((), Constant(math.log(FIRST_SCALE)))

    def embeddings(
        self, batch: Mapping[str, Array], context: Context
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"], dict]:
        """Float32 unit embeddings of the images and of the texts; auxiliary outputs of both."""
        h, aux = self.image.features(batch, context)
        image = self.image.logits(h, context)
        h, of_text = self.text.features(batch, context)
        text = self.text_head(last_token(h, batch), context).astype(jnp.float32)
        for name, value in of_text.items():
            aux[name] = aux.get(name, 0.0) + value
        return unit(image), unit(text), aux

    def scale(self) -> Float[Array, ""]:
        """The inverse temperature that multiplies similarities, float32, at most 100."""
        return jnp.minimum(jnp.exp(self.log_scale[...].astype(jnp.float32)), MOST_SCALE)


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows of length 1; a row of zeros stays."""
    return x / jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
