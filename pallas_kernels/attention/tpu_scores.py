"""What the TPU kernels of attention share: their inputs, and the scores of a piece of keys.

Scores are held transposed, keys along sublanes and queries along lanes. So what belongs to a query
(maximum, sum, log-sum-exp, delta) is one row that costs a load to broadcast, a maximum over keys
is elementwise work without the cross-lane unit, and in V^T P^T the array's full width works though
the head is narrower than it. Scores are in base 2: log2(e) and the scale are folded into q.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention import dropout, tpu_plan
from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL
from pallas_kernels.attention.tpu_specs import LOG2E, Place, Shape

LN2 = math.log(2)
# Below every score, and finite so that differences of it are no NaN.
LEAST = -1e30
INF = math.inf


def contract(a, b, axes):
    """Product of two matrices over axis axes[0] of a and axes[1] of b, accumulated in float32."""
    wide = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


class Scores:
    """Scores of a tile's queries and some keys of a block, from the refs of a program.

    Args:
      inputs: refs of q, k, and where used bias, alibi, seeds, q_ids, kv_ids.
      shape, masks: static.
      at: the program's Place.
      queries: (first, number) of the tile's queries; all of them where None.
    """

    def __init__(self, inputs, shape: Shape, masks, at: Place, queries=None):
        self.inputs, self.shape, self.masks, self.at = inputs, shape, masks, at
        self.first, self.count = queries or (0, shape.tile.block_q)

    def __call__(self, start, size: int):
        """Base-2 scores float32 [size, count] of the keys from `start` in the block, unmasked."""
        return self.finish(self.product(start, size), start, size)

    def product(self, start, size: int):
        """k q, where q is scaled (and divided by the softcap)."""
        q = self.inputs["q"][pl.ds(self.first, self.count), :]
        return contract(self.inputs["k"][pl.ds(start, size), :], q, (1, 1))

    def finish(self, x, start, size: int):
        """Scores from the product: softcap, bias, ALiBi."""
        inputs, settings = self.inputs, self.shape.settings
        if settings.softcap is not None:
            x = jnp.tanh(x) * (settings.softcap * LOG2E)
        if "bias" in inputs:
            x = x + self._bias(start, size) * LOG2E
        if "alibi" in inputs:
            t, s = self.positions(start, size)
            distance = jnp.abs(t + settings.alibi_offset - s).astype(jnp.float32)
            x = x - distance * (inputs["alibi"][self.at.n] * LOG2E)
        return x

    def positions(self, start, size: int):
        """int32 t [1, count] and s [size, count] of the keys from `start` in the block."""
        tile = self.shape.tile
        t = jax.lax.broadcasted_iota(jnp.int32, (1, self.count), 1)
        t = t + (self.at.q * tile.block_q + self.first)
        s = jax.lax.broadcasted_iota(jnp.int32, (size, self.count), 0)
        return t, s + (self.at.kv * tile.block_kv + start)

    def seen(self, kind: int, start, size: int):
        """bool [size, count]: what mask and segment ids let through in a piece; None is all."""
        keep = None
        if kind > 1:
            keep = self.masks[kind].element(self.at.n, *self.positions(start, size))
        if "q_ids" in self.inputs:
            of_keys = self._column(self.inputs["kv_ids"], start, size)
            same = of_keys == self.inputs["q_ids"][:, pl.ds(self.first, self.count)]
            keep = same if keep is None else keep & same
        return keep

    def hide(self, x, hidden: float, start, cells):
        """x [keys of the cells, count], in which what the cells' masks hide is `hidden`."""
        rows: dict[int, list] = {}
        for cell in cells:
            part = x[cell.key : cell.key + cell.keys, cell.query : cell.query + cell.queries]
            if cell.kind == 0:
                part = jnp.full_like(part, hidden)
            else:
                here = Scores(self.inputs, self.shape, self.masks, self.at, cell[2:4])
                keep = here.seen(cell.kind, start + cell.key, cell.keys)
                part = part if keep is None else jnp.where(keep, part, hidden)
            rows.setdefault(cell.key, []).append(part)
        return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows.values()], axis=0)

    def kept(self, start, size: int):
        """bool [size, count]: weights that dropout keeps."""
        t, s = self.positions(start, size)
        at = (self.at.b * self.shape.N + self.at.n) * 2
        words = (self.inputs["seeds"][at + i] for i in (0, 1))
        seeds = [jax.lax.bitcast_convert_type(word, jnp.uint32) for word in words]
        return dropout.keep(*seeds, t, s, self.shape.settings.dropout_rate)

    def _bias(self, start, size: int):
        bias = self.inputs["bias"]
        if bias.shape[0] == 1:  # one row for all queries: [1, block_kv]
            return self._column(bias, start, size)
        return bias[pl.ds(start, size), pl.ds(self.first, self.count)].astype(jnp.float32)

    def _column(self, row, start, size: int):
        """[size, count] from `size` entries of a row [1, block_kv]: each along its sublane."""
        entries = jnp.broadcast_to(row[:, pl.ds(start, size)], (128, size))
        if entries.dtype not in (jnp.int32, jnp.float32):
            entries = entries.astype(jnp.float32)
        column = jnp.transpose(entries)
        return jnp.concatenate([column] * (self.count // 128), axis=1)


class Cell(NamedTuple):
    """A rectangle of scores [keys, queries] that a mask leaves in one state."""

    key: int
    keys: int
    query: int
    queries: int
    kind: int


def runs(kinds, plan, tile):
    """(first key, keys, cells) of the live pieces of a block side by side.

    A full piece is one cell; a masked one is four where its corners are known. Cells are in rows
    from the first key on, and a row's from the first query on.
    """
    found = []
    for piece, kind in enumerate(kinds):
        if kind:
            if not piece or not kinds[piece - 1]:
                found.append((piece * tile.piece, 0, ()))
            start, size, cells = found[-1]
            found[-1] = (start, size + tile.piece, (*cells, *_cells(size, kind, plan, tile)))
    return found


def _cells(key, kind, plan, tile):
    corners = plan.corners[kind]
    if corners is None:
        return [Cell(key, tile.piece, 0, tile.block_q, kind)]
    keys, queries = tile.piece // 2, tile.block_q // 2
    kinds = {EMPTY: 0, PARTIAL: kind, FULL: 1}
    return [
        Cell(key + i * keys, keys, j * queries, queries, kinds[corners[j][i]])
        for i in (0, 1)
        for j in (0, 1)
    ]


def by_region(at: Place, plan, run):
    """Calls run(kinds) for the straight code of the block's region, found by halving."""

    def choose(first, last):
        if first == last:
            return run(plan.regions[first])
        middle = (first + last) // 2
        below = at.region - 1 <= middle
        pl.when(below)(lambda: choose(first, middle))
        pl.when(jnp.logical_not(below))(lambda: choose(middle + 1, last))

    if plan.complete and (plan.state >> tpu_plan.REGION > 0).all():
        choose(0, len(plan.regions) - 1)
    elif plan.regions:
        pl.when(at.region > 0)(lambda: choose(0, len(plan.regions) - 1))


def visit(scores: Scores, scalars, each):
    """Calls each(start, kind) for the live pieces of the block, `kind` static: a region a kind."""
    tile, at = scores.shape.tile, scores.at

    @pl.loop(0, tile.pieces)
    def _(piece):
        start = pl.multiple_of(piece * tile.piece, tile.piece)
        kind, met = at.kind(piece), _segments_meet(scores, piece, scalars)
        for i in range(1, len(scores.masks)):
            pl.when(met & (kind == i))(functools.partial(each, start, i))


def _segments_meet(scores: Scores, piece, scalars):
    """Whether the ranges of segment ids of the tile's queries and a piece's keys overlap."""
    at, shape = scores.at, scores.shape
    if "q_least" not in scalars:
        return True
    q = at.b * (shape.T // shape.tile.block_q) + at.q
    kv = at.b * (shape.S // shape.tile.piece) + at.kv * shape.tile.pieces + piece
    least = scalars["q_least"][q] <= scalars["kv_most"][kv]
    return least & (scalars["kv_least"][kv] <= scalars["q_most"][q])
