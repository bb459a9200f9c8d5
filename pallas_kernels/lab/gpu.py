"""Mosaic GPU kernels through XLA and ptxas for an H200 that is not here, and ptxas' report.

Wants `jax[cuda13]`, 4.5 GB that no TPU user needs, so it lives in an environment of its own:
`make lab-gpu` makes `.venv-gpu`, and the command line finds it there. `LAB_GPU_PYTHON` names
another interpreter.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.lab.case import Case, Program
from pallas_kernels.lab.report import shorten
from pallas_kernels.lab.row import Row, times

INSTALL = "no jax[cuda13] here; make the environment with: make lab-gpu"

# Shared memory that one block may ask for (CUDA programming guide, compute capability 9.0).
SHARED_LIMIT = 232_448

# The fields of GpuTargetConfigProto that the compiler reads, for an H200 (SXM).
_H200 = f"""
gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {SHARED_LIMIT}
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184 l2_cache_size: 52428800
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 }}
"""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One Mosaic GPU kernel as ptxas left it.

    Attributes:
      name: of the kernel's entry function.
      grid: thread blocks along x, y and z; () where not known.
      threads: of a block; 0 where not known.
      registers: of a thread.
      spill_stores, spill_loads: bytes a thread puts out to local memory and reads back.
      stack: bytes of a thread's stack frame.
      shared_bytes: shared memory of a block, static and dynamic.
    """

    name: str
    grid: tuple[int, ...]
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one program: a `reason` or its kernels in the order compiled."""

    reason: str
    kernels: tuple[KernelReport, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.reason


def interpreter() -> str | None:
    """A Python that has jax[cuda13]: this one, `LAB_GPU_PYTHON`, or `.venv-gpu`; else None."""
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
        "jax_plugins.xla_cuda13"
    ):
        return sys.executable
    named = os.environ.get("LAB_GPU_PYTHON")
    if named:
        return named if Path(named).is_file() else None
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        plugin = root.glob(".venv-gpu/lib/python*/site-packages/jax_plugins/xla_cuda13/*.so")
        if any(plugin):
            return str(root / ".venv-gpu/bin/python")
    return None


def compile_gpu(fn: Callable, args: Sequence[Any]) -> Report:
    """Compiles `fn(*args)` for one H200. It needs a process in which no GPU kernel was compiled.

    Args:
      fn: a function that calls Mosaic GPU kernels (`plgpu.kernel`), jitted or not.
      args: pytrees of `jax.ShapeDtypeStruct`, without shardings.

    Returns:
      A report; a refusal by JAX or the compiler is in its `reason`, not raised.
    """
    dumps = _prepare()
    import jax
    from jax.experimental import topologies

    _clear(dumps)
    stage = "start"
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=_H200, topology="1x1x1"
        ).devices
        sharding = jax.sharding.SingleDeviceSharding(devices[0])
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(args)
        )
        stage = "trace"
        traced = jax.jit(lambda *a: fn(*a)).trace(*placed)
        stage = "lower"
        lowered = traced.lower(lowering_platforms=("cuda",))
        stage = "compile"
        lowered.compile()
        return Report("", tuple(_kernels(dumps)))
    except Exception as error:  # whatever JAX, Mosaic, XLA and ptxas refuse with
        return Report(f"{stage}: {shorten(error)}")
    finally:
        _clear(dumps)


_dumps: Path | None = None


def _prepare() -> Path:
    global _dumps
    if _dumps is None:
        _dumps = Path(tempfile.mkdtemp(prefix="pallas_lab_gpu_"))
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        os.environ["MOSAIC_GPU_DUMP_MLIR_PASSES"] = "1"
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(_dumps)
        atexit.register(shutil.rmtree, _dumps, ignore_errors=True)
    return _dumps


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            path.unlink()


def _kernels(folder: Path):
    def number(path: Path) -> int:
        return int(re.search(r"_(\d+)$", path.stem)[1])

    for path in sorted(folder.glob("*_[0-9]*.ptxas"), key=number):
        log = path.with_suffix(".mlir-passes.log")
        yield read_report(path.read_text(), _launch_line(log) if log.exists() else "")


def _launch_line(log: Path) -> str:
    # The log holds the module after each of many passes, 40 MB in all; the first will do.
    with log.open() as lines:
        return next((line for line in lines if "gpu.launch" in line), "")


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")
_LAUNCH = re.compile(r"blocks.*? in \((.*?)\) threads.*? in \((.*?)\).*?memory_size %c(\d+)")


def read_report(ptxas: str, launch: str = "") -> KernelReport:
    """Reads ptxas' report of one kernel and, for grid and shared memory, its launch in MLIR.

    Raises:
      ValueError: the report has another form than ptxas 13's.
    """
    entry, spills, used = (p.search(ptxas) for p in (_ENTRY, _SPILLS, _USED))
    if not (entry and spills and used):
        raise ValueError(f"not a report of ptxas: {ptxas[:200]!r}")
    static = _STATIC_SHARED.search(ptxas)
    blocks, threads, dynamic = (), (), 0
    found = _LAUNCH.search(launch)
    if found:
        blocks, threads, dynamic = _sizes(found[1]), _sizes(found[2]), int(found[3])
    total = 1
    for size in threads:
        total *= size
    return KernelReport(
        name=entry[1].removesuffix("_mosaic_gpu_kernel"),
        grid=blocks,
        threads=total if threads else 0,
        registers=int(used[1]),
        stack=int(spills[1]),
        spill_stores=int(spills[2]),
        spill_loads=int(spills[3]),
        shared_bytes=(int(static[1]) if static else 0) + dynamic,
    )


def _sizes(text: str) -> tuple[int, ...]:
    """MLIR names a constant after its value: `%c384`, `%c1_0`."""
    return tuple(int(n) for n in re.findall(r"%c(\d+)", text))


def gpu_row(work: Case, program: Program, report: KernelReport, **what) -> Row:
    """The row of a kernel that compiled. `what` names op, case, role, target and peer."""
    name = program.name_of(report.name)
    return Row(
        **what,
        kernel=name,
        label=program.label,
        grid=report.grid,
        memory_bytes=report.shared_bytes,
        memory_limit=SHARED_LIMIT,
        registers=report.registers,
        spills=report.spill_stores,
        fills=report.spill_loads,
        **times(work, what["role"], name, what["target"]),
    )
