"""One block of scores of the blockwise form: where it lies and what is computed in it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import dropout, schedule
from pallas_kernels.attention.masks import Full, Mask


class Inputs(NamedTuple):
    """Arrays of heads that share a schedule; G query heads for each of K key heads.

    T and S are multiples of the block.
    """

    q: jax.Array  # [B, K, G, T, H]
    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    bias: jax.Array | None  # [#B, #K, #G, #T, S]
    alibi: jax.Array | None  # [K, G, 1, 1]
    seed: jax.Array | None  # [B, K, G, 2]
    of_q: jax.Array | None  # [B, T]
    of_kv: jax.Array | None  # [B, S]


class Plan(NamedTuple):
    """Which heads, which blocks, and how their scores are made. Static."""

    heads: np.ndarray  # query heads
    kv_heads: np.ndarray  # K key heads
    pairs: np.ndarray  # int32[P, 5] of `schedule`
    masks: tuple[Mask, ...]  # by the KIND of a pair
    rows: int
    columns: int
    settings: NamedTuple
    widen: bool  # products in float32, or float64, of inputs which are converted first
    scale: float  # what is left to multiply scores by: 1 where q has been scaled
    unroll: bool


class Tile(NamedTuple):
    """A block of scores: its first query and key, its index among the masks, and its size.

    Where it lies is traced in a loop, Python integers in a loop written out.
    """

    t: jax.Array | int
    s: jax.Array | int
    kind: jax.Array | int
    rows: int
    columns: int

    @classmethod
    def of(cls, pair, plan):
        t, s = pair[schedule.Q] * plan.rows, pair[schedule.KV] * plan.columns
        return cls(t, s, pair[schedule.KIND], plan.rows, plan.columns)

    def positions(self):
        """t [rows, 1] and s [1, columns]."""
        t = self.t + jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
        return t, self.s + jax.lax.broadcasted_iota(jnp.int32, (1, self.columns), 1)

    def cut(self, x, part):
        """The tile's part of [B, K, G, T, ...], of [B, K, S, H] or of [#B, #K, #G, #T, S]."""
        for axis, start, size in self._axes(x, part):
            x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return x

    def put(self, x, new, part):
        start = [jnp.zeros((), jnp.int32)] * x.ndim
        for axis, first, _ in self._axes(x, part):
            start[axis] = jnp.asarray(first, jnp.int32)
        return jax.lax.dynamic_update_slice(x, new, start)

    def cut_rows(self, x):
        return self.cut(x, "rows")

    def cut_keys(self, x):
        return self.cut(x, "keys")

    def _axes(self, x, part):
        if part == "keys":
            return [(2, self.s, self.columns)]
        rows = [(3, self.t, self.rows)] if part == "rows" or x.shape[3] > 1 else []
        return rows if part == "rows" else [*rows, (4, self.s, self.columns)]


def scores(inputs, plan, tile):
    """Masked scores [B, K, G, rows, columns], and tanh of the softcap (None without)."""
    q, k = tile.cut_rows(inputs.q), tile.cut_keys(inputs.k)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    x = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=wide)
    x = x if plan.scale == 1 else x * plan.scale
    softcap, capped = plan.settings.softcap, None
    if softcap is not None:
        capped = jnp.tanh(x / softcap)
        x = softcap * capped
    t, s = tile.positions()
    if inputs.bias is not None:
        x += tile.cut(inputs.bias, "bias").astype(wide)
    if inputs.alibi is not None:
        distance = jnp.abs(t + plan.settings.alibi_offset - s)
        x -= inputs.alibi.astype(wide) * distance.astype(wide)
    if inputs.of_q is not None:
        of_q = jax.lax.dynamic_slice_in_dim(inputs.of_q, tile.t, tile.rows, 1)
        of_kv = jax.lax.dynamic_slice_in_dim(inputs.of_kv, tile.s, tile.columns, 1)
        same = of_q[:, :, None] == of_kv[:, None, :]
        x = jnp.where(same[:, None, None], x, -jnp.inf)
    branches = [_mask(mask, t, s) for mask in plan.masks]
    if len(branches) == 1 or isinstance(tile.kind, int):
        return branches[tile.kind if len(branches) > 1 else 0](x), capped
    return jax.lax.switch(tile.kind, branches, x), capped


def _mask(mask, t, s):
    """Gives scores -inf where the mask hides a key."""
    if mask == Full():
        return lambda x: x
    return lambda x: jnp.where(mask.element(0, t, s), x, -jnp.inf)


def weights(p, inputs, plan, tile, dp=None):
    """Weights p after dropout, and the gradient of p from that of the weights after dropout."""
    rate = plan.settings.dropout_rate
    if not rate:
        return p, dp
    t, s = tile.positions()
    seed_0, seed_1 = inputs.seed[..., 0, None, None], inputs.seed[..., 1, None, None]
    kept = dropout.keep(seed_0, seed_1, t, s, rate)
    dp = None if dp is None else jnp.where(kept, dp / (1 - rate), 0)
    return jnp.where(kept, p / (1 - rate), 0), dp


def scores_gradient(dx, capped, plan):
    """The gradient of scale * q k^T, from that of the scores after softcap and bias."""
    return dx if plan.settings.softcap is None else dx * (1 - jnp.square(capped))
