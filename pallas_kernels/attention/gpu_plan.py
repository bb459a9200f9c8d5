"""What the Hopper kernels visit, and in which order: lists made while tracing.

A thread block takes tiles of rows (queries, or keys for dK and dV) off a list, the longest first,
and for each tile runs along a list of blocks of columns. Neither list names an empty block. Where
segment ids, which are data, empty more blocks, `lists` moves these out of every tile's part.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import schedule
from pallas_kernels.attention.masks import Mask

# Columns of Work.tiles.
HEAD, ROW, START, COUNT = range(4)
# A block in one word: column, head, kind, and whether its segments have to be compared.
_HEAD_SHIFT, _KIND_SHIFT, _MIXED_SHIFT = 16, 24, 30
MOST_COLUMNS, MOST_HEADS, MOST_KINDS = 2**16, 2**8, 2**6
KINDS = 16  # each is a branch in the kernels


class Work(NamedTuple):
    """Tiles of rows, and for each the blocks of columns which it visits.

    tiles: int32[W, 4], HEAD (a key head where rows are keys), ROW (index of the tile) and the
      part of `blocks` from START on, COUNT long. Heads whose masks are alike share parts.
    blocks: int32[P]: the index of the block of columns; the query head within the group of a key
      head (0 where rows are queries); the index among `masks`. See `unpack`.
    rows: int32[P], the tile's ROW for each block.
    masks: what remains to be applied in a block: masks[0] is Empty(), masks[1] Full(), others are
      partial.
    """

    tiles: np.ndarray
    blocks: np.ndarray
    rows: np.ndarray
    masks: tuple[Mask, ...]


def unpack(word):
    """Column, head, kind and whether segments have to be compared, of an entry of Work.blocks."""
    return (
        word & (MOST_COLUMNS - 1),
        (word >> _HEAD_SHIFT) & (MOST_HEADS - 1),
        (word >> _KIND_SHIFT) & (MOST_KINDS - 1),
        word >> _MIXED_SHIFT,
    )


@functools.lru_cache(maxsize=256)
def work(mask, heads: int, T: int, S: int, block_q: int, block_kv: int, group: int = 0) -> Work:
    """The lists of a mask.

    Args:
      group: query heads of a key head, where rows are keys; 0 where they are queries.
    """
    found = schedule.numbered(mask, heads, T, S, block_q, block_kv, KINDS)
    each, tables = found.table.tolist(), found.tables
    parts, blocks, rows, tiles = {}, [], [], []
    for owner in range(heads // max(group, 1)):
        key = tuple(each[owner * group : (owner + 1) * group] if group else [each[owner]])
        if key not in parts:
            own = [_packed([(tables[x].T if group else tables[x])[row] for x in key])
                   for row in range(tables[key[0]].shape[1 if group else 0])]  # fmt: skip
            ends = len(rows) + np.cumsum([len(x) for x in own])
            parts[key] = [(end - len(x), len(x)) for end, x in zip(ends, own, strict=True)]
            blocks += [*own]
            rows += [row for row, x in enumerate(own) for _ in x]
        tiles += [(owner, row, *part) for row, part in enumerate(parts[key])]
    tiles = np.array(tiles, np.int32)
    tiles = tiles[np.argsort(-tiles[:, COUNT], kind="stable")]
    blocks = np.concatenate(blocks)
    if not len(blocks):  # an operand of no elements could not be
        blocks, rows = np.zeros(1, np.int32), [0]
    return Work(tiles, blocks.astype(np.int32), np.array(rows, np.int32), found.masks)


def lists(work: Work, row_ranges=None, column_ranges=None):
    """tiles [1 or B, W, 4] and blocks [1 or B, P] for the kernel.

    Args:
      row_ranges, column_ranges: int32 ([B, rows], [B, columns]) pairs of the least and the
        greatest segment id of a tile of rows and of a block of columns; None without segments.
    """
    if row_ranges is None:
        return jnp.asarray(work.tiles)[None], jnp.asarray(work.blocks)[None]
    column = unpack(work.blocks)[0]
    low, high = (x[:, work.rows] for x in row_ranges)
    least, most = (x[:, column] for x in column_ranges)
    live = (low <= most) & (least <= high)
    mixed = (low != high) | (least != most) | (low != least)
    starts, ends = work.tiles[:, START], work.tiles[:, START] + work.tiles[:, COUNT]
    part = np.zeros(len(work.blocks) + 1, np.int32)
    part[np.unique(starts)] = 1
    part = np.cumsum(part)[:-1]
    order = jnp.argsort(2 * part + ~live, axis=1, stable=True)
    words = work.blocks | (mixed.astype(jnp.int32) << _MIXED_SHIFT)
    before = jnp.pad(jnp.cumsum(live, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    count = before[:, ends] - before[:, starts]
    tiles = jnp.broadcast_to(work.tiles, (len(live), *work.tiles.shape)).at[:, :, COUNT].set(count)
    return tiles, jnp.take_along_axis(words, order, axis=1)


def _packed(kinds):
    """What a row visits: head by head, in the order of the columns."""
    parts = []
    for head, kind in enumerate(kinds):
        columns = np.flatnonzero(kind)
        parts.append(columns | head << _HEAD_SHIFT | kind[columns] << _KIND_SHIFT)
    return np.concatenate(parts)
