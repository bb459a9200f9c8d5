"""One line of the report: a Pallas kernel at a case on a target, with its predicted time."""

import dataclasses

from pallas_kernels.lab.case import Case, Program
from pallas_kernels.lab.chips import chip
from pallas_kernels.lab.report import KernelReport


@dataclasses.dataclass(frozen=True)
class Row:
    """What a compiler made of one kernel. A field is None where it does not apply or is unknown.

    Attributes:
      op, case, role, target: what was compiled.
      peer: "" for the op's own kernel, else the peer's name.
      kernel: the Pallas kernel's name; "" where nothing was compiled.
      label: of the program, such as its block sizes.
      reason: "" where it compiled, else why not.
      memory_bytes, memory_limit: VMEM of a TPU kernel, shared memory of a GPU kernel.
      vmem_operands: arguments and results that XLA keeps in VMEM around a TPU kernel.
      registers: a thread's, GPU.
      spills, fills: vector registers put out to VMEM and read back in one pass of the grid loop's
        code; bytes stored and loaded by a thread's spills, GPU.
      loop_bundles, region_bundles: of the grid loop and of its largest straight region.
      step_bundles: that a grid step issues on average; None where the scalar program could not be
        followed.
      alternatives: regions taken to run instead of that one, not beside it.
      mxu_use: useful FLOPs over the matrix units' peak in that region.
      vector_use: fraction of its vector-ALU slots in use.
      busiest: the slot nearest to full in it.
      busiest_use: how full that is.
      compute_s, memory_s: FLOPs over the peak, HBM bytes over the bandwidth.
      schedule_s: bundles of all grid steps over the clock.
    """

    op: str
    case: str
    role: str
    target: str
    peer: str = ""
    kernel: str = ""
    label: str = ""
    reason: str = ""
    grid: tuple[int | None, ...] = ()
    memory_bytes: int | None = None
    memory_limit: int | None = None
    vmem_operands: int | None = None
    registers: int | None = None
    spills: int | None = None
    fills: int | None = None
    loop_bundles: int | None = None
    region_bundles: int | None = None
    step_bundles: float | None = None
    alternatives: int | None = None
    mxu_use: float | None = None
    vector_use: float | None = None
    busiest: str | None = None
    busiest_use: float | None = None
    compute_s: float | None = None
    memory_s: float | None = None
    schedule_s: float | None = None

    @property
    def predicted_s(self) -> float | None:
        """The greatest of the three times; None where none is known."""
        return max(self._times().values(), default=None)

    @property
    def bound(self) -> str | None:
        """Which of "compute", "memory", "schedule" that is."""
        times = self._times()
        return max(times, key=times.get) if times else None

    @property
    def roofline(self) -> float | None:
        """The lower bound that physics sets, over the predicted time. None without a schedule."""
        times = self._times()
        ideal = max((times[k] for k in ("compute", "memory") if k in times), default=None)
        if ideal is None or "schedule" not in times:
            return None
        return ideal / self.predicted_s

    def _times(self) -> dict[str, float]:
        times = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "schedule": self.schedule_s,
        }
        return {k: v for k, v in times.items() if v is not None}

    def to_dict(self) -> dict:
        """For JSON: the fields and what follows from them."""
        derived = {
            "predicted_s": self.predicted_s,
            "bound": self.bound,
            "roofline": self.roofline,
        }
        return {**dataclasses.asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: dict) -> "Row":
        names = {field.name for field in dataclasses.fields(cls)}
        kept = {k: v for k, v in values.items() if k in names}
        return cls(**{**kept, "grid": tuple(kept.get("grid", ()))})


def times(case: Case, role: str, kernel: str, target: str) -> dict[str, float | None]:
    """`compute_s` and `memory_s` of a kernel by the case's formulas."""
    flops, moved = case.flops_of(role, kernel), case.hbm_bytes_of(role, kernel)
    return {
        "compute_s": None if flops is None else flops / chip(target).peak_flops,
        "memory_s": None if moved is None else moved / chip(target).hbm_bandwidth,
    }


def tpu_row(work: Case, program: Program, report: KernelReport, **what) -> Row:
    """The row of a kernel that compiled. `what` names op, case, role, target and peer."""
    role, name = what["role"], program.name_of(report.name)
    schedule, args = report.schedule, work.args_of(role)
    inner, live = program.inner_runs_of(name, args), program.live_steps_of(name, args)
    if not schedule.sure and (inner is not None or live is not None):
        schedule = schedule.with_counts(None)
        if inner is not None:
            schedule = schedule.with_inner_runs(inner)
        report = dataclasses.replace(report, schedule=schedule)
    flops = work.flops_of(role, name)
    slot, use = schedule.busiest()
    return Row(
        **what,
        kernel=name,
        label=program.label,
        grid=report.grid,
        memory_bytes=report.vmem_bytes,
        memory_limit=report.vmem_limit,
        vmem_operands=schedule.vmem_operands,
        spills=schedule.slots.spill,
        fills=schedule.slots.fill,
        loop_bundles=schedule.loop_bundles,
        region_bundles=schedule.region.bundles,
        step_bundles=report.step_bundles,
        alternatives=len(report.alternatives(flops, live)) if flops else 0,
        mxu_use=None if flops is None else report.mxu_use(flops, live),
        vector_use=schedule.use("valu"),
        busiest=slot,
        busiest_use=use,
        schedule_s=report.schedule_seconds(flops, live),
        **times(work, role, name, what["target"]),
    )
