"""python -m pallas_kernels.lab [op ...] [--target v5e,h200] [--case NAME] [--no-peers] [--json]

Compiles every kernel of the ops at the cases of their `cases.py` with the real compilers and prints
what they made of them. An op is one of this package by name, or any folder with a `cases.py`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pallas_kernels.lab import calibration, gpu, ops, table, tpu
from pallas_kernels.lab.case import Case
from pallas_kernels.lab.chips import CHIPS, nearest
from pallas_kernels.lab.row import Row
from pallas_kernels.lab.worker import Job, Workers

_BEGIN, _END = "<!-- lab:begin -->", "<!-- lab:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command: 0 where every own kernel compiled, 1 where one did not, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        jobs = _jobs(options)
        _check_write(options.write)
        rows = _run(jobs, quiet=options.json)
    except ValueError as error:
        print(f"lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
    else:
        print(table.text(rows), table.LEGEND, calibration.STATEMENT, sep="\n\n")
    if options.write:
        _write(Path(options.write), rows)
    # A peer may be unable to, and a compiler that is not here says nothing of the kernel.
    own = [row.reason for row in rows if not row.peer and row.reason != gpu.INSTALL]
    return 1 if any(own) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.lab",
        description="Compiles Pallas kernels for TPUs and GPUs that are not here, and reports.",
    )
    parser.add_argument("op", nargs="*", help="ops by name or folder with a cases.py (all)")
    parser.add_argument("--target", help="of v5e, v5p, v6e, h200, with commas (each case's own)")
    parser.add_argument("--case", help="cases by name, with commas (all)")
    parser.add_argument("--no-peers", action="store_true", help="the ops' own kernels alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", metavar="FILE", help="put the table between marks of a page")
    return parser


def _jobs(options) -> list[Job]:
    targets = _listed(options.target)
    for target in targets:
        if target not in CHIPS:
            raise ValueError(f"unknown target {target!r}; {nearest(target, CHIPS)}")
    found = [ops.find(name) for name in options.op] or list(ops.known().values())
    if not found:
        raise ValueError("no op of this package has a cases.py; give a folder that has one")
    loaded = [(op, ops.load(op)) for op in found]
    chosen = _listed(options.case)
    names = {case.name for _, cases in loaded for case in cases}
    for name in chosen:
        if name not in names:
            raise ValueError(f"unknown case {name!r}; {nearest(name, names)}")
    found_jobs = [
        job
        for op, cases in loaded
        for case in cases
        if not chosen or case.name in chosen
        # A case that is named is compiled for any target, of all cases those that are meant for it.
        for job in _jobs_of(
            op,
            case,
            [t for t in targets if chosen or t in case.targets] if targets else case.targets,
            not options.no_peers,
        )
    ]
    if not found_jobs:
        raise ValueError(f"no case is meant for {', '.join(targets)}; name one with --case")
    return found_jobs


def _jobs_of(op: ops.Op, case: Case, targets: Sequence[str], with_peers: bool) -> Iterator[Job]:
    for role in case.kernels:
        for target in targets:
            for peer in ("", *(case.peers.get(role, ()) if with_peers else ())):
                yield Job(op.name, str(op.folder), case.name, role, target, peer)


def _run(jobs: Sequence[Job], quiet: bool) -> list[Row]:
    if any(CHIPS[job.target].flops_per_cycle for job in jobs):
        tpu.require()
    rows: list[Row] = []
    shown = sys.stderr.isatty() and not quiet
    with Workers() as workers:
        for i, job in enumerate(jobs):
            if shown:
                where = f"{job.op} {job.case} {job.role} {job.peer} {job.target}"
                print(f"\r{i + 1}/{len(jobs)} {where:70.70}", end="", file=sys.stderr, flush=True)
            rows += workers.run(job)
    if shown:
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr)
    return rows


def _listed(value: str | None) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()] if value else []


def _check_write(path: str | None) -> None:
    if path is None:
        return
    page = Path(path).read_text() if Path(path).is_file() else ""
    if _BEGIN not in page or _END not in page:
        raise ValueError(f"--write {path}: the page needs the lines {_BEGIN} and {_END}")


def _write(path: Path, rows: Sequence[Row]) -> None:
    head, _, rest = path.read_text().partition(_BEGIN)
    tail = rest.partition(_END)[2]
    path.write_text(f"{head}{_BEGIN}\n\n{table.markdown(rows)}\n\n{_END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
