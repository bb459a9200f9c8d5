"""The compiled program's work on one device, and the time that peak rates would take for it."""

import dataclasses

from efficient.planning import hlo_cost
from efficient.planning.collectives import Collective, find_collectives
from efficient.planning.flops import FlopCount
from efficient.planning.hardware import Target
from efficient.planning.hlo import Module

NOT_COUNTED = (
    "a GPU's program does not tell the FLOPs of its libraries: an equal share of those of the jaxpr"
    " stands for a device's"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """PREDICTION of one step in seconds, from peak rates; nothing was run.

    Attributes:
      compute: matrix FLOPs of a device over its peak.
      memory: estimated HBM bytes of a device over its bandwidth.
      interconnect: sum of the collectives' lower bounds.
      operations: each operation at the slower of its compute and memory, one after another.
      overlapped: the largest of compute, memory and interconnect: all three hide one another.
      serial: their sum: nothing hides anything.
    """

    compute: float
    memory: float
    interconnect: float
    operations: float
    overlapped: float
    serial: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step: matrix FLOPs, HBM bytes (an estimate), collectives."""

    flops: int
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    roofline: Roofline
    notes: tuple[str, ...]


def read_work(text: str, flops: FlopCount, target: Target, mesh) -> Work:
    """Reads the scheduled HLO `text`; `flops` stands in for what the text does not tell."""
    module = Module(text)
    peak, bandwidth = target.device_peak_flops, target.device_hbm_bandwidth
    executed = moved = 0
    operations = 0.0
    for computation, instruction, times in module.scheduled():
        work = hlo_cost.matrix_flops(module, computation, instruction)
        traffic = hlo_cost.hbm_bytes(module, computation, instruction)
        executed += times * work
        moved += times * traffic
        operations += times * max(work / peak, traffic / bandwidth)
    # The text does not say what a Pallas kernel computes; on a GPU nor what a library call does.
    kernels = flops.kernels // target.device_count
    executed += kernels
    notes = sorted(module.notes)
    if target.platform != "tpu":
        executed = flops.total // target.device_count
        notes.append(NOT_COUNTED)
    operations += kernels / peak
    collectives = find_collectives(module, target, mesh)
    terms = (executed / peak, moved / bandwidth, sum(c.seconds for c in collectives))
    roofline = Roofline(*terms, operations, overlapped=max(terms), serial=sum(terms))
    return Work(executed, moved, tuple(collectives), roofline, tuple(notes))
