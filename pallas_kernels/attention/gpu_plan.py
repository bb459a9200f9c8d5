"""What the Hopper kernels visit, and in which order: static lists, made while tracing.

A thread block takes tiles of rows (queries, or keys for dK and dV) off a list, the longest first,
and for each tile runs along a list of blocks of columns. Neither list names an empty block.
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention import masks, schedule

# Work.tiles: columns. Work.blocks: column | head << HEAD_SHIFT | kind << KIND_SHIFT.
HEAD, ROW, START, COUNT = range(4)
HEAD_SHIFT, KIND_SHIFT = 16, 24
MOST_COLUMNS, MOST_HEADS, MOST_KINDS = 2**16, 2**8, 2**7


class Work(NamedTuple):
    """Tiles of rows, and for each the blocks of columns which it visits.

    tiles: int32[W, 4], HEAD (a key head where rows are keys), ROW (index of the tile) and the
      part of `blocks` from START on, COUNT long.
    blocks: int32[P]: the index of the block of columns; the query head within the group of a key
      head (0 where rows are queries); the index among `masks`.
    masks: what remains to be applied in a block: masks[0] is Empty(), masks[1] Full(), others are
      partial. They name no heads.
    """

    tiles: np.ndarray
    blocks: np.ndarray
    masks: tuple[masks.Mask, ...]


@functools.lru_cache(maxsize=256)
def work(mask, heads: int, T: int, S: int, block_q: int, block_kv: int, group: int = 0) -> Work:
    """The lists of a mask.

    Args:
      group: query heads of a key head, where rows are keys; 0 where they are queries.
    """
    mask.check(heads, T, S)
    each = [mask.head(n) for n in range(heads)] if mask.names_heads() else [mask] * heads
    numbers = {masks.Empty(): 0, masks.Full(): 1}
    tables = {x: _kinds(x, T, S, block_q, block_kv, numbers) for x in dict.fromkeys(each)}
    lists, blocks, tiles, length = {}, [], [], 0
    for owner in range(heads // max(group, 1)):
        of = each[owner * group : (owner + 1) * group] if group else each[owner : owner + 1]
        key = tuple(of)
        if key not in lists:
            rows = _rows([tables[x].T if group else tables[x] for x in of])
            lists[key] = []
            for row in rows:
                lists[key].append((length, len(row)))
                blocks.append(row)
                length += len(row)
        tiles += [(owner, row, *part) for row, part in enumerate(lists[key])]
    tiles = np.array(tiles, np.int32)
    tiles = tiles[np.argsort(-tiles[:, COUNT], kind="stable")]
    # An empty list could not be an operand.
    blocks = np.concatenate([*blocks, np.zeros(1, np.int64)]).astype(np.int32)
    return Work(tiles, blocks, tuple(numbers))


def _kinds(mask, T, S, block_q, block_kv, numbers):
    """Kinds [tiles of queries, blocks of keys]; a block that reaches beyond S has a mask."""
    remains, states = schedule.residuals(mask, T, S, block_q, block_kv)
    kinds = np.array([_number(numbers, x) for x in remains])[states]
    if S % block_kv:
        cut = [_number(numbers, x & masks.Prefix(S)) for x in remains]
        kinds[:, -1] = np.array(cut)[states[:, -1]]
    return kinds


def _number(numbers, mask):
    return numbers.setdefault(mask, len(numbers))


def _rows(tables):
    """For each row, what it visits, packed: head by head, in the order of the columns."""
    rows = []
    for row in range(len(tables[0])):
        parts = []
        for head, table in enumerate(tables):
            columns = np.flatnonzero(table[row])
            parts.append(columns | head << HEAD_SHIFT | table[row][columns] << KIND_SHIFT)
        rows.append(np.concatenate(parts))
    return rows
