"""Sizes of the TPU kernels of `butterfly_matmul`, and what they cannot do."""

from typing import NamedTuple

from pallas_kernels.tpu_chip import Chip, chip

LANES = 128
ROWS = (512, 256, 128)
# Bundles of a step's products, which are straight code, where it can be so short and yet have as
# many rows as a matrix unit is deep, or gradients of weights leave part of it idle: v6e 16 blocks
# of 256 backward 616 us with 128 rows and 422 with 256.
STEP_BUNDLES = 2**14


class Plan(NamedTuple):
    """Static facts of a call: x [M, N], factors of N / b blocks of b features, b above 1.

    rows: of a step. chip: that it is for.
    """

    M: int
    N: int
    b: int
    increasing: bool
    itemsize: int
    backward: bool
    rows: int = LANES
    chip: Chip = Chip()

    @property
    def stages(self) -> int:
        return (self.N // self.b).bit_length() - 1

    @property
    def lane_stages(self) -> int:
        """Stages within the lanes of a register, which are one product."""
        return max(0, (LANES // self.b).bit_length() - 1)

    @property
    def outer(self) -> list[tuple[int, int]]:
        """(number, stride in tiles) of the other stages, in the order in which they are applied."""
        count = self.stages - self.lane_stages
        if self.increasing:
            return [(self.lane_stages + i, 2**i) for i in range(count)]
        return [(i, 2 ** (count - 1 - i)) for i in range(count)]

    @property
    def turns(self) -> int:
        return len(self.outer)

    def joined(self, turn: int) -> list[tuple[int, int]]:
        """The pairs of tiles that the turn's stage joins."""
        step = self.outer[turn][1]
        return [(t, t + step) for t in range(self.tiles) if t // step % 2 == 0]

    @property
    def lanes_first(self) -> bool:
        return self.lane_stages > 0 and self.increasing

    @property
    def lanes_last(self) -> bool:
        return self.lane_stages > 0 and not self.increasing

    @property
    def tile(self) -> int:
        return max(LANES, self.b)

    @property
    def tiles(self) -> int:
        return self.N // self.tile

    @property
    def steps(self) -> int:
        return -(-self.M // self.rows)

    @property
    def shares(self) -> int:
        """Of the rows, whose gradients of weights each core of the chip sums apart."""
        return self.chip.shares(self.steps) if self.backward else 1

    @property
    def weights(self) -> int:
        """Elements of the matrices."""
        lanes = self.N * LANES if self.lane_stages else 0
        return lanes + len(self.outer) * self.N * 2 * self.tile

    @property
    def flops(self) -> int:
        """Of the products of matrices; the backward pass makes again what it starts from."""
        lanes = self.N * LANES if self.lane_stages else 0
        outer = self.weights - lanes
        if self.backward:
            lanes *= 3 if self.lanes_first and self.turns else 2
            outer = 3 * outer - (0 if self.lanes_last or not outer else outer // self.turns)
        return 2 * self.M * (lanes + outer)

    @property
    def saved(self) -> int:
        """Arrays [rows, N] in scratch: in the backward pass all values between products."""
        if not self.turns:
            return 0
        between = self.turns - 1 + (self.lane_stages > 0)
        return between if self.backward else min(1, between)

    @property
    def vmem(self) -> int:
        """Bytes of the windows of rows, twice, scratch and weights."""
        arrays = self.saved + self.backward + 2 * (3 if self.backward else 2)
        sums = 4 * self.weights * self.backward
        return self.itemsize * (self.rows * self.N * arrays + self.weights) + sums


def plan(x, twiddle, increasing, backward) -> Plan | str:
    """The plan of the most rows a step; or why there is none."""
    (M, N), b = x.shape, twiddle.shape[-1]
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"dtype {x.dtype.name}, not float32 or bfloat16"
    if b & (b - 1) or N % LANES:
        return f"{N} features in blocks of {b}, no power of two of at least {LANES}"
    if M < LANES:
        return f"M = {M} rows, fewer than {LANES}"
    base = Plan(M, N, b, increasing, x.dtype.itemsize, backward, chip=chip())
    options = [base._replace(rows=rows) for rows in ROWS if rows <= M]
    fits = [option for option in options if option.vmem <= base.chip.planned]
    if not fits:
        return (
            f"it would hold {options[-1].vmem / 2**20:.0f} of {base.chip.planned >> 20} MiB on chip"
        )
    most = STEP_BUNDLES * base.chip.bundle_flops
    deep = [option for option in fits if option.rows >= base.chip.mxu] or fits
    return next((p for p in deep if p.flops * p.rows <= most * p.M), deep[-1])
