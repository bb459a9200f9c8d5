"""One TPU kernel's static schedule, read from the compiler's last dump.

A TPU core issues one VLIW bundle a cycle in an order fixed by the compiler, so the count of bundles
is a cycle count of everything but waiting for memory. libtpu writes, for each kernel,

* `...-final_bundles.txt`: the bundles, one an address, `>` for each loop a bundle is in, marks at
  control targets (LB loop body, PB predicated region, PF its fallthrough), `sbr.rel` at branches;
* `...-final_hlo-static-per-bundle-utilization.txt`: the slots each bundle uses, in the same order.

The largest straight region of the grid loop, between marks and branches, is the work of one block;
the rest of the loop is what each grid step costs beside it.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pallas_kernels.lab.scalar import DELAY

_ADDRESS = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)[ >]*\{")
_EXIT_TEST = re.compile(r"scmp\.\w+\.\w+(?:\.totalorder)?\s+%\w+,\s*(\d+)\s*/\* loop exit test")
_EMPTY = re.compile(r"^\s*\w+\s+:\s*\{\s*\}")
_BRANCH = re.compile(r"\bsbr\.\w+")
_VMEM_OPERAND = re.compile(r"inlined_call_operand\.vmem \[")
_SCALAR_SPILL = re.compile(r"= sst \[smem:\[#allocation\d+_spill")


@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots of a VLIW bundle: used ones over some bundles, or the capacity of one bundle.

    `fill` and `spill` are vector registers read back from and put out to VMEM. They are part of
    `vload` and `vstore`, whose slots they take.
    """

    matmul: int = 0
    matpush: int = 0
    xlu: int = 0
    valu: int = 0
    vpop: int = 0
    eup: int = 0
    vload: int = 0
    fill: int = 0
    vstore: int = 0
    spill: int = 0
    salu: int = 0


# The dump's column headers, in the order of `Slots`.
_COLUMNS = {
    "MATMUL": "matmul",
    "MATPUSH": "matpush",
    "XLU": "xlu",
    "VALU": "valu",
    "VPOP": "vpop",
    "EUP": "eup",
    "VLOAD": "vload",
    "VLOAD:FILL": "fill",
    "VSTORE": "vstore",
    "VSTORE:SPILL": "spill",
    "SALU": "salu",
}


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles that follow each other without a branch.

    Attributes:
      start: address of the first bundle.
      bundles: cycles it takes once.
      depth: loops it is in; 1 is the grid loop alone.
      runs: times it runs in one pass of the grid loop, by the inner loops' constant exit tests
        (or on average, by `with_inner_runs`); None where an inner loop's length is not a constant.
      slots: used in all its bundles together.
      issued: times it runs in the whole kernel, on one core, where `Schedule.counts` is known.
    """

    start: int
    bundles: int
    depth: int
    runs: float | None
    slots: Slots
    issued: int | None = None

    @property
    def cycles(self) -> float:
        """Cycles in the whole kernel or, where that is not known, in a pass of the grid loop."""
        if self.issued is not None:
            return self.bundles * self.issued
        return self.bundles * (1 if self.runs is None else self.runs)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A kernel's static schedule.

    Attributes:
      bundles: of the whole kernel.
      loop_bundles: of the grid loop as it stands in the program; the whole kernel's where it has
        no loop.
      loop_cycles: one pass of the grid loop with its inner loops run to their ends and no
        predicated region skipped, so an upper bound; None where a loop's length is unknown.
      loop_matmul: matrix-product slots used in such a pass; None where a length is unknown.
      has_loop: whether there is a grid loop.
      loop_trips: passes of the grid loop on one core, two more than it has grid steps there where
        windows are fetched ahead and written behind; None where not known.
      regions: the straight regions of the grid loop, in program order.
      capacity: slots of one bundle.
      slots: used in the whole kernel.
      vmem_operands: arguments and results that XLA keeps in VMEM around the kernel, which it does
        with small ones; a kernel with large operands has more to fetch than such a schedule shows.
      scalar_spills: scalar registers put out to SMEM, in the whole kernel.
      counts: how often each bundle issues in the whole kernel, on one core, found by running the
        scalar program (`lab.scalar`); None where that could not be followed.
      sure: whether all its branches were known; where not, `counts` are an upper bound.
    """

    bundles: int
    loop_bundles: int
    loop_cycles: float | None
    loop_matmul: float | None
    has_loop: bool
    loop_trips: int | None
    regions: tuple[Region, ...]
    capacity: Slots
    slots: Slots
    vmem_operands: int
    scalar_spills: int
    counts: tuple[int, ...] | None = None
    sure: bool = False

    @property
    def region(self) -> Region:
        """The straight region of the grid loop with the most cycles."""
        return max(self.regions, key=lambda r: r.cycles)

    @property
    def cycles(self) -> int | None:
        """Of the whole kernel on one core; None where `counts` is."""
        return None if self.counts is None else sum(self.counts)

    @property
    def matmul(self) -> int | None:
        """Matrix-product slots that all passes of the grid loop issue; None where `counts` is."""
        if self.counts is None:
            return None
        return sum(r.slots.matmul * r.issued for r in self.regions)

    def with_counts(self, counts: Sequence[int] | None, sure: bool = True) -> "Schedule":
        """The schedule with how often each bundle issues, or without."""
        if counts is not None and len(counts) != self.bundles:
            raise ValueError(f"{len(counts)} counts of {self.bundles} bundles")
        issued = (None if counts is None else counts[r.start] for r in self.regions)
        regions = (dataclasses.replace(r, issued=n) for r, n in zip(self.regions, issued))
        counts = None if counts is None else tuple(counts)
        return dataclasses.replace(self, counts=counts, sure=sure, regions=tuple(regions))

    def with_inner_runs(self, inner_runs: Sequence[float]) -> "Schedule":
        """The schedule where loops inside the grid loop run as often as is known from elsewhere.

        Args:
          inner_runs: how often the bodies of such loops run in a pass of the grid loop, on average:
            those directly in it, those in these, and so on; deeper ones are left as they are.
        """
        base = min(region.depth for region in self.regions)

        def runs(region):
            inside = region.depth - base
            return inner_runs[inside - 1] if 0 < inside <= len(inner_runs) else region.runs

        regions = tuple(dataclasses.replace(r, runs=runs(r)) for r in self.regions)
        known = all(r.runs is not None for r in regions)
        return dataclasses.replace(
            self,
            regions=regions,
            loop_cycles=sum(r.bundles * r.runs for r in regions) if known else None,
            loop_matmul=sum(r.slots.matmul * r.runs for r in regions) if known else None,
        )

    def use(self, slot: str) -> float:
        """Fraction of a slot's capacity that the largest region uses, such as `use("valu")`."""
        available = getattr(self.capacity, slot) * self.region.bundles
        return getattr(self.region.slots, slot) / available if available else 0.0

    def busiest(self) -> tuple[str, float]:
        """The slot nearest to full in the largest region, and how full: what bounds it.

        `vpop`, which follows `matmul`, and the parts `fill` and `spill` are left out.
        """
        names = ("matmul", "matpush", "xlu", "valu", "eup", "vload", "vstore", "salu")
        return max(((n, self.use(n)) for n in names), key=lambda pair: pair[1])

    @property
    def overhead(self) -> int:
        """Bundles of the loop outside its largest region: the cost of a grid step."""
        return self.loop_bundles - self.region.bundles


@dataclasses.dataclass(frozen=True)
class _Bundle:
    depth: int
    marked: bool
    body: bool  # opens a loop
    branch: bool
    empty: bool
    exit_test: int | None


def read_schedule(bundles: str, utilization: str) -> Schedule:
    """Reads the texts of the two dumps of one kernel.

    Raises:
      ValueError: the dumps have another form than libtpu 0.0.52's, or do not belong together.
    """
    program = _bundles(bundles)
    capacity, rows = _utilization(utilization)
    if not program or len(program) != len(rows):
        raise ValueError(
            f"the dumps do not belong together: {len(program)} bundles, {len(rows)} rows of use"
        )
    loop = _grid_loop(program)
    runs = _runs(program, loop)
    known = None not in runs.values()
    return Schedule(
        bundles=len(program),
        loop_bundles=len(loop),
        loop_cycles=sum(runs.values()) if known else None,
        loop_matmul=sum(runs[i] * rows[i][0] for i in loop) if known else None,
        has_loop=len(loop) < len(program) or program[0].depth > 0,
        loop_trips=_trips(program, loop, program[loop[0]].depth),
        regions=tuple(_regions(program, rows, loop, runs)),
        capacity=capacity,
        slots=_total(rows),
        vmem_operands=len(_VMEM_OPERAND.findall(bundles)),
        scalar_spills=len(_SCALAR_SPILL.findall(bundles)),
    )


def find_schedules(folder: Path) -> dict[str, Schedule]:
    """Schedules of all kernels whose dumps lie in `folder`, by HLO instruction name (`name.1`).

    Dumps that hold no bundles (the compiler's empty prologues) are left out.
    """
    found = find_dumps(folder)
    return {name: read_schedule(*(p.read_text() for p in paths)) for name, paths in found.items()}


def find_dumps(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Files of the bundles and of their use, of the kernels in `find_schedules`."""
    found = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = re.match(r"\d+-(.+)-(\d+)-final_bundles\.txt$", path.name)
        if match is None:
            continue
        pattern = f"*-{match[1]}-*-final_hlo-static-per-bundle-utilization.txt"
        use = [p for p in folder.iterdir() if p.match(pattern)]
        if use:
            found[match[1]] = (path, use[0])
    return found


def _bundles(text: str) -> list[_Bundle]:
    program: list[_Bundle] = []
    lines: list[str] = []
    head = None

    def close():
        if head is None:
            return
        body = "\n".join(lines)
        test = _EXIT_TEST.search(body)
        # A branch's delay slots are often empty and then carry no loop marks: they are where the
        # bundle before them is.
        empty = _EMPTY.match(lines[0]) is not None and bool(program)
        program.append(
            _Bundle(
                depth=program[-1].depth if empty else len(head[3]),
                marked=head[2] is not None,
                body=head[2] in ("LB", "LH"),
                branch=_BRANCH.search(body) is not None,
                empty=empty,
                exit_test=int(test[1]) if test else None,
            )
        )

    for line in text.splitlines():
        match = _ADDRESS.match(line)
        if match:
            close()
            head, lines = match, []
            if int(match[1], 16) != len(program):
                raise ValueError(f"bundle {len(program)} is missing before {match[1]}")
        if head is not None:
            lines.append(line)
    close()
    return program


def _utilization(text: str) -> tuple[Slots, list[tuple[int, ...]]]:
    lines = text.splitlines()
    if len(lines) < 4:
        raise ValueError("the utilization dump is empty")
    columns = [name.strip() for name in lines[1].split(",")]
    if columns != list(_COLUMNS):
        raise ValueError(f"unknown slots in the utilization dump: {columns}")
    rows = [tuple(map(int, line.split())) for line in lines[4:] if line.strip()]
    return Slots(*map(int, lines[2].split())), rows


def _total(rows: list[tuple[int, ...]]) -> Slots:
    return Slots(*map(sum, zip(*rows, strict=True)))


def _grid_loop(program: list[_Bundle]) -> range:
    """The longest run of bundles inside a loop; the whole program where there is none."""
    best, start = range(0), 0
    for i in range(len(program) + 1):
        if i == len(program) or not program[i].depth:
            if i - start > len(best):
                best = range(start, i)
            start = i + 1
    return best or range(len(program))


def _runs(program: list[_Bundle], loop: range) -> dict[int, int | None]:
    """How often each bundle of the grid loop runs in one pass of it; None where not known."""
    runs: dict[int, int | None] = dict.fromkeys(loop, 1)
    base = program[loop[0]].depth
    for depth in range(base + 1, 1 + max(program[i].depth for i in loop)):
        for span in _inner_loops(program, loop, depth):
            trips = _trips(program, span, depth)
            for i in span:
                was = runs[i]
                runs[i] = None if trips is None or was is None else trips * was
    return runs


def _trips(program: list[_Bundle], span: range, depth: int) -> int | None:
    """Passes of the loop in `span`, by the constant it is compared with at its end."""
    tests = [program[i].exit_test for i in span if program[i].depth == depth]
    return next((n for n in reversed(tests) if n is not None), None)


def _inner_loops(program: list[_Bundle], loop: range, depth: int) -> list[range]:
    """The loops at `depth`; a loop's body opens with a mark, so neighbours are told apart."""
    spans, start = [], None
    for i in [*loop, loop[-1] + 1]:
        inside = i in loop and program[i].depth >= depth
        opens = inside and program[i].body and program[i].depth == depth
        if start is not None and (not inside or opens):
            spans.append(range(start, i))
            start = None
        if inside and start is None:
            start = i
    return spans


def _regions(program, rows, loop: range, runs) -> Iterator[Region]:
    """Cuts the loop before each mark and change of depth, and after each branch's delay slots."""
    start = loop[0]
    for i in loop:
        if i < loop[-1]:
            after = program[i + 1]
            same = after.depth == program[i].depth and not after.marked
            if same and not (i >= start + DELAY and program[i - DELAY].branch):
                continue
        yield Region(
            start=start,
            bundles=i + 1 - start,
            depth=program[start].depth,
            runs=runs[start],
            slots=_total(rows[start : i + 1]),
        )
        start = i + 1
