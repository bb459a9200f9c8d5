"""Boxing: from the signature a tensor has to the one it is wanted with, and the bytes of that.

With p devices along the axis and T the bytes of the tensor that they hold together, all devices
together send

    S(i) -> S(i), B -> B, P -> P      none                0
    B -> S(i)                         slice               0
    B -> P, S(i) -> P                 none                0     zeros beside what there is
    S(i) -> S(j)                      all-to-all          (p - 1) / p T
    S(i) -> B                         all-gather          (p - 1) T
    P -> S(i)                         reduce-scatter      (p - 1) T
    P -> B                            all-reduce          2 (p - 1) T

and each device a p-th of that, by the rings that reach these bounds. These are the totals by which
OneFlow chooses (`sbp_infer_util.cpp`); the bytes of one device are derived.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence

from efficient.parallel.sbp_ops import B, Sbp, Signature, fits


@dataclasses.dataclass(frozen=True)
class Move:
    """One change of a tensor's signature, along one mesh axis.

    Attributes:
      axis: index of the mesh axis.
      before, after: signatures along all axes.
      collective: `none`, `slice`, `all-gather`, `reduce-scatter`, `all-reduce` or `all-to-all`.
      payload: T, bytes of what the devices along the axis hold together.
      total: bytes that all devices along the axis send together.
    """

    axis: int
    before: Signature
    after: Signature
    collective: str
    payload: int
    total: int


def boxing(source: Sbp, target: Sbp, devices: int, payload: int) -> tuple[str, int]:
    """(collective, bytes that all `devices` along the axis send together)."""
    if source == target:
        return "none", 0
    kinds = source.kind + target.kind
    if kinds == "PP":  # a part of a sum is no part of a maximum: it is summed first
        return "all-reduce", 2 * (devices - 1) * payload
    if kinds in ("BP", "SP"):
        return "none", 0
    return {
        "BS": ("slice", 0),
        "SS": ("all-to-all", (devices - 1) * payload // devices),
        "SB": ("all-gather", (devices - 1) * payload),
        "PS": ("reduce-scatter", (devices - 1) * payload),
        "PB": ("all-reduce", 2 * (devices - 1) * payload),
    }[kinds]


Cost = tuple[int, int, int]  # bytes that all devices of the mesh send, collectives, moves


# Where axes split different dimensions: what makes a tensor smaller on a device comes first, what
# makes it larger last.
_ORDER = {"BS": 0, "PS": 1, "SS": 2, "PP": 3, "PB": 3, "BP": 3, "SB": 4, "SP": 5}


@functools.lru_cache(maxsize=100_000)
def moves(
    source: Signature,
    target: Signature,
    shape: tuple[int, ...],
    nbytes: int,
    sizes: tuple[int, ...],
) -> tuple[Cost, tuple[Move, ...]]:
    """The cheapest way between signatures over several axes, one axis at a time.

    A dimension that several axes split lies with the first axis slowest, so an axis changes only
    while no later one splits the same dimension.

    Args:
      shape, nbytes: of the whole tensor.
      sizes: devices along each mesh axis.
    """
    changed = [i for i, (s, t) in enumerate(zip(source, target, strict=True)) if s != t]
    dims = [
        {one.axis for one in (s, t) if one.kind == "S"} for s, t in zip(source, target, strict=True)
    ]
    if any(dims[i] & dims[j] for i in changed for j in range(len(dims)) if i != j):
        return _search(source, target, shape, nbytes, sizes)
    cost, path, here = (0, 0, 0), [], source
    for axis in sorted(changed, key=lambda i: _ORDER[source[i].kind + target[i].kind]):
        after = (*here[:axis], target[axis], *here[axis + 1 :])
        move, added = _move(here, after, axis, nbytes, sizes)
        cost, here = tuple(a + b for a, b in zip(cost, added, strict=True)), after
        path.append(move)
    return cost, tuple(path)


def _search(
    source: Signature,
    target: Signature,
    shape: tuple[int, ...],
    nbytes: int,
    sizes: tuple[int, ...],
) -> tuple[Cost, tuple[Move, ...]]:
    """`moves` by Dijkstra's algorithm over the signatures between the two."""
    choices = [dict.fromkeys((s, t, B)) for s, t in zip(source, target, strict=True)]
    queue: list[tuple[Cost, int, Signature, tuple[Move, ...]]] = [((0, 0, 0), 0, source, ())]
    count, done = itertools.count(1), set()
    while queue:
        cost, _, here, path = heapq.heappop(queue)
        if here == target:
            return cost, path
        if here in done:
            continue
        done.add(here)
        for axis, options in enumerate(choices):
            for option in options:
                after = (*here[:axis], option, *here[axis + 1 :])
                if option == here[axis] or not _allowed(here, after, axis):
                    continue
                if fits(after, shape, sizes) is None:
                    move, added = _move(here, after, axis, nbytes, sizes)
                    total = tuple(a + b for a, b in zip(cost, added, strict=True))
                    heapq.heappush(queue, (total, next(count), after, (*path, move)))
    raise AssertionError(f"no way from {source} to {target}")  # through B there is always one


def _allowed(before: Signature, after: Signature, axis: int) -> bool:
    touched = {s.axis for s in (before[axis], after[axis]) if s.kind == "S"}
    return not any(s.kind == "S" and s.axis in touched for s in before[axis + 1 :])


def _move(
    before: Signature, after: Signature, axis: int, nbytes: int, sizes: Sequence[int]
) -> tuple[Move, Cost]:
    payload, groups = nbytes, 1
    for i, (n, one) in enumerate(zip(sizes, before, strict=True)):
        if i != axis:
            groups *= n
            payload //= n if one.kind == "S" else 1
    collective, total = boxing(before[axis], after[axis], sizes[axis], payload)
    move = Move(axis, before, after, collective, payload, total)
    return move, (total * groups, int(collective not in ("none", "slice")), 1)
