"""Sizes of the TPU kernels of `block_diagonal_matmul`, and what they cannot do."""

from typing import NamedTuple

from pallas_kernels.block_diagonal_matmul.layout import Layout, layout
from pallas_kernels.interleave import LANES
from pallas_kernels.tpu_chip import Chip, chip

ROWS = (512, 256, 128)
# Bundles of a step's products, which are straight code, where it can be so short and yet have as
# many rows as a matrix unit is deep, or gradients of weights leave part of it idle: v6e 4096 by 4,
# both sides interleaved, backward 301 us with 128 rows and 174 with 512.
STEP_BUNDLES = 2**14
# Rows that are exchanged and multiplied together where blocks interleave, so that the exchanges of
# one part run beside the products of another. Bundles at 4096 by 16, both sides interleaved, in one
# part of 512 and in two (libtpu 0.0.52): on v5e 16,650 and 14,336 forward, 30,698 and 26,479
# backward; on v6e, where memory bounds either, 5,836 and 6,215, 10,245 and 12,039.
CHUNK = 256
# Columns of a product that is stored before the next is made.
WIDTH = 512


class Plan(NamedTuple):
    """Static facts of a call: x [M, K p], blocks [K, p, q].

    rows, each: rows and blocks of a step. shares: of the rows, each with its own sums of the
    weights' gradients. buffers: of the weights' windows. chip: that it is for.
    """

    M: int
    K: int
    p: int
    q: int
    inputs: Layout | None
    outputs: Layout | None
    itemsize: int
    backward: bool
    activation: bool
    rows: int = LANES
    each: int = 1
    buffers: int = 1
    chip: Chip = Chip()

    @property
    def packed(self) -> int:
        return 4 // self.itemsize

    @property
    def words(self) -> int:
        return self.rows // self.packed

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First row and count of what is done at a time in a step."""
        one = CHUNK if self.inputs.tiles is None or self.outputs.tiles is None else self.rows
        one = min(one, self.rows)
        return [(first, one) for first in range(0, self.rows, one)]

    @property
    def steps(self) -> int:
        return -(-self.M // self.rows)

    @property
    def groups(self) -> int:
        return self.K // self.each

    @property
    def shares(self) -> int:
        """More than one where the chip's cores could not share the groups."""
        alone = self.backward and self.groups % self.chip.cores
        return self.chip.shares(self.steps) if alone else 1

    @property
    def products(self) -> int:
        return 2 + self.activation if self.backward else 1

    @property
    def step_flops(self) -> int:
        return 2 * self.rows * self.each * self.p * self.q * self.products

    @property
    def flops(self) -> int:
        return 2 * self.M * self.K * self.p * self.q * self.products

    @property
    def vmem(self) -> int:
        """Bytes of the windows, the scratch and a block's products, which the compiler may hold."""
        p, q = self.p, self.q
        rows = self.rows * self.each * self.itemsize
        windows = 2 * rows * ((2 * p + q) if self.backward else (p + q))
        sides = (p, self.inputs), (q, self.outputs)
        held = rows * sum(width for width, side in sides if side.tiles is None)
        weights = self.buffers * self.each * p * q * (self.itemsize + 4 * self.backward)
        products = self.rows * (p + q) * (3 if self.activation else 1)
        if self.backward:
            products += p * min(q, WIDTH)
        return windows + held + weights + 4 * products


def plan(M, blocks, inputs, outputs, itemsize, backward, activation) -> Plan | str:
    """The plan of the most rows, then blocks, a step; or why there is none."""
    K, p, q = blocks.shape
    for name, size in (("p", p), ("q", q)):
        if size % LANES:
            return f"{name} = {size} of the blocks is no multiple of {LANES}"
    sides = layout(inputs, K, p, False), layout(outputs, K, q, True)
    named = ("inputs", inputs), ("outputs", outputs)
    for (name, permutation), side in zip(named, sides, strict=True):
        if side is None:
            return (
                f"permute_{name} {permutation!r:.40} moves between blocks neither tiles of "
                f"{LANES} features nor those of a power of two blocks in turn"
            )
    if M < LANES:
        return f"M = {M} rows, fewer than {LANES}"
    base = Plan(M, K, p, q, *sides, itemsize, backward, activation, chip=chip())
    whole = not all(side.in_place for side in sides)  # rows, which have all blocks
    shapes = [(n, each) for n in ROWS if n <= M for each in range(K, 0, -1) if K % each == 0]
    options = [
        base._replace(rows=rows, each=each, buffers=buffers)
        for rows, each in shapes
        for buffers in (2, 1)
        if each == K or not whole
    ]
    fits = [option for option in options if option.vmem <= base.chip.planned]
    if not fits:
        least = min(option.vmem for option in options)
        return f"it would hold {least / 2**20:.0f} of {base.chip.planned >> 20} MiB on chip"
    most = STEP_BUNDLES * base.chip.bundle_flops
    deep = [found for found in fits if found.rows >= base.chip.mxu] or fits
    short = [found for found in deep if found.each == 1 or found.step_flops <= most]
    return short[0] if short else min(deep, key=lambda option: option.step_flops)
