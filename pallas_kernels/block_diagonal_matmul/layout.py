"""Where the features of each block lie along lanes, and what order the kernels read them in.

A permutation matters to a kernel only by which block a feature belongs to: within a block features
may stand in any order, since the weights' rows and columns can stand in the same.
"""

import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.interleave import LANES


class Layout(NamedTuple):
    """An array's features, [K p] of it in true order, by block.

    tiles: for each block its tiles of 128 lanes; None where L blocks interleave.
    interleaved: L, 1 where tiles do. Window j of K / L neighbouring windows of L p features then
      has blocks l * (K / L) + j, feature f belonging to l = f % L; `interleave.collect` separates
      them.
    order: [K, p], the feature of block k that the kernel has in its lane r; None: r itself.
    """

    tiles: tuple[tuple[int, ...], ...] | None
    interleaved: int
    order: np.ndarray | None

    @property
    def in_place(self) -> bool:
        """Whether each block's features are where they would be without a permutation."""
        if self.tiles is None:
            return False
        lined_up = sum(self.tiles, ())
        return lined_up == tuple(range(len(lined_up)))


def place_of(permutation, features: int, outputs: bool) -> np.ndarray:
    """For each feature in its true order, its place among blocks one behind the other."""
    if permutation is None:
        return np.arange(features)
    order = permutation.order(features)
    return order if outputs else np.argsort(order)


@functools.lru_cache(maxsize=256)
def layout(permutation, K: int, p: int, outputs: bool) -> Layout | None:
    """The layout of inputs or outputs under a permutation; None where the kernels have none."""
    place = place_of(permutation, K * p, outputs)
    owner, feature = place // p, place % p
    by_tile = owner.reshape(-1, LANES)
    if (by_tile == by_tile[:, :1]).all():
        tiles = tuple(tuple(np.flatnonzero(by_tile[:, 0] == k).tolist()) for k in range(K))
        lanes = np.array(tiles)[..., None] * LANES + np.arange(LANES)
        return Layout(tiles, 1, _order(feature[lanes.reshape(K, p)]))
    at = np.arange(K * p)
    for L in (2, 4, 8, 16, 32, 64, 128):
        if K % L == 0 and np.array_equal(owner, at % L * (K // L) + at // (p * L)):
            return Layout(None, L, _order(feature[_collected(K, p, L)]))
    return None


def _collected(K, p, L) -> np.ndarray:
    """[K, p], which feature of the array `collect` brings to each lane of each block."""
    found = np.empty((K, p), int)
    lane = np.arange(LANES)
    for block in range(K):
        member, window = divmod(block, K // L)
        turn = (lane - member) % LANES  # lane (j L + l + t) % 128 is from tile t, lane j L + l
        source = turn % L * LANES + turn // L * L + member
        for group in range(p // LANES):
            base = window * p * L + group * LANES * L
            found[block, group * LANES : (group + 1) * LANES] = base + source
    return found


def _order(order):
    return None if (order == np.arange(order.shape[1])).all() else order
