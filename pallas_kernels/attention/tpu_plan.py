"""What the TPU kernels of attention visit, and in which order: static, made while tracing.

A program works on a tile of `block_q` queries and a block of `block_kv` keys. The block is cut
into `pieces` of `piece` keys, and the mask is judged by piece: so a large block, which keeps the
matrix unit busy, still skips what is empty in it. The tiles that have a live piece are listed in
scalar memory, and the grid runs over that list alone.

A mask leaves blocks of few kinds: a causal one five, by how many pieces the diagonal leaves. Each
kind (a region) has code of its own, in which the live pieces are one product and one straight run
of instructions; blocks of rarer kinds are worked on piece by piece, which waits between pieces.

What remains of the mask in a piece is computed there, by one of a few masks (`schedule.numbered`).
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention import masks, schedule
from pallas_kernels.attention.settings import Settings

# A pair in scalar memory: q << 16 | kv, and its state: FIRST, LAST and, from bit SHIFT on, WIDTH
# bits a piece with the piece's kind (0 empty, 1 full, others index Plan.masks). From bit SAMPLE on
# the piece from which reference values are sampled, from bit REGION on an index of Plan.regions
# plus one, or 0.
FIRST, LAST, SHIFT, WIDTH, SAMPLE, REGION = 1, 2, 2, 3, 14, 16
MOST_PIECES, MOST_KINDS, MOST_BLOCKS, MOST_REGIONS = 4, 2**WIDTH, 2**15, 15
# Pieces of all regions together: each is code of some hundred bundles, and takes time to compile.
MOST_CODE = 16
# Pairs x 4 bytes x (2 or 3 words) must leave room in the 1 MB of scalar memory of a TPU core.
MOST_PAIRS = 60_000


class Tiling(NamedTuple):
    """Queries of a tile, keys of a block, keys of a piece: multiples of 128."""

    block_q: int
    block_kv: int
    piece: int

    @property
    def pieces(self) -> int:
        return self.block_kv // self.piece


class Plan(NamedTuple):
    """The pairs that a kernel visits.

    index, state: int32[P], see the head of this file.
    head: int32[P], the query head, where heads have schedules of their own; else None, and the
      grid has an axis of heads.
    masks: what remains to be computed in a piece of each kind.
    corners: of each kind, what its mask leaves of the halves of the keys in the halves of the
      queries, [2][2] as Mask.blocks has it; None where pieces of that kind differ in it.
    regions: kinds of the pieces of a block for which the kernel has straight code, by frequency.
    """

    index: np.ndarray
    state: np.ndarray
    head: np.ndarray | None
    masks: tuple[masks.Mask, ...]
    corners: tuple
    regions: tuple[tuple[int, ...], ...]

    @property
    def complete(self) -> bool:
        """Whether no block needs to be looked at piece by piece."""
        live = self.state >> SHIFT & (1 << SAMPLE - SHIFT) - 1
        return bool(((self.state >> REGION > 0) | (live == 0)).all())

    def sampled_kinds(self) -> list[int]:
        """The kinds of the pieces that tiles with straight code for their first block sample."""
        states = self.state[(self.state & FIRST > 0) & (self.state >> REGION > 0)]
        pieces = states >> SAMPLE & MOST_PIECES - 1
        return np.unique(states >> SHIFT + WIDTH * pieces & MOST_KINDS - 1).tolist()

    @property
    def alone(self) -> bool:
        """Whether every tile of queries has one block, and straight code for it."""
        ends = FIRST | LAST
        return bool(((self.state >> REGION > 0) & (self.state & ends == ends)).all())


def tiling(settings: Settings, T: int, S: int, block_q: int, block_kv: int) -> Tiling:
    """The tiling for lengths T and S; block_q and block_kv are what the kernel likes best.

    Tiles and pieces lie within the blocks of the mask's BlockPatterns, and pieces within those of
    its Strides, where these allow it: then a piece is whole or empty.
    """
    patterns = _patterns(settings.mask)
    strides = [stride.block for stride in _find(masks.Stride, settings.mask)]
    key_blocks = {block for block in strides if block % 128 == 0}
    key_blocks |= {pattern.block[1] for pattern in patterns}
    most_q = _within(block_q, [pattern.block[0] for pattern in patterns])
    piece = min(block_kv, max(512, block_kv // MOST_PIECES))
    most_kv = _within(piece, key_blocks)
    rows = settings.block_q or (most_q if patterns else _even(T, most_q))
    if settings.block_kv:
        columns = settings.block_kv
        parts = [n for n in (4, 2, 1) if columns % (128 * n) == 0]
        fits = [columns // n for n in parts if most_kv % (columns // n) == 0]
        return Tiling(rows, columns, max(fits) if key_blocks and fits else columns // parts[0])
    piece = most_kv if key_blocks else _even(S, most_kv)
    pieces = -(-S // piece)
    blocks = -(-pieces // min(MOST_PIECES, max(1, block_kv // most_kv)))
    return Tiling(rows, piece * -(-pieces // blocks), piece)


def unsupported(mask: masks.Mask, heads: int, kv_heads: int, T: int, S: int, tile: Tiling):
    """Why the kernels cannot do this mask, in words; None where they can."""
    if max(-(-T // tile.block_q), -(-S // tile.block_kv)) > MOST_BLOCKS:
        return f"lengths {T} and {S} of more than {MOST_BLOCKS} blocks"
    found = kinds(mask, heads, T, S, tile)
    if any(_patterns(remaining) for remaining in found.masks):
        return "a BlockPattern whose blocks are no multiples of 128"
    if parts(mask, heads, kv_heads, T, S, tile) is None:
        return f"a mask with more live blocks than the {MOST_PAIRS} that fit in scalar memory"
    return None


def parts(mask: masks.Mask, heads: int, kv_heads: int, T: int, S: int, tile: Tiling):
    """In how many kernels, of as many key heads each, the pairs fit; None where in no number.

    Heads that differ have pairs of their own, all of which a kernel holds; others share theirs.
    """
    found = kinds(mask, heads, T, S, tile)
    live = found.state > 0
    idle = [(~live.any(axis)).sum(1) for axis in (1, 2)]
    pairs = live.sum((1, 2)) + np.maximum(*idle)
    if len(pairs) == 1:
        return 1 if pairs[0] <= MOST_PAIRS else None
    divisors = (count for count in range(1, kv_heads + 1) if kv_heads % count == 0)
    each = pairs[found.table]
    fits = (count for count in divisors if each.reshape(count, -1).sum(1).max() <= MOST_PAIRS)
    return next(fits, None)


def _patterns(mask):
    """The BlockPatterns in a mask."""
    return _find(masks.BlockPattern, mask)


def _find(kind, mask):
    """The masks of a kind in a mask."""
    if isinstance(mask, kind):
        return [mask]
    return [found for part in getattr(mask, "masks", ()) for found in _find(kind, part)]


def _within(most, blocks):
    """The greatest multiple of 128 up to `most` that divides all of `blocks`; else 128."""
    fits = [n for n in range(most, 0, -128) if all(block % n == 0 for block in blocks)]
    return fits[0] if fits else 128


class Kinds(NamedTuple):
    """What the mask leaves of each tile, as a dense table.

    state: int32[tables, tiles of queries, blocks of keys], the kinds of a block's pieces (see the
      head of this file). table: int32[N], each query head's. masks, corners: as in Plan.
    """

    state: np.ndarray
    table: np.ndarray
    masks: tuple[masks.Mask, ...]
    corners: tuple


@functools.lru_cache(maxsize=256)
def kinds(mask: masks.Mask, heads: int, T: int, S: int, tile: Tiling) -> Kinds:
    """The kinds of all pieces of a mask; heads whose masks are alike share a table."""
    found = schedule.numbered(mask, heads, T, S, tile.block_q, tile.piece, MOST_KINDS)
    beyond = -found.tables.shape[2] % tile.pieces
    blocks = np.pad(found.tables, ((0, 0), (0, 0), (0, beyond)))
    blocks = blocks.reshape(*blocks.shape[:2], -1, tile.pieces)
    state = (blocks << (SHIFT + WIDTH * np.arange(tile.pieces))).sum(-1)
    corners = [_corners(kind, blocks, mask, T, S, tile) for kind, mask in enumerate(found.masks)]
    return Kinds(state.astype(np.int32), found.table, found.masks, tuple(corners))


@functools.lru_cache(maxsize=256)
def plan(
    mask: masks.Mask,
    heads: int,
    T: int,
    S: int,
    tile: Tiling,
    group: int = 0,
    dynamic: bool = False,
) -> Plan:
    """The pairs of a mask, by query tile, or by block of keys where `group` is given.

    Args:
      group: query heads of a key head, for a kernel that adds up over them (dK and dV).
      dynamic: whether segment ids decide about pieces too, so that no tile is known to be full.
    """
    found = kinds(mask, heads, T, S, tile)
    one = len(found.state) == 1
    tables = found.state if one else found.state[found.table]
    index, state, head = _pairs(tables, tile, group and 1 if one else group)
    regions = () if dynamic else _regions(state, tile)
    kinds_of = pieces_of(state, tile)
    for number, region in enumerate(regions, 1):
        state = state + ((kinds_of == region).all(1) * number << REGION)
    state = state + (sampled(kinds_of) << SAMPLE)
    return Plan(
        index, state.astype(np.int32), None if one else head, found.masks, found.corners, regions
    )


def pieces_of(state: np.ndarray, tile: Tiling) -> np.ndarray:
    """The kinds of the pieces of pairs, [P, pieces]."""
    return state[:, None] >> SHIFT + WIDTH * np.arange(tile.pieces) & MOST_KINDS - 1


def sampled(kinds_of):
    """The first full piece, else the first live one, of kinds [..., pieces]."""
    full, live = np.equal(kinds_of, 1), np.greater(kinds_of, 0)
    return np.where(full.any(-1), full.argmax(-1), live.argmax(-1))


def _regions(state, tile):
    """The kinds of blocks on which most work is spent, as far as code may grow."""
    found, counts = np.unique(pieces_of(state, tile), axis=0, return_counts=True)
    live = (found > 0).sum(1)
    chosen, code = [], 0
    for i in np.argsort(-counts * live, kind="stable"):
        fits = live[i] and code + live[i] <= MOST_CODE and len(chosen) < MOST_REGIONS
        if fits:
            chosen.append(tuple(found[i].tolist()))
            code += live[i]
    return tuple(chosen)


def _corners(kind, blocks, mask, T, S, tile):
    """See Plan.corners; blocks are the kinds of all pieces."""
    ragged = T % tile.block_q or S % tile.piece or S % tile.block_kv
    if kind < 2 or mask.names_heads() or ragged or tile.block_q % 256 or tile.piece % 256:
        return None
    halves = mask.blocks(1, T, S, tile.block_q // 2, tile.piece // 2)[0]
    halves = halves.reshape(T // tile.block_q, 2, S // tile.piece, 2).transpose(0, 2, 1, 3)
    here = (blocks.reshape(len(blocks), *halves.shape[:2]) == kind).any(0)
    each = np.unique(halves[here].reshape(-1, 4), axis=0)
    return tuple(map(tuple, each.reshape(2, 2).tolist())) if len(each) == 1 else None


def _pairs(states, tile, group):
    """index, state, head: the lists of all heads, one after the other.

    By tile of queries, blocks with a full piece come first: every query sees keys of such a block.

    By key block (group > 0) the heads that share a key head follow each other within a block.
    """
    columns = []
    for head, state in enumerate(states):
        q, kv = _with_idle(*np.nonzero(state), state.shape, group)
        owner = (head // group, kv) if group else (head, q)
        columns.append(np.stack(np.broadcast_arrays(*owner, head, q, kv, state[q, kv])))
    outer, inner, head, q, kv, state = np.concatenate(columns, 1)
    late = 0 * kv if group else ~(pieces_of(state, tile) == 1).any(1)
    order = np.lexsort((q if group else kv, late, head, inner, outer))
    outer, inner, head, q, kv, state = (x[order] for x in (outer, inner, head, q, kv, state))
    change = (outer[1:] != outer[:-1]) | (inner[1:] != inner[:-1])
    first, last = np.concatenate([[True], change]), np.concatenate([change, [True]])
    state = state + FIRST * first + LAST * last
    index = q << 16 | kv
    return index.astype(np.int32), state.astype(np.int32), head.astype(np.int32)


def _with_idle(q, kv, shape, group):
    """Adds one pair, all of whose pieces are empty, for a row that has none: it gets written."""
    rows, mine = (shape[1], kv) if group else (shape[0], q)
    idle = np.setdiff1d(np.arange(rows), mine)
    none = np.zeros_like(idle)
    q, kv = (np.append(q, none if group else idle), np.append(kv, idle if group else none))
    return q, kv


def _even(length, most):
    """The smallest multiple of 128 that cuts `length` into as few parts as `most` does."""
    parts = -(-length // most)
    return -(-length // (128 * parts)) * 128
