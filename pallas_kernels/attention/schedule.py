"""The blocks of scores that attention visits, listed when the program is traced.

A mask leaves some blocks of the T x S scores empty. `schedule` lists the others in the order in
which a kernel visits them, so that an empty block costs no step, no copy and no memory. In a block
that is visited, most of a combined mask is settled: of `Causal() & Window(4096)` only `Causal()`
remains to be computed on the diagonal and only the window at its far edge. `residuals` finds what
remains; a BlockPattern never does where the blocks lie within the pattern's. `numbered` numbers it
for kernels, which have code for a few masks alone.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention import masks
from pallas_kernels.attention.masks import EMPTY, FULL, And, Causal, Empty, Full, Mask, Or, Window

Q, KV, FIRST, LAST, KIND = range(5)  # columns of Schedule.pairs


class Schedule(NamedTuple):
    """Live pairs of a q block and a kv block, for each head.

    heads: int32[N], the index into `pairs` for each query head; heads alike share a list.
    pairs: int32[P, 5] arrays with the columns Q, KV (block indices), FIRST and LAST (1 at the
      first and last pair of a q block; of a kv block where the schedule is transposed), KIND.
      Ordered by q block, then kv block (transposed: the other way round). A q block without a live
      pair has one entry of KIND 0 with FIRST and LAST set, so that its output can be written.
    masks: masks[KIND] is what remains to be applied in a block: masks[0] is Empty(), masks[1] is
      Full() (nothing to apply), others are PARTIAL. They name no heads.
    """

    heads: np.ndarray
    pairs: tuple[np.ndarray, ...]
    masks: tuple[Mask, ...]


@functools.lru_cache(maxsize=256)
def schedule(
    mask: Mask, heads: int, T: int, S: int, block_q: int, block_kv: int, transpose: bool = False
) -> Schedule:
    """The live pairs of a mask; see Schedule. Raises ValueError where the mask does not fit."""
    mask.check(heads, T, S)
    distinct = [mask.head(n) for n in range(heads)] if mask.names_heads() else [mask] * heads
    order = {each: index for index, each in enumerate(dict.fromkeys(distinct))}
    kinds = {Empty(): 0, Full(): 1}
    pairs = []
    for each in order:
        remains, states = residuals(each, T, S, block_q, block_kv)
        kind = np.array([kinds.setdefault(mask, len(kinds)) for mask in remains], np.int32)[states]
        pairs.append(_pairs(kind, transpose))
    return Schedule(np.array([order[each] for each in distinct], np.int32), tuple(pairs), (*kinds,))


def residuals(
    mask: Mask, T: int, S: int, block_q: int, block_kv: int
) -> tuple[tuple[Mask, ...], np.ndarray]:
    """What remains of a mask that names no heads, in each block.

    Returns:
      Distinct masks, and their index for each block, [ceil(T / block_q), ceil(S / block_kv)]. In a
      block whose mask is Empty() nothing is seen, in one whose mask is Full() everything; in the
      others the mask returned and `mask` agree on every element.
    """
    mask = _split(mask)
    leaves = list(dict.fromkeys(_leaves(mask)))
    states = [leaf.blocks(1, T, S, block_q, block_kv)[0] for leaf in leaves]
    codes = sum(state.astype(np.int64) * 3**power for power, state in enumerate(states))
    distinct, index = np.unique(codes, return_inverse=True)
    remains = []
    for code in distinct.tolist():
        settled = {leaf: code // 3**power % 3 for power, leaf in enumerate(leaves)}
        remains.append(_settle(mask, settled))
    return tuple(remains), index.reshape(codes.shape)


class Kinds(NamedTuple):
    """What a mask leaves of all blocks, by number.

    tables: int64[tables, Tb, Sb], indices of `masks`; heads whose masks are alike share a table.
    table: int32[N], each query head's table.
    masks: masks[0] is Empty(), masks[1] Full(), others are partial. They hide keys beyond S. Some
      may name heads, where there would be too many otherwise.
    """

    tables: np.ndarray
    table: np.ndarray
    masks: tuple[Mask, ...]


def numbered(
    mask: Mask, heads: int, T: int, S: int, block_q: int, block_kv: int, most: int
) -> Kinds:
    """The kinds of all blocks: the masks of `residuals`, where these are no more than `most`.

    Otherwise those of different heads that differ in integers alone become one that names heads;
    where this does not suffice, every partial block has the whole mask.
    """
    mask.check(heads, T, S)
    each = [mask.head(n) for n in range(heads)] if mask.names_heads() else [mask] * heads
    distinct = list(dict.fromkeys(each))
    found = [_cut(*residuals(x, T, S, block_q, block_kv), S, block_kv) for x in distinct]
    table = np.array([distinct.index(x) for x in each], np.int32)
    for share in (list, _by_skeleton, _in_one):
        keys = [share(remains) for remains, _ in found]
        numbers = {Empty(): 0, Full(): 1}
        tables = [np.array([numbers.setdefault(key, len(numbers)) for key in row])[states]
                  for row, (_, states) in zip(keys, found)]  # fmt: skip
        if len(numbers) <= most:
            break
    if share is _in_one:
        merged = [mask & masks.Prefix(S) if S % block_kv else mask] * len(numbers)
    else:
        own = [dict(zip(row, remains)) for row, (remains, _) in zip(keys, found)]
        merged = [_merged([part.get(key) for part in own], table) for key in numbers]
    return Kinds(np.stack(tables), table, (Empty(), Full(), *merged[2:]))


def _cut(remains, states, S, block_kv):
    """`residuals` in which keys beyond S are hidden."""
    if not S % block_kv:
        return remains, states
    each = remains + tuple(mask & masks.Prefix(S) for mask in remains)
    states = states.copy()
    states[:, -1] += len(remains)
    occur, index = np.unique(states, return_inverse=True)
    return tuple(each[state] for state in occur), index.reshape(states.shape)


def _by_skeleton(remains):
    """Keys which heads share whose masks differ in integers alone; a head has each but once."""
    count = collections.Counter()
    keys = []
    for mask in remains:
        like = masks.skeleton(mask)
        keys.append(mask if mask in (Empty(), Full()) else (like, count[like]))
        count[like] += 1
    return keys


def _in_one(remains):
    return [mask if mask in (Empty(), Full()) else "partial" for mask in remains]


def _merged(own, table):
    """One mask of what the tables have of a kind; None where a table has it not."""
    some = [mask for mask in own if mask is not None]
    if len(set(some)) < 2:
        return some[0] if some else None
    return masks.Heads([own[index] or some[0] for index in table])


def _split(mask):
    """The same mask with the two sides of a window apart: a block rarely needs both."""
    if isinstance(mask, (And, Or)):
        return _join(mask, [_split(part) for part in mask.masks])
    if not isinstance(mask, Window) or mask.right is None:
        return mask
    left = dataclasses.replace(mask, right=None) if mask.left is not None else Full()
    if mask.block == 1:
        return left & Causal(mask.offset + mask.right)
    return left & dataclasses.replace(mask, left=None)


def _join(like, parts):
    return functools.reduce(lambda a, b: a & b if isinstance(like, And) else a | b, parts)


def _leaves(mask):
    if not isinstance(mask, (And, Or)):
        return [mask]
    return [leaf for part in mask.masks for leaf in _leaves(part)]


def _settle(mask, states):
    if not isinstance(mask, (And, Or)):
        return {EMPTY: Empty(), FULL: Full()}.get(states[mask], mask)
    return _join(mask, [_settle(part, states) for part in mask.masks])


def _pairs(kind, transpose):
    """int32[P, 5] from the kinds of all blocks [Tb, Sb]."""
    kind = kind.T if transpose else kind
    rows, columns = np.nonzero(kind != masks.EMPTY)
    idle = np.setdiff1d(np.arange(len(kind)), rows)
    rows, columns = np.concatenate([rows, idle]), np.concatenate([columns, 0 * idle])
    order = np.argsort(rows, kind="stable")
    rows, columns = rows[order], columns[order]
    change = rows[1:] != rows[:-1]
    first, last = np.concatenate([[True], change]), np.concatenate([change, [True]])
    q, kv = (columns, rows) if transpose else (rows, columns)
    return np.stack([q, kv, first, last, kind[rows, columns]], axis=1).astype(np.int32)
