"""Sizes of the TPU kernels of `monarch_matmul`, and what they cannot do."""

import math
from typing import NamedTuple

from pallas_kernels.interleave import LANES
from pallas_kernels.tpu_chip import Chip, chip

# Rows of a step. More amortise what a step costs and the weights pushed into the matrix unit; fewer
# take less memory and compile sooner.
ROWS = (512, 256, 128)
LEAST_ROWS = 128
SUM_ROWS = (1024, 512, 256, 128)
# Rows that pass through all of the kernel before the next ones, so that exchanges of one part run
# beside products of the other. Microseconds in one part and in two of 512 (libtpu 0.0.52): forward
# v6e 8192 by 16 201 and 196, 4096 by 4 167 and 173; v5p 4096 by 32 54 and 52. Backward, in one part
# of 256 and in two of 512: v5p 4096 by 32 142 and 131, 2048 by 4 181 and 179; v6e 4096 by 8 217 and
# 214. Half where outputs are wide, if a matrix unit is no deeper: backward 1024 to 4096 by 8 in two
# parts and in four v5e 177 and 159, v5p 81 and 73; 2048 to 8192 by 8 v6e 138 and 205.
CHUNK = 256
# FLOPs of a step beyond which its products are loops and not one straight piece of code. In one,
# the exchanges run while the matrix unit is at work; 2**32 of them are 32,768 bundles on a v5e.
# On a v6e 4096 by 4 forward is 0.84 of the roofline in one piece, 0.65 in loops of 2**29 a turn and
# 0.76 of 2**31.
STRAIGHT_FLOPS = 10 * 2**30


class Plan(NamedTuple):
    """Static facts of a call: x [M, K p], right [K, p, q], left [L, r, s], K q = L r.

    transposed: x is [M, L s] and is multiplied by the transposed matrix.
    kept: what is between the factors leaves the forward pass and enters the backward pass.
    chip: that it is for. lent: a backward pass has blocks of dy where dx will be, as wide.
    rows: of a step. cores: equal shares of the steps, each with its own copy of the weights.
    packed: rows of a word of 32 bits.
    """

    M: int
    K: int
    p: int
    q: int
    L: int
    r: int
    s: int
    rows: int
    itemsize: int
    backward: bool
    transposed: bool = False
    kept: bool = False
    chip: Chip = Chip()
    lent: bool = False

    @property
    def packed(self) -> int:
        return 4 // self.itemsize

    @property
    def words(self) -> int:
        return self.rows // self.packed

    @property
    def steps(self) -> int:
        return -(-self.M // self.rows)

    @property
    def cores(self) -> int:
        return self.chip.shares(self.steps)

    @property
    def inputs(self) -> int:
        return self.K * self.p

    @property
    def inner(self) -> int:
        return self.K * self.q

    @property
    def outputs(self) -> int:
        return self.L * self.s

    @property
    def weights(self) -> int:
        """Elements of both factors."""
        return self.K * self.p * self.q + self.L * self.r * self.s

    @property
    def chunk(self) -> int:
        """Rows that are done at a time; all where weights are few and large, or code in loops."""
        if not self.straight or (not self.backward and self.L < 8):
            return self.rows
        wide = self.backward and self.outputs > 2 * self.inputs and self.chip.ridge is not None
        return min(self.rows, max(self.chip.mxu, CHUNK // 2) if wide else CHUNK)

    @property
    def turn(self) -> int:
        """Tiles of weights that are ordered together: start and end of one hide behind others."""
        return next(n for n in (4, 2, 1) if self.inner // LANES % n == 0)

    @property
    def sum_rows(self) -> int:
        """Rows of a step of the kernels that add up gradients of one block; 0 where none fit."""
        block = max(self.p * self.q, self.r * self.s) * (8 + 2 * self.itemsize)
        row = 2 * max(self.p + self.q, self.r + self.s) * self.itemsize
        fits = (rows for rows in SUM_ROWS if block + rows * row <= self.chip.planned)
        return next((rows for rows in fits if self.M % rows == 0), 0)

    @property
    def flops(self) -> int:
        """Of the forward product."""
        return 2 * self.M * self.weights

    @property
    def straight(self) -> bool:
        products = 5 - self.kept if self.backward else 2  # the first is computed again
        return products * self.rows * self.weights <= STRAIGHT_FLOPS

    @property
    def vmem(self) -> int:
        """Bytes of the windows, twice, the scratch and the prepared weights."""
        staging = 2 * self.turn * LANES * (self.p + self.s) * self.itemsize
        windows = 2 * (self.inputs + self.outputs)
        held, gradients = self.inner + self.outputs, 0  # in a backward pass registers put out, too
        if self.backward:
            windows += 2 * (self.outputs if self.transposed else self.inputs)
            held += self.outputs if self.transposed else self.inner
            gradients = 4 * self.weights
            windows += 2 * self.inner * self.kept
            if self.lent:  # where less than a MiB of registers was seen to be put out
                held -= self.inner + self.outputs
        elif self.kept:  # windows of what leaves, in place of scratch
            held -= self.inner
            windows += 2 * self.inner
            if self.transposed:
                held -= self.outputs
                windows += 2 * self.outputs
        rows = self.rows * self.itemsize * (windows + held)
        return rows + self.itemsize * self.weights + gradients + staging


def plan(
    M: int, right, left, itemsize: int, backward: bool, transposed: bool = False, kept: bool = False
) -> Plan:
    """The plan with the most rows that fit on the chip, in straight code where one is.

    The least rows where none fits. Lent where a chunk would not fit otherwise: backward v5p 8192 by
    32 is 358 us with 256 rows lent and 381 with 128. At equal rows a trial, which had words there
    in place of rows, was slower: 4096 by 32 v5p 127 us lent and 125, v6e 137 and 131.
    """
    (K, p, _), (L, _, s) = right.shape, left.shape
    lends = backward and kept and K * p == L * s
    plans = [
        Plan(M, *right.shape, *left.shape, rows, itemsize, backward, transposed, kept, chip(), lent)
        for rows in ROWS
        if rows <= max(M, LEAST_ROWS)
        for lent in ((False, True) if lends and rows == CHUNK else (False,))
    ]
    fits = [found for found in plans if found.vmem <= found.chip.planned] or plans[-1:]
    fits = [found for found in fits if found.cores == found.chip.cores] or fits  # or one is idle
    return next((found for found in fits if found.straight), fits[0])


def kept_backward(M: int, right, left, itemsize: int) -> Plan:
    """The plan of a backward pass that is given z: of one kernel, where it has rows enough.

    That is as many as a matrix unit is deep: with half of them a v6e takes 1,126 us for n 8192 in 8
    blocks, and 732 otherwise. Or else, with `transposed` and without `backward`, the plan of the
    first kernel of `tpu_stages`.
    """
    found = plan(M, right, left, itemsize, True, kept=True)
    if found.vmem <= found.chip.planned and found.rows >= found.chip.mxu:
        return found
    return plan(M, right, left, itemsize, False, transposed=True, kept=True)


def keeps(M: int, right, left, dtype) -> bool:
    """Whether the forward pass keeps z, M K q elements, for the backward pass.

    Where kernels can and its way to memory costs no time, beside products that take longer: for
    blocks of 256 and more on a v5p, of 512 on a v5e and of 1024 on a v6e; never where the chip is
    not known. Microseconds of both passes, z made again and kept (static schedule or HBM, libtpu
    0.0.52, bfloat16, M 8192): v5e 4096 by 8 1161 and 1088; v5p 4096 by 8 506 and 487, 4096 by 16
    281 and 257; v6e 4096 by 4 576 and 506. Where it is not kept: v5e 4096 by 16 614 and 628, 8192
    by 32 1280 and 1264; v6e 2048 by 4 150 and 151, 4096 by 8 308 and 302, 8192 by 16 634 and 629,
    no gain that is worth so much memory.
    """
    plans = (
        plan(M, right, left, dtype.itemsize, False, kept=True),
        kept_backward(M, right, left, dtype.itemsize),
    )
    if M % ROWS[0] or any(unsupported(found, dtype.name) for found in plans):
        return False
    forward, _ = plans
    moved = dtype.itemsize * M * (forward.inputs + forward.inner + forward.outputs)
    return forward.flops >= 0.9 * moved * (forward.chip.ridge or math.inf)


def unsupported(plan: Plan, dtype: str) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if dtype not in ("float32", "bfloat16"):
        return f"dtype {dtype}, not float32 or bfloat16"
    for name in ("p", "q", "r", "s"):
        if getattr(plan, name) % LANES:
            return f"{name} = {getattr(plan, name)} of the blocks is no multiple of {LANES}"
    if plan.L > LANES or plan.L & (plan.L - 1):
        return f"left has {plan.L} blocks, no power of two up to {LANES}"
    if plan.rows > plan.M:
        return f"M = {plan.M} rows, fewer than {LEAST_ROWS}"
    if plan.kept and plan.transposed and not plan.sum_rows:
        return "a block of the gradients does not fit on the chip"
    if plan.vmem > plan.chip.planned:
        return f"it would hold {plan.vmem / 2**20:.0f} of {plan.chip.planned >> 20} MiB on chip"
    return None
