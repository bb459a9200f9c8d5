"""What the TPU compiler made of a program and of each Pallas kernel in it, with what follows."""

import dataclasses
import math
import re

from pallas_kernels.lab.chips import Chip, chip
from pallas_kernels.lab.schedule import Region, Schedule


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One Pallas kernel as compiled.

    Attributes:
      name: of the HLO instruction, such as `splash_mha_fwd.1`.
      grid: of its `pallas_call`; () where it has none, None for a size known only when it runs.
      parallel: whether a dimension of the grid is "parallel".
      target: chip kind.
      schedule: the static schedule.
      vmem_bytes: scoped VMEM the compiler gave it: windows, scratch and spilled registers.
      vmem_limit: what it may have at most: the kernel's own `vmem_limit_bytes` or the default.
    """

    name: str
    grid: tuple[int | None, ...]
    parallel: bool
    target: str
    schedule: Schedule
    vmem_bytes: int
    vmem_limit: int

    @property
    def chip(self) -> Chip:
        return chip(self.target)

    @property
    def steps(self) -> int | None:
        """Steps of the grid, on all cores together; None where that is known only at run time."""
        return None if None in self.grid else math.prod(self.grid)

    @property
    def core_share(self) -> float:
        """Part of the steps that one core takes: v5p's two share a "parallel" dimension."""
        trips, steps = self.schedule.loop_trips, self.steps
        if self.chip.cores == 1 or not self.schedule.has_loop or not self.parallel:
            return 1.0
        if trips is None or not steps:
            return 1.0 / self.chip.cores
        # Windows are fetched ahead and written behind in two passes of the loop more than it has
        # steps; without such windows passes and steps are equal.
        return (trips - 2) / steps if trips != steps and 0 < trips - 2 < steps else 1.0

    def alternatives(self, flops: float, live_steps: int | None = None) -> tuple[Region, ...]:
        """Regions taken to run instead of the largest one: a masked and an unmasked form, say.

        Guessed where the schedule has no counts: they use as many matrix-product slots as it does,
        to a tenth, and it alone has enough of them for a step's FLOPs. Arguments as for `mxu_use`.
        """
        schedule, largest = self.schedule, self.schedule.region
        if schedule.counts is not None:
            return ()
        flops_a_run = self._flops_a_run(flops, live_steps)
        if flops_a_run is None or flops_a_run > 1.5 * self._flops_of_slots(largest):
            return ()
        products = largest.slots.matmul
        return tuple(
            region
            for region in schedule.regions
            if region is not largest
            and region.runs == largest.runs
            and abs(region.slots.matmul - products) < 0.1 * products
        )

    @property
    def step_bundles(self) -> float | None:
        """Bundles that a grid step issues on average; None where the schedule has no counts."""
        steps = self.steps
        if self.schedule.cycles is None or not steps:
            return None
        return self.schedule.cycles / (steps * self.core_share)

    def _flops_a_run(self, flops: float, live_steps: int | None) -> float | None:
        steps = self.steps if live_steps is None else live_steps
        runs = self.schedule.region.runs
        return flops / (steps * runs) if steps and runs else None

    def _flops_of_slots(self, region: Region) -> float:
        per_slot = self.chip.flops_per_cycle / self.schedule.capacity.matmul
        return region.slots.matmul * per_slot

    def mxu_use(self, flops: float, live_steps: int | None = None) -> float | None:
        """Useful FLOPs over what the matrix units could do in the largest region's cycles.

        Args:
          flops: of the whole kernel, all grid steps together.
          live_steps: grid steps that run the region; all of them where None. Not asked for where
            the schedule has counts: the FLOPs are then shared among the regions of the loop by
            the products that each issues in the whole kernel.

        Returns:
          A fraction; None where the steps or an inner loop's length are not known. It may read
          above 1: bundles may hand products to the units faster than they take them.
        """
        schedule, region = self.schedule, self.schedule.region
        if schedule.matmul:
            here = flops * self.core_share * region.slots.matmul / schedule.matmul
            return here / (region.bundles * self.chip.flops_per_cycle)
        flops_a_run = self._flops_a_run(flops, live_steps)
        if flops_a_run is None:
            return None
        if schedule.loop_matmul and flops_a_run > 1.5 * self._flops_of_slots(region):
            # More than the region's products can be: the step's others are in other regions.
            flops_a_run *= region.slots.matmul * region.runs / schedule.loop_matmul
        return flops_a_run / (region.bundles * self.chip.flops_per_cycle)

    def schedule_seconds(
        self, flops: float | None = None, live_steps: int | None = None
    ) -> float | None:
        """Time of the schedule if nothing waited for memory.

        With counts of every bundle it is their sum. Without, a live step runs every predicated
        region of the loop but `alternatives`; another step does not run the largest either. None
        where the steps or an inner loop's length are unknown.

        Args:
          flops, live_steps: as for `mxu_use`; without `flops` no region counts as an alternative.
        """
        schedule = self.schedule
        if schedule.cycles is not None:
            return schedule.cycles / self.chip.clock
        steps = self.steps or live_steps
        if schedule.loop_cycles is None or not steps:
            return None
        if not schedule.has_loop:
            return schedule.loop_cycles / self.chip.clock
        live = steps if live_steps is None else min(live_steps, steps)
        others = self.alternatives(flops, live_steps) if flops else ()
        step = schedule.loop_cycles - sum(r.bundles * r.runs for r in others)
        cycles = step * steps - schedule.region.bundles * schedule.region.runs * (steps - live)
        once = schedule.bundles - schedule.loop_bundles
        return (cycles * self.core_share + once) / self.chip.clock


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one program.

    Attributes:
      target: as asked for.
      reason: "" where it compiled; else the stage and the compiler's own words, in one line.
      kernels: a report for each Pallas kernel, in the order of the compiled program.
      temp_bytes: HBM of temporaries of the whole program on one device.
      hlo: the compiled program's text.
    """

    target: str
    reason: str
    kernels: tuple[KernelReport, ...] = ()
    temp_bytes: int = 0
    hlo: str = dataclasses.field(default="", repr=False)

    @property
    def ok(self) -> bool:
        return not self.reason


def is_instruction_of(name: str, kernel: str) -> bool:
    """`k.1`, and of newer compilers `k.1.x`, are instructions of the kernel `k`."""
    stem = re.sub(r"[^\w.-]", "_", kernel)
    return name == stem or re.fullmatch(re.escape(stem) + r"\.\d+(\.\w+)?", name) is not None


# What the compiler says around the reason: the whole HLO instruction, where to report a bug.
_NOISE = (
    (re.compile(r"^.*?(?=Scoped allocation with size)"), "out of VMEM: "),
    (re.compile(r" It should not be possible to run out of scoped vmem.*$"), ""),
    (
        re.compile(r"^INTERNAL: Mosaic failed to compile TPU kernel.*?HLO name `[^`]*`: "),
        "Mosaic: ",
    ),
    (re.compile(r" Please (report a bug at|file an issue at):? \S+"), ""),
    (re.compile(r" See (details at )?https?://\S+( for more details\.)?"), ""),
    (re.compile(r" For simplicity, JAX has removed.*$"), ""),
)


def shorten(error: BaseException, limit: int = 300) -> str:
    """An exception of JAX or the compiler in one line: its own words, less what surrounds them."""
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, replacement in _NOISE:
        text = pattern.sub(replacement, text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
