"""Follows the branches of compiled TPU kernels, with the values that are known before they run."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.lab import scalar
from pallas_kernels.lab.report import KernelReport, is_instruction_of
from pallas_kernels.lab.schedule import find_dumps
from pallas_kernels.lab.traffic import prefetched

_OPERANDS = re.compile(r" custom-call\(([^)]*)\)")
_NAME = re.compile(r"%([\w.-]+)")


def follow(
    kernels: Sequence[KernelReport], folder: Path, hlo: str, closed, from_vectors: int | None
) -> tuple[KernelReport, ...]:
    """The reports with counts in their schedules, where the kernels' branches could be followed.

    Args:
      kernels: reports in the order of the compiled program.
      folder: with the compiler's dumps.
      hlo: the compiled program's text.
      closed: the traced program.
      from_vectors: as of `lab.Program`.
    """
    try:
        calls = prefetched(closed)
    except ValueError:  # which kernels run depends on the arguments
        calls = []
    dumps = find_dumps(folder)
    return tuple(_follow(kernel, dumps, hlo, calls, from_vectors) for kernel in kernels)


def _follow(kernel, dumps, hlo, calls, from_vectors) -> KernelReport:
    mine = [i for i, (name, _) in enumerate(calls) if is_instruction_of(kernel.name, name)]
    arrays = calls.pop(mine[0])[1] if mine else []
    known = {}
    for number, (array, layout) in enumerate(zip(arrays, _layouts(hlo, kernel.name), strict=False)):
        found = None if array is None or layout is None else scalar.words(array, layout)
        if found is not None:
            known[number] = found
    try:
        counts, sure = scalar.executed(dumps[kernel.name][0].read_text(), known, from_vectors)
    except scalar.Unknown:
        return kernel
    return dataclasses.replace(kernel, schedule=kernel.schedule.with_counts(counts, sure))


def _layouts(hlo: str, kernel: str) -> list[str | None]:
    """Layouts of a kernel's operands, such as "1,0:T(8,128)", in their order."""
    call = re.search(rf"^\s*(?:ROOT )?%{re.escape(kernel)} = .*$", hlo, re.MULTILINE)
    operands = _OPERANDS.search(call[0]) if call else None
    return [_layout(hlo, name) for name in _NAME.findall(operands[1])] if operands else []


def _layout(hlo: str, name: str) -> str | None:
    found = re.search(rf"%{re.escape(name)} = \w+\[[\d,]*\]\{{([^}}]*)\}}", hlo)
    return re.sub(r"S\(\d+\)", "", found[1]) if found else None
