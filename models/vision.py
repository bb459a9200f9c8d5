"""An image classifier of slots; ViT and PoolFormer are configs of it.

Paths: `class_token` (where pooling uses one), `stages/<i>/patch`, `stages/0/position`,
`stages/<i>/blocks/<j>` (a wiring that holds `mixer`, `channel` and its norms), `final_norm`,
`head`. One stage is a ViT (Dosovitskiy et al. 2020, arXiv 2010.11929); several, each of which
downsamples by its patch embedding, are a hierarchy such as PoolFormer's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError, nearest
from efficient.init import ZEROS, FanIn, Normal
from efficient.model import Stack
from efficient.scope import Context, Scope, param

Batch = Mapping[str, Array]
Aux = dict[str, Array]
STAGE_KEYS = ("width", "depth", "kernel", "stride", "padding")


def patch_grid(size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(height, width) of the tokens that a convolution makes of an image of `size`."""
    height, width = ((n + 2 * padding - kernel) // stride + 1 for n in size)
    if min(height, width) < 1:
        raise UserError(f"a kernel of {kernel} is larger than its input of {size[0]}x{size[1]}")
    return height, width


class PatchEmbed(nnx.Module):
    """[B, h, w, C] -> [B, h', w', D]: a strided convolution with bias.

    Patches that neither overlap nor are padded are cut by a reshape, so that the product is one
    matrix multiplication on every platform; the kernel [kernel, kernel, C, D] is the same.
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int, padding: int):
        self.kernel = param((kernel, kernel, channels, width), FanIn(axes=(-4, -3, -2)))
        self.bias = param((width,), ZEROS)
        self.size, self.stride, self.padding = kernel, stride, padding

    def __call__(self, x: Float[Array, "B h w C"], context: Context) -> Array:
        del context
        kernel = self.kernel[...]
        x = x.astype(kernel.dtype)
        if self.size == self.stride and not self.padding:
            return cut_patches(x, self.size) @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...]


def cut_patches(x: Float[Array, "B h w C"], size: int) -> Float[Array, "B y x P"]:
    """Non-overlapping patches, each flattened to P = size * size * C in the order (row, col, C).

    Rows and columns beyond the last whole patch are left out, as by an unpadded convolution.
    """
    batch, height, width, channels = x.shape
    rows, cols = height // size, width // size
    x = x[:, : rows * size, : cols * size]
    x = x.reshape(batch, rows, size, cols, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, cols, -1)


class Stage(nnx.Module):
    """A patch embedding, positions (in the first stage) and blocks on one grid of tokens."""

    def __init__(
        self,
        scope: Scope,
        size: tuple[int, int],
        channels: int,
        entry: Mapping[str, Any],
        *,
        first: bool,
        extra: int,
        remat: str,
        scan_from: int,
    ):
        width, kernel, stride = entry["width"], entry["kernel"], entry["stride"]
        padding = entry.get("padding", 0)
        self.grid = patch_grid(size, kernel, stride, padding)
        scope = scope.on_grid(*self.grid)
        self.patch = PatchEmbed(channels, width, kernel, stride, padding)
        length = self.grid[0] * self.grid[1] + extra
        slot = ("position", "position", width, length)
        self.position = scope.fill(*slot, default="learned") if first else None
        blocks = [scope.fill("wiring", f"blocks/{j}", width, False) for j in range(entry["depth"])]
        self.blocks = Stack(blocks, remat, scan_from)

    def __call__(self, image, token: Float[Array, "1 D"] | None, context: Context):
        """image [B, h, w, C] -> tokens [B, T, D], the class token before those of the grid."""
        x = self.patch(image, context)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if token is not None:
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], *token.shape))
            x = jnp.concatenate([token, x], axis=1)
        if self.position is not None:
            x = self.position(x, context)
        return self.blocks(x, context)


class Vision(nnx.Module):
    """image [B, height, width, channels] -> logits [B, num_classes].

    Args:
      image_size: height and width of the images, or one number for both.
      channels: of the images.
      num_classes: of the head.
      stages: one dict each: `width`, `depth`, and `kernel`, `stride` and `padding` (default 0) of
        the patch embedding that begins it.
      pooling: the head reads the `mean` of the normalised tokens, or a learned `class_token`,
        which only a model of one stage can have.
      remat: `none`, `dots`, `products` or `full`: what a block's backward pass computes again.
      scan_from: alike neighbouring blocks are scanned when there are at least this many.
    """

    def __init__(
        self,
        scope: Scope,
        *,
        image_size: int | tuple[int, int],
        channels: int,
        num_classes: int,
        stages: list[dict],
        pooling: Literal["mean", "class_token"] = "mean",
        remat: str = "none",
        scan_from: int = 6,
    ):
        _check_stages(stages, pooling)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.image_shape, self.pooling = (*size, channels), pooling
        extra = int(pooling == "class_token")
        self.class_token = param((1, stages[0]["width"]), Normal(0.02)) if extra else None
        built: list[Stage] = []
        for i, entry in enumerate(stages):
            stage = Stage(
                scope.at(f"stages/{i}"),
                size,
                channels,
                entry,
                first=i == 0,
                extra=extra,
                remat=remat,
                scan_from=scan_from,
            )
            size, channels = stage.grid, entry["width"]
            built.append(stage)
        self.stages = nnx.List(built)
        self.final_norm = scope.on_grid(*size).norm("final_norm", channels)
        self.head = scope.linear("head", channels, num_classes, True)

    def features(self, batch: Batch, context: Context) -> tuple[Float[Array, "B D"], Aux]:
        """What the head reads of each image, and the auxiliary outputs of the blocks."""
        x = batch["image"]
        if x.shape[1:] != self.image_shape:
            raise UserError(f"images of shape {x.shape[1:]} in a model for {self.image_shape}")
        token = None if self.class_token is None else self.class_token[...]
        depth = sum(len(stage.blocks) for stage in self.stages)
        totals: Aux = {}
        for i, stage in enumerate(self.stages):
            # Layers are numbered from 0 in every stage; their randomness must differ all the same.
            local = dataclasses.replace(context.layer(i), grid=stage.grid)
            x, aux = stage(x, token, local)
            for name, value in aux.items():
                share = 1.0 if name.startswith("loss/") else len(stage.blocks) / depth
                totals[name] = totals.get(name, 0.0) + share * value
            if i + 1 < len(self.stages):
                x = x.reshape(x.shape[0], *stage.grid, -1)
        x = self.final_norm(x, local)
        return (x[:, 0] if self.pooling == "class_token" else x.mean(axis=1)), totals

    def logits(self, h: Float[Array, "B D"], context: Context) -> Float[Array, "B classes"]:
        """Float32 logits of features."""
        return self.head(h, context).astype(jnp.float32)

    def __call__(self, batch: Batch, context: Context) -> Float[Array, "B classes"]:
        return self.logits(self.features(batch, context)[0], context)


def _check_stages(stages: Sequence[Mapping[str, Any]], pooling: str) -> None:
    """Refuses stages that lack or misname a field, and a class token in a hierarchy."""
    if not stages:
        raise UserError("model.stages is empty; give at least one {width, depth, kernel, stride}")
    for i, entry in enumerate(stages):
        for name, value in entry.items():
            if name not in STAGE_KEYS:
                raise UserError(
                    f"model.stages[{i}]: no field {name!r}; {nearest(name, STAGE_KEYS)}"
                )
            low = 0 if name in ("padding", "depth") else 1
            if not isinstance(value, int) or value < low:
                raise UserError(
                    f"model.stages[{i}].{name}={value!r} must be a whole number >= {low}"
                )
        missing = [n for n in STAGE_KEYS[:-1] if n not in entry]
        if missing:
            raise UserError(f"model.stages[{i}] needs {', '.join(missing)}")
    if pooling not in ("mean", "class_token"):
        raise UserError(f"model.pooling={pooling!r}; {nearest(pooling, ('mean', 'class_token'))}")
    if pooling == "class_token" and len(stages) > 1:
        raise UserError(
            f"a class token cannot pass the patch embeddings between {len(stages)} stages;"
            " set model.pooling='mean'"
        )
