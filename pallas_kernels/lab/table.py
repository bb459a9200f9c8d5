"""Rows of the report as text for a terminal and as Markdown."""

from collections.abc import Sequence

from pallas_kernels.lab.row import Row

HEADER = (
    "op", "case", "kernel", "target", "on-chip", "spills", "fills", "bundles", "step",
    "matrix", "vector", "busiest", "compute", "memory", "schedule", "bound", "roofline",
)  # fmt: skip

LEGEND = """\
on-chip: VMEM (TPU) or shared memory (GPU) used, of its limit. spills, fills: vector registers put
out to VMEM and read back, each counted once in the code (GPU: bytes a thread). bundles: the grid
loop's straight region of most cycles / the loop's whole code, a cycle each; "or 1": one other
region is taken to run instead in some steps. step: bundles that a grid step issues on average,
found by following the kernel's branches; "-" where that could not be done. matrix: useful FLOPs of
the matrix units' peak in the region. vector: its vector-ALU slots in use. busiest: the slot nearest
to full. compute, memory, schedule: microseconds by FLOPs, HBM bytes and bundles; the greatest,
named by bound, is the predicted time. roofline: the greater of compute and memory over it."""


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of `HEADER`."""
    name = f"{row.peer}: {row.kernel or row.role}" if row.peer else row.kernel or row.role
    name = f"{name} ({row.label})" if row.label else name
    head = (row.op, row.case, name, row.target)
    if row.reason:
        return (*head, row.reason)
    used = f"{_mib(row.memory_bytes)}/{_mib(row.memory_limit)}"
    if row.registers is not None:
        used += f", {row.registers} regs"
    bundles = "-" if row.loop_bundles is None else f"{row.region_bundles}/{row.loop_bundles}"
    if row.alternatives:
        bundles += f" or {row.alternatives}"
    busiest = "-" if row.busiest is None else f"{row.busiest} {_fraction(row.busiest_use)}"
    return (
        *head, used, _count(row.spills), _count(row.fills), bundles, _mean(row.step_bundles),
        _fraction(row.mxu_use), _fraction(row.vector_use), busiest, _micro(row.compute_s),
        _micro(row.memory_s), _micro(row.schedule_s), row.bound or "-", _fraction(row.roofline),
    )  # fmt: skip


def text(rows: Sequence[Row]) -> str:
    """Aligned columns; a refusal takes the rest of its line."""
    table = [cells(row) for row in rows]
    full = [HEADER, *(c for c in table if len(c) == len(HEADER))]
    widths = [max(len(c[i]) for c in full) for i in range(len(HEADER))]
    for i in range(4):
        widths[i] = max([widths[i], *(len(c[i]) for c in table)])
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(c, widths, strict=False)).rstrip()
        for c in [HEADER, *table]
    ]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; a refusal stands in the column `on-chip`."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in rows:
        filled = (*cells(row), *[""] * len(HEADER))[: len(HEADER)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in filled) + " |")
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.3g}M"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.4g}"
