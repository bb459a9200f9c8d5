"""What a layout of model states costs in memory and traffic, and the search for the best one.

A group has G devices and there are R groups; see `parallel.scopes`. A scope splits an array S ways:
1 (`replicated`), G (`group`) or G R (`global`). With P parameters, of c bytes in the computation's
dtype and 4 as master weights, m moments of the optimizer, k microbatches and f = 2 passes that read
the parameters (forward, and backward with recomputation), a device holds

    4 P / S(p)  master weights       4 m P / S(o)  moments
    c P / S(p)  their copy in c      c P / S(g')   gradients; 4 P / S(g) where k > 1

g' is where the gradients of a whole batch are summed: the finer of g and o if k = 1, since nothing
waits for other microbatches, and g else. A device sends in a step, as the best algorithms do,
W(b) = b (G-1)/G within its group to gather b bytes there or to scatter their sum, and
B(b) = b/G (R-1)/R between groups to do so with a group's share:

                        within          between
    global parameters   f k W(c P)      f k B(c P)     gathered for every pass
    group parameters    f k W(c P)      0
    global gradients    k W(c P)        k B(c P)       reduce-scatters, within the group first
    group gradients     k W(c P)        2 k B(c P)     all-reduce of the shares between groups
    replicated ones     2 k W(c P)      2 k B(c P)     all-reduce
    from o to p         W(4 P), B(4 P) where o is finer, to gather what was updated
    from g' to o        W(4 P), B(4 P) where g' is finer

These are the collectives of the compiled program under `gather = "block"` (`parallel.gathering`)
for the parameters of blocks. Those outside of blocks are gathered once, f = 1, and the gradient of
an embedding table XLA sums by an all-reduce, 2 W + 2 B. Arrays that are not split (norms, biases)
are left out. An optimizer coarser than the parameters is refused: made as fine as they are, it
takes less memory and no more traffic.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from efficient.cli import main_guard, text_table
from efficient.errors import UserError
from efficient.parallel.scopes import LAYOUTS, ORDER, Scopes


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained on what; the letters are those of the module's equations.

    Attributes:
      parameters: P, those that are split.
      group: G, devices of a group.
      groups: R.
      compute_bytes: c, of a number in the computation's dtype.
      moments: m, float32 arrays of the optimizer for each parameter; a moving average is one more.
      microbatches: k.
      passes: f, times that a microbatch's step reads the parameters of a block.
    """

    parameters: float
    group: int
    groups: int
    compute_bytes: int = 2
    moments: int = 2
    microbatches: int = 1
    passes: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name == "moments" else 1
            if not getattr(self, field.name) >= least:
                raise UserError(f"{field.name} must be {least} or more")

    def ways(self, scope: str) -> int:
        """S, the devices over which a scope splits an array."""
        return {"replicated": 1, "group": self.group, "global": self.group * self.groups}[scope]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a layout costs: bytes a device holds, and bytes it sends in a step.

    Attributes:
      memory: by what it holds: parameters, copy, gradients, optimizer.
      within: bytes sent to devices of its group.
      between: bytes sent to other groups.
    """

    scopes: Scopes
    memory: Mapping[str, float]
    within: float
    between: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def traffic(self, ratio: float) -> float:
        """Bytes within a group that take as long; `ratio` is how much faster a group is within."""
        return self.within + ratio * self.between


def cost(scopes: Scopes, job: Job) -> Cost:
    """The module's two tables."""
    waits = job.microbatches > 1
    summed = scopes.gradients if waits else scopes.reduced
    small = job.compute_bytes * job.parameters
    whole = 4.0 * job.parameters
    memory = {
        "parameters": whole / job.ways(scopes.parameters),
        "copy": small / job.ways(scopes.parameters),
        "gradients": (whole if waits else small) / job.ways(summed),
        "optimizer": job.moments * whole / job.ways(scopes.optimizer),
    }
    reads = job.passes * job.microbatches
    moves = (
        *[_gather(small, scopes.parameters, "replicated", job)] * reads,
        *[_reduce(small, summed, job)] * job.microbatches,
        _gather(whole, summed, scopes.optimizer, job),
        _gather(whole, scopes.optimizer, scopes.parameters, job),
    )
    within, between = (sum(part) for part in zip(*moves, strict=True))
    return Cost(scopes, memory, within, between)


def _shares(size: float, job: Job) -> tuple[float, float]:
    """W and B."""
    within = size * (job.group - 1) / job.group
    return within, size / job.group * (job.groups - 1) / job.groups


def _gather(size: float, start: str, end: str, job: Job) -> tuple[float, float]:
    """Sent (within, between) on the way to a coarser scope; to a finer one nothing is."""
    within, between = _shares(size, job)
    crossed = ORDER[ORDER.index(end) + 1 : ORDER.index(start) + 1]
    return within * ("group" in crossed), between * ("global" in crossed)


def _reduce(size: float, end: str, job: Job) -> tuple[float, float]:
    """Sent (within, between) to sum over all devices into a scope."""
    within, between = _shares(size, job)
    return within * (1 + (end == "replicated")), between * (1 + (end != "global"))


def layouts(gather: str = "block") -> list[Scopes]:
    """All that can work."""
    every = itertools.product(ORDER, repeat=3)
    return [Scopes(p, g, o, gather) for p, g, o in every if ORDER.index(o) >= ORDER.index(p)]


def search(job: Job, memory: float, ratio: float = 1.0) -> list[Cost]:
    """Layouts whose states fit into `memory` bytes a device, the least traffic first.

    Among equal ones the smaller goes first. Activations and the parameters of the block at work
    need room beside them.

    Raises:
      UserError: none fits.
    """
    found = sorted((cost(s, job) for s in layouts()), key=lambda c: (c.traffic(ratio), c.total))
    fitting = [c for c in found if c.total <= memory]
    if not fitting:
        least = min(c.total for c in found)
        raise UserError(
            f"no layout fits: states take {least / 2**30:.2f} GiB a device or more, the limit is"
            f" {memory / 2**30:.2f} GiB; take more devices or fewer bytes a parameter"
        )
    return fitting


def table(costs: Sequence[Cost], ratio: float) -> str:
    """The layouts a line each, in GiB a device."""
    names = {(s.parameters, s.gradients, s.optimizer): name for name, s in LAYOUTS.items()}
    header = ("parameters", "gradients", "optimizer", "states", "within", "between", "weighed", "")
    rows = []
    for one in costs:
        scopes = one.scopes.parameters, one.scopes.gradients, one.scopes.optimizer
        sizes = one.total, one.within, one.between, one.traffic(ratio)
        rows.append((*scopes, *(f"{n / 2**30:.2f}" for n in sizes), names.get(scopes, "")))
    return text_table(header, rows)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `parallel.scopes`."""
    parser = argparse.ArgumentParser(
        prog="python -m efficient.parallel.scopes",
        description="Layouts of model states that fit, the least traffic first; GiB a device.",
    )
    parser.add_argument("--parameters", type=float, required=True, help="of the model")
    parser.add_argument("--group", type=int, required=True, help="devices of a group (mesh.fsdp)")
    parser.add_argument("--groups", type=int, default=1, help="their number (mesh.data)")
    parser.add_argument("--memory", type=float, required=True, help="for states, GiB a device")
    parser.add_argument("--ratio", type=float, default=1.0, help="bandwidth within over between")
    parser.add_argument("--compute-bytes", type=int, default=2, help="of a number in a product")
    parser.add_argument("--moments", type=int, default=2, help="of the optimizer; Adam has 2")
    parser.add_argument("--microbatches", type=int, default=1, help="config.accumulate")
    parser.add_argument("--passes", type=int, default=2, help="that read parameters; 2 with remat")
    given = vars(parser.parse_args(arguments))
    memory, ratio = given.pop("memory") * 2**30, given.pop("ratio")
    if not ratio > 0:
        raise UserError("--ratio must be above 0")
    print(table(search(Job(**given), memory, ratio), ratio))
