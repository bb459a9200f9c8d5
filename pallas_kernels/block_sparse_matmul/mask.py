"""Which blocks of a matrix are live: static, hashable, equal by value."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True, init=False)
class BlockMask:
    """A matrix of booleans, one a block of W: rows are blocks of inputs, columns of outputs.

    Live blocks are numbered in row-major order, which is that of the array `blocks` of the op.

    Args:
      live: bool [I / bi, O / bo], NumPy or nested lists.

    Raises:
      ValueError: no matrix, none of its sizes positive, or entries that are not boolean.
    """

    shape: tuple[int, int]
    packed: bytes

    def __init__(self, live):
        live = np.asarray(live)
        if live.ndim != 2 or 0 in live.shape or live.dtype != bool:
            raise ValueError(
                "BlockMask: live must be a bool matrix [I / bi, O / bo] with no axis of 0, got "
                f"{live.dtype} {list(live.shape)}"
            )
        object.__setattr__(self, "shape", tuple(map(int, live.shape)))
        object.__setattr__(self, "packed", np.packbits(live).tobytes())

    @functools.cached_property
    def live(self) -> np.ndarray:
        """bool [rows, columns], read-only."""
        bits = np.unpackbits(
            np.frombuffer(self.packed, np.uint8), count=self.shape[0] * self.shape[1]
        )
        found = bits.astype(bool).reshape(self.shape)
        found.flags.writeable = False
        return found

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """int [rows, columns], the number of each live block; of no meaning elsewhere."""
        return np.cumsum(self.live).reshape(self.shape) - 1

    @property
    def count(self) -> int:
        """Live blocks."""
        return int(self.live.sum())

    @property
    def density(self) -> float:
        """Live blocks over all blocks."""
        return self.count / self.live.size

    @functools.cached_property
    def columns(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each column its live (row, number), by row."""
        return _lines(self.live.T, self.numbers.T)

    @functools.cached_property
    def rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each row its live (column, number), by column."""
        return _lines(self.live, self.numbers)


def flat_butterfly(rows: int, columns: int, size: int, factors: int) -> BlockMask:
    """A flat butterfly of `size` blocks with `factors` strides, stretched to rows x columns.

    Block (p, q) is live where i = j or i xor j is one of 1, 2 ... 2^(factors - 1), for
    i = p size // rows and j = q size // columns.
    """
    i, j = (np.arange(n) * size // n for n in (rows, columns))
    return BlockMask(np.isin(i[:, None] ^ j, [0, *(2**f for f in range(factors))]))


def _lines(live, numbers):
    return tuple(
        tuple((int(i), int(number[i])) for i in np.flatnonzero(line))
        for line, number in zip(live, numbers, strict=True)
    )
