"""A process that compiles: a compiler that aborts takes this one with it and no other.

`Workers` starts `python -m pallas_kernels.lab.worker` where a job needs it: the TPU compiler in
this interpreter, the GPU compiler in the interpreter that has jax[cuda13]. A job is a line of JSON
on stdin and its rows are a line of JSON on stdout.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from pallas_kernels.lab import gpu, ops, tpu
from pallas_kernels.lab.case import Case, Program
from pallas_kernels.lab.chips import chip
from pallas_kernels.lab.row import Row, tpu_row

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile on one target: an op's role at a case, or a peer of it."""

    op: str
    folder: str
    case: str
    role: str
    target: str
    peer: str = ""

    def failed(self, reason: str) -> Row:
        return Row(self.op, self.case, self.role, self.target, self.peer, reason=reason)


class Workers:
    """Runs jobs, each kind of target in a process of its own."""

    def __init__(self):
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes.values():
            process.stdin.close()
            process.wait()

    def run(self, job: Job) -> list[Row]:
        """The job's rows: one a Pallas kernel, or one with a reason."""
        python = sys.executable
        if not chip(job.target).flops_per_cycle:
            python = gpu.interpreter()
            if python is None:
                return [job.failed(gpu.INSTALL)]
        process = self._process(python)
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = process.wait()
            del self._processes[python]
            return [job.failed(f"the compiler's process ended with status {status}")]
        return [Row.from_dict(row) for row in json.loads(answer)]

    def _process(self, python: str) -> subprocess.Popen:
        if python not in self._processes:
            self._processes[python] = subprocess.Popen(
                [python, "-m", "pallas_kernels.lab.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if os.environ.get("LAB_VERBOSE") else subprocess.DEVNULL,
                text=True,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a hit leaves no schedule
                    "PYTHONPATH": os.pathsep.join(
                        filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
                    ),
                },
            )
        return self._processes[python]


def rows_of(job: Job) -> list[Row]:
    """Compiles the job in this process. Of a peer's programs the fastest that compiles is kept."""
    case = next(c for c in ops.load(ops.Op(job.op, Path(job.folder))) if c.name == job.case)
    if not job.peer:
        return _compile(job, case, Program.of(case.kernels[job.role]))
    tried = [_compile(job, case, Program.of(fn)) for fn in case.peers[job.role][job.peer]]
    return min(tried, key=_cost) if tried else [job.failed("the case names no program for it")]


def _cost(rows: list[Row]) -> float:
    times = [row.predicted_s for row in rows]
    return float("inf") if None in times else sum(times)


def _compile(job: Job, case: Case, program: Program) -> list[Row]:
    what = {k: v for k, v in dataclasses.asdict(job).items() if k != "folder"}
    args = case.args_of(job.role)
    if chip(job.target).flops_per_cycle:
        report = tpu.compile_tpu(program, args, job.target, program.from_vectors)
        with tpu.on_target(job.target):
            rows = [tpu_row(case, program, kernel, **what) for kernel in report.kernels]
    else:
        report = gpu.compile_gpu(program, args)
        rows = [gpu.gpu_row(case, program, kernel, **what) for kernel in report.kernels]
    if report.reason:
        return [dataclasses.replace(job.failed(report.reason), label=program.label)]
    return rows or [job.failed("the compiled program holds no Pallas kernel")]


def _serve() -> None:
    stdin, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints must not stand among the answers
    for line in stdin:
        job = Job(**json.loads(line))
        try:
            rows = rows_of(job)
        except ValueError as error:
            rows = [job.failed(str(error))]
        answers.write(json.dumps([row.to_dict() for row in rows]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
