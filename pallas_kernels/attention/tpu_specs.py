"""Grids, block specs, scalar memory and padded inputs of the TPU kernels of attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan
from pallas_kernels.attention.settings import Settings

LOG2E = 1.4426950408889634
# Every TPU from v4 on has this much and more; a kernel asks for what it needs.
VMEM_MOST = 100 * 2**20


class Shape(NamedTuple):
    """Static facts of a call. T and S are padded to whole tiles."""

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    tile: tpu_plan.Tiling
    settings: Settings

    def key_head(self, n):
        """The key head of a query head."""
        return jax.lax.div(n, np.int32(self.group))

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.N // self.K

    @property
    def fold(self) -> float:
        """What q is multiplied by outside of the kernels; a softcap wants scores over the cap."""
        return self.settings.scale / (self.settings.softcap or 1 / LOG2E)


class Grid(NamedTuple):
    """(B, query heads, pairs); if `grouped` (B, key heads, pairs, query heads of a key head).

    Where heads have pairs of their own, one list goes through all heads, and the axes of heads are
    of size 1.
    """

    shape: Shape
    plan: tpu_plan.Plan
    grouped: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        shape, pairs = self.shape, len(self.plan.index)
        if self.plan.head is not None:
            return (shape.B, 1, pairs) + (1,) * self.grouped
        if self.grouped:
            return (shape.B, shape.K, pairs, shape.group)
        return (shape.B, shape.N, pairs)

    def head(self, scalars, i, p, g=0):
        """The query head of a program."""
        if self.plan.head is not None:
            return scalars["head"][p]
        return i * self.shape.group + g if self.grouped else i

    def spec(self, block, index) -> pl.BlockSpec:
        """The spec of the last two axes of an array; index is a function of (b, n, q, kv)."""

        def mapped(b, i, p, *rest):
            *g, scalars = rest
            pair = scalars["index"][p]
            return index(b, self.head(scalars, i, p, *g), pair >> 16, pair & 0xFFFF)

        return pl.BlockSpec((None, None, *block), mapped)

    def place(self, scalars) -> "Place":
        """Reads the pair of the running program."""
        p = pl.program_id(2)
        g = [pl.program_id(3)] if self.grouped else []
        n = self.head(scalars, pl.program_id(1), p, *g)
        index = scalars["index"][p]
        return Place(pl.program_id(0), n, index >> 16, index & 0xFFFF, scalars["state"][p])


class Place(NamedTuple):
    """Where a program works: batch entry, query head, tile and block, the state of the pair."""

    b: Any
    n: Any
    q: Any
    kv: Any
    state: Any

    def has(self, flag: int):
        return (self.state & flag) != 0

    def kind(self, piece):
        """What the mask leaves of a piece of the block: an index of Plan.masks."""
        return (self.state >> (tpu_plan.SHIFT + tpu_plan.WIDTH * piece)) & (tpu_plan.MOST_KINDS - 1)

    @property
    def region(self):
        """The number of the block's straight code, from 1 on; 0 where it has none."""
        return self.state >> tpu_plan.REGION

    @property
    def sample(self):
        """The piece to sample reference values from."""
        return (self.state >> tpu_plan.SAMPLE) & (tpu_plan.MOST_PIECES - 1)


def input_specs(inputs, grid: Grid):
    """Block specs of `inputs` (see padded_inputs)."""
    shape, tile = grid.shape, grid.shape.tile
    queries = ((tile.block_q, shape.H), lambda b, n, q, kv: (b, n, q, 0))
    keys = ((tile.block_kv, shape.H), lambda b, n, q, kv: (b, shape.key_head(n), kv, 0))
    row = ((1, tile.block_q), lambda b, n, q, kv: (b, n, 0, q))
    specs = {
        "q": queries,
        "k": keys,
        "v": keys,
        "dout": queries,
        "lse": row,
        "delta": row,
        "q_ids": ((1, tile.block_q), lambda b, n, q, kv: (b, 0, 0, q)),
        "kv_ids": ((1, tile.block_kv), lambda b, n, q, kv: (b, 0, 0, kv)),
    }
    if "bias" in inputs:
        many = [size > 1 for size in inputs["bias"].shape[:2]]
        rows = inputs["bias"].shape[2] > 1
        specs["bias"] = (
            (tile.block_kv, tile.block_q) if rows else (1, tile.block_kv),
            lambda b, n, q, kv: (b * many[0], n * many[1], *((kv, q) if rows else (0, kv))),
        )
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    return {
        name: smem if name in ("alibi", "seeds") else grid.spec(*specs[name]) for name in inputs
    }


def scalars(plan: tpu_plan.Plan, segments, shape: Shape):
    """The arrays in scalar memory: the pairs, and the ranges of segment ids."""
    found = {"index": jnp.asarray(plan.index), "state": jnp.asarray(plan.state)}
    if plan.head is not None:
        found["head"] = jnp.asarray(plan.head)
    return found | segment_ranges(segments, shape)


def segment_ranges(segments, shape: Shape):
    """Least and greatest id of each tile of queries and each piece of keys, int32, flat."""
    found = {}
    blocks = (shape.tile.block_q, shape.tile.piece)
    for name, ids, block in zip(("q", "kv"), segments or (), blocks, strict=False):
        ids = ids.reshape(-1, block)
        found[f"{name}_least"], found[f"{name}_most"] = ids.min(1), ids.max(1)
    return found


def padded_segments(segment_ids, shape: Shape):
    """Padded with the last id of each, so that the ranges of blocks stay as narrow as they are."""
    if segment_ids is None:
        return None
    lengths = (shape.T, shape.S)
    return [
        pad(ids.astype(jnp.int32), 1, n, mode="edge")
        for ids, n in zip(segment_ids, lengths, strict=True)
    ]


def padded_inputs(q, k, v, bias, alibi, segments, dropout_seed, shape: Shape):
    """The kernels' common inputs, heads before lengths, padded with zeros to whole tiles.

    q [B, N, T, H] scaled by shape.fold; k, v [B, K, S, H]; bias [#B, #N, S, T], or [#B, #N, 1, S]
    of one row for all queries; alibi [N]; seeds int32[B * N * 2]; q_ids, kv_ids [B, 1, 1, T or S].
    """
    dtype = compute_dtype((q, k, v))
    q = (q.astype(jnp.float32) * shape.fold).astype(dtype)
    inputs = {"q": heads_first(q, shape.T)}
    inputs["k"], inputs["v"] = (heads_first(x.astype(dtype), shape.S) for x in (k, v))
    if bias is not None:
        bias = pad(bias.astype(jnp.float32), 3, shape.S)
        many = bias.shape[2] > 1
        inputs["bias"] = jnp.swapaxes(pad(bias, 2, shape.T), 2, 3) if many else bias
    if alibi is not None:
        inputs["alibi"] = alibi.astype(jnp.float32)
    if segments is not None:
        inputs["q_ids"], inputs["kv_ids"] = (ids[:, None, None] for ids in segments)
    if dropout_seed is not None and shape.settings.dropout_rate:
        inputs["seeds"] = jax.lax.bitcast_convert_type(dropout_seed, jnp.int32).reshape(-1)
    return inputs


def heads_first(x, length: int):
    """[B, T, N, ...] to [B, N, length, ...], padded with zeros."""
    return pad(jnp.swapaxes(x, 1, 2), 2, length)


def pad(x, axis: int, length: int, **how):
    """x with its axis padded at the end to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return x if x.shape[axis] == length else jnp.pad(x, widths, **how)


def compute_dtype(arrays):
    """The matrix unit takes bfloat16 or float32; float16 has more bits than the former."""
    return jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in arrays) else jnp.float32


def params(grid: Grid, vmem_bytes: int = 48 * 2**20):
    """Compiler parameters: programs that share a sum follow each other, others are free."""
    free = grid.plan.head is None
    semantics = ("parallel", "parallel" if free else "arbitrary") + ("arbitrary",) * (
        len(grid.sizes) - 2
    )
    limit = int(np.clip(vmem_bytes, 16 * 2**20, VMEM_MOST))
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def cost(grid: Grid, products: int) -> pl.CostEstimate:
    """For XLA's scheduler: `products` of a tile's scores with a head."""
    shape, tile = grid.shape, grid.shape.tile
    steps = int(np.prod(grid.sizes))
    scores = steps * tile.block_q * tile.block_kv
    item = jnp.dtype(jnp.bfloat16).itemsize
    moved = item * shape.H * (2 * steps * tile.block_kv + 2 * shape.B * shape.N * shape.T)
    return pl.CostEstimate(
        flops=2 * products * scores * shape.H, transcendentals=scores, bytes_accessed=moved
    )
