"""What the ranks of a ring attend to, step by step: static, made while tracing.

In step r rank i holds the keys of rank i - r. A mask of the distance of query and key is to a chunk
of queries and a chunk of keys the same mask, moved by how far they lie apart: most pairs of chunks
see nothing or everything, and of the others there are few kinds.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from efficient.errors import UserError
from pallas_kernels.attention import Full, Mask, Window, masks

ORDERS = ("contiguous", "zigzag")


def zigzag(length: int, ways: int) -> Int[np.ndarray, "T"]:
    """The tokens of rank 0, of rank 1, ...: chunks i and 2 ways - 1 - i of 2 ways.

    `x[:, zigzag(T, P)]` has tokens in that order, and `np.argsort` of it is the way back.
    """
    if length % (2 * ways):
        near = max(1, round(length / (2 * ways))) * 2 * ways
        raise UserError(
            f"zigzag: a length of {length} does not divide into {2 * ways} chunks, two a rank; the"
            f" nearest that does is {near}"
        )
    chunks = np.arange(length).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


class Piece(NamedTuple):
    """A rectangle of scores: (start, stop) of a rank's queries and of the keys it holds."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    mask: Mask


class Step(NamedTuple):
    """A turn of the ring: rank i holds the keys of rank i - number, and has the work jobs[i]."""

    number: int
    jobs: tuple[tuple[Piece, ...], ...]


def plan(mask: Mask, length: int, ways: int, order: str) -> tuple[Step, ...]:
    """Which rank attends to what, in the steps in which one has something to see."""
    cut = 2 if order == "zigzag" else 1
    size = length // (cut * ways)
    _check_mask(mask, size)
    chunks = [(i, 2 * ways - 1 - i)[:cut] for i in range(ways)]
    steps = []
    for number in range(ways):
        jobs = tuple(_job(mask, size, chunks[i], chunks[i - number]) for i in range(ways))
        if number == 0 or any(jobs):
            steps.append(Step(number, jobs))
    return tuple(steps)


def _job(mask, size, queries, keys):
    """The pieces of a rank that holds these chunks of queries and of keys; few and large ones."""
    pairs = list(itertools.product(range(len(queries)), range(len(keys))))
    apart = {(x, y): queries[x] - keys[y] for x, y in pairs}
    found = {pair: _relation(mask, size, apart[pair]) for pair in pairs}
    live = [pair for pair in pairs if found[pair] != masks.EMPTY]
    if not live:
        return ()
    (top, left), (bottom, right) = np.min(live, 0).tolist(), np.max(live, 0).tolist()
    inside = [(x, y) for x, y in pairs if top <= x <= bottom and left <= y <= right]
    whole = (top * size, (bottom + 1) * size), (left * size, (right + 1) * size)
    if all(found[pair] == masks.FULL for pair in inside):
        return (Piece(*whole, Full()),)
    # Chunks that are neighbours on the rank alone may be taken for neighbours in the sequence where
    # the mask leaves the same of them, as a causal one does of a rank's own keys.
    if all(
        found[x, y] == _relation(mask, size, x - y)
        and (found[x, y] != masks.PARTIAL or apart[x, y] == x - y)
        for x, y in inside
    ):
        return (Piece(*whole, _moved(mask, (top - left) * size)),)
    return tuple(_piece(mask, size, x, y, apart[x, y], found[x, y]) for x, y in live)


def _piece(mask, size, x, y, apart, relation):
    rest = Full() if relation == masks.FULL else _moved(mask, apart * size)
    return Piece((x * size, (x + 1) * size), (y * size, (y + 1) * size), rest)


@functools.lru_cache(maxsize=4096)
def _relation(mask, size, distance):
    """EMPTY, PARTIAL or FULL: a chunk of queries and one of keys, `distance` chunks before it."""
    return int(_moved(mask, distance * size).blocks(1, size, size, size, size).item())


def _moved(mask, by):
    """The mask of queries that lie `by` tokens further on from the keys."""
    if isinstance(mask, (masks.And, masks.Or)):
        return type(mask)(tuple(_moved(each, by) for each in mask.masks))
    return dataclasses.replace(mask, offset=mask.offset + by) if "offset" in mask.movable else mask


def _check_mask(mask, size):
    """Keys take the mask along: it must depend on the distance of query and key alone."""
    if isinstance(mask, (masks.And, masks.Or)):
        for each in mask.masks:
            _check_mask(each, size)
    elif not isinstance(mask, (Full, masks.Empty)) and "offset" not in mask.movable:
        raise UserError(
            f"lightseq: {type(mask).__name__} is no mask of the distance of query and key (Full,"
            " Causal, Window); ulysses sees whole sequences and takes any"
        )
    elif isinstance(mask, Window) and size % mask.block:
        raise UserError(
            f"lightseq: {mask} has blocks that do not divide the {size} tokens of a chunk; ulysses"
            " sees whole sequences"
        )
