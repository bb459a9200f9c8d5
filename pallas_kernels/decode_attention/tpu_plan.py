"""What the TPU kernel visits: static sizes, and the list of blocks that rows hold."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.decode_attention.settings import Settings

# Bytes of a block of keys; as many of values. Larger ones amortise a step, smaller ones waste less.
BLOCK_BYTES = 2**20
# Scores of a block, float32, of which a few copies live at a time.
SCORE_BYTES = 2**20
# A contiguous cache is cut into pages of so many keys, at most: the least that a copy moves.
PIECE = 128
# Blocks whose copies are under way while another is in use.
AHEAD = 2


class Plan(NamedTuple):
    """Static facts of a call. A row is one of B x splits; its blocks are `block` keys each.

    rows: query rows of one product, N * T padded to whole registers.
    page: keys of a page. block: keys of a block, `pages` pages. blocks: of a whole row.
    table: pages of a row in the table of pages.
    cores: equal shares of the rows, each with its own list of blocks.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    rows: int
    page: int
    pages: int
    table: int
    blocks: int
    splits: int
    cores: int
    settings: Settings

    @property
    def block(self) -> int:
        return self.page * self.pages

    @property
    def columns(self) -> int:
        """Keys of all heads in a block: rows of the matrix that it is."""
        return self.block * self.K

    @property
    def units(self) -> int:
        """Blocks of a core's rows, where every row is full."""
        return self.B * self.splits // self.cores * -(-self.blocks // self.splits)


def plan(q, k_cache, pages, settings: Settings) -> Plan:
    """The sizes for arrays as in `tpu.forward`."""
    B, T, N, H = q.shape
    size, K = k_cache.shape[1:3]
    page = piece(size, K, q.dtype) if pages is None else size
    table = size // page if pages is None else pages.shape[1]
    sublanes = 32 // q.dtype.itemsize
    rows = -(-N * T // sublanes) * sublanes
    most = min(
        BLOCK_BYTES // (K * H * q.dtype.itemsize), SCORE_BYTES // (4 * rows * K)
    )  # fmt: skip
    count = max(1, min((settings.block or most) // page, table))
    count = 2 ** (count.bit_length() - 1)  # waits are for powers of two
    splits = settings.splits or 1
    cores = 2 if B * splits % 2 == 0 else 1
    return Plan(
        B, T, N, K, H, rows, page, count, table, -(-table // count), splits, cores, settings
    )


def piece(size: int, K: int, dtype) -> int:
    """Keys of the pages into which a contiguous cache is cut; 0 where none is aligned."""
    tile = 32 // dtype.itemsize
    found = [n for n in range(1, PIECE + 1) if size % n == 0 and n * K % tile == 0]
    return max(found, default=0)


def work(lengths, plan: Plan):
    """The blocks that the rows hold, one unit each, in the order of the rows.

    A row that holds none has one unit all the same, which writes its result.

    Returns:
      {"row", "block", "live": int32 [cores * units], "count": int32 [cores]}. The row counts splits
      too. Two bits below a block's number tell the first (1) and the last (2) of its row. "live"
      is 16 bits each for the first page of the block that any query sees and for the end of those.
      Units beyond a core's count are the last one's row.
    """
    seen = plan.settings.first(lengths, plan.T)
    first = seen // plan.block
    blocks = -(-lengths // plan.block) - first
    each = -(-blocks // plan.splits)
    offset = jnp.arange(plan.splits) * each[:, None]
    held = jnp.maximum(jnp.clip(blocks[:, None] - offset, 0, each[:, None]), 1)
    by_row = first[:, None] + offset, seen // plan.page, -(-lengths // plan.page)
    start, low, high = (
        jnp.broadcast_to(x.reshape(plan.B, -1), held.shape).reshape(plan.cores, -1) for x in by_row
    )
    ends = jnp.cumsum(held.reshape(plan.cores, -1), axis=1)
    begins = ends - held.reshape(plan.cores, -1)
    unit = jnp.arange(plan.units)
    # Sums over the rows begun and no gathers, which are slow on a TPU.
    begun = unit[:, None] >= begins[:, None, :]

    def of_row(x):
        return jnp.where(begun, jnp.diff(x, axis=1, prepend=0)[:, None, :], 0).sum(-1)

    block = of_row(start - begins) + unit
    flags = (unit == of_row(begins)) + 2 * (unit + 1 == of_row(ends))
    pages = (jnp.clip(of_row(x) - block * plan.pages, 0, plan.pages) for x in (low, high))
    low, high = pages
    row = begun.sum(-1) - 1 + jnp.arange(plan.cores)[:, None] * begins.shape[1]
    found = {"row": row, "block": block << 2 | flags, "live": low << 16 | high}
    found = {name: x.reshape(-1).astype(jnp.int32) for name, x in found.items()}
    return found | {"count": ends[:, -1].astype(jnp.int32)}
