"""Some rows of a tile by their blocks' layout: read out of it, and written into it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_diagonal_matmul.layout import Layout
from pallas_kernels.interleave import LANES, WORDS, collect, pack, spread, tile, unpack


class Side(NamedTuple):
    """A tile of inputs or outputs.

    ref: [rows, each width], in true order.
    words: scratch of 32-bit words [rows / packed, K width] where blocks interleave: the blocks one
      behind the other, between `separate` or `write` and `read` or `join`.
    width: of a block.
    first, count: the rows that are at work.
    """

    ref: Any
    words: Any
    layout: Layout
    width: int
    first: int
    count: int

    def separate(self):
        """Interleaved blocks, one behind the other into `words`."""
        for tiles, blocks, rows, words in self._exchanges():
            packed = [pack(self.ref[rows, tile(i)]) for i in tiles]
            for at, collected in zip(blocks, collect(packed), strict=True):
                self.words[words, tile(at)] = collected

    def join(self):
        """The inverse of `separate`."""
        for tiles, blocks, rows, words in self._exchanges():
            separate = [self.words[words, tile(at)] for at in blocks]
            for at, joined in zip(tiles, spread(separate), strict=True):
                self.ref[rows, tile(at)] = unpack(joined, self.ref.dtype)

    def _exchanges(self):
        """L tiles of `ref`, the L tiles of `words` that they make, rows of both."""
        if self.layout.tiles is not None:
            return
        L, packed = self.layout.interleaved, self.ref.shape[0] // self.words.shape[0]
        groups, windows = self.width // LANES, self.ref.shape[1] // self.width // L
        for window in range(windows):
            for group in range(groups):
                first = (window * groups + group) * L
                blocks = [(i * windows + window) * groups + group for i in range(L)]
                for row in range(self.first // packed, (self.first + self.count) // packed, WORDS):
                    rows = pl.ds(row * packed, WORDS * packed)
                    yield range(first, first + L), blocks, rows, pl.ds(row, WORDS)

    def read(self, k: int):
        """[count, width] of block k, in its lanes' order."""
        rows, columns = pl.ds(self.first, self.count), pl.ds(k * self.width, self.width)
        if self.layout.tiles is None:
            packed = self.ref.shape[0] // self.words.shape[0]
            words = self.words[pl.ds(self.first // packed, self.count // packed), columns]
            return unpack(words, self.ref.dtype)
        if self.layout.in_place:
            return self.ref[rows, columns]
        parts = [self.ref[rows, tile(i)] for i in self.layout.tiles[k]]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)

    def write(self, k: int, column: int, values):
        """Puts `values`, rounded, into block k from this column on."""
        rows, values = pl.ds(self.first, self.count), values.astype(self.ref.dtype)
        columns = pl.ds(k * self.width + column, values.shape[1])
        if self.layout.tiles is None:
            packed = self.ref.shape[0] // self.words.shape[0]
            words = pl.ds(self.first // packed, self.count // packed)
            self.words[words, columns] = pack(values)
        elif self.layout.in_place:
            self.ref[rows, columns] = values
        else:
            for i, at in enumerate(self.layout.tiles[k][column // LANES :]):
                if i * LANES < values.shape[1]:
                    self.ref[rows, tile(at)] = values[:, i * LANES : (i + 1) * LANES]
