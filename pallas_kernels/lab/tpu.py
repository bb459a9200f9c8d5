"""Pallas kernels through the real TPU compiler, on any machine, and what it made of them.

    report = compile_tpu(fn, [jax.ShapeDtypeStruct((8, 1024, 128), jnp.bfloat16)], "v6e")
    report.reason                           # "" or why the compiler refused
    [kernel] = report.kernels               # one a Pallas kernel of the program
    kernel.schedule.region.bundles          # cycles of one block
    kernel.schedule.region.slots.spill      # registers put out to VMEM in them
    kernel.mxu_use(flops)                   # of the kernel's useful FLOPs

libtpu reads its flags when it is loaded, which is at the first use of a TPU topology and not at
`import jax`. So the first call here sets the flags and compiles in this process; where another had
loaded libtpu before, `fn` and `args` go to a process of their own and must pickle by reference.
"""

import atexit
import contextlib
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pallas_kernels.lab.chips import chip, topology
from pallas_kernels.lab.report import KernelReport, Report, is_instruction_of, shorten
from pallas_kernels.lab.schedule import find_schedules

if TYPE_CHECKING:
    from pallas_kernels.compat import PallasCall  # importing it imports JAX

INSTALL = 'the TPU compiler is not installed; install it with: pip install -e ".[lab]"'

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a cloud metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is held, so several may run at once
}


_dumps: Path | None = None


def prepare() -> Path | None:
    """Sets this process up; None where libtpu was loaded before with other flags.

    Raises:
      ValueError: libtpu is not installed.
    """
    global _dumps
    require()
    if _dumps is None and not _libtpu_is_loaded():
        _dumps = Path(tempfile.mkdtemp(prefix="pallas_lab_"))
        atexit.register(shutil.rmtree, _dumps, ignore_errors=True)
        for name, value in _ENVIRONMENT.items():
            # JAX itself may have written its own complaint there when it was imported.
            if os.environ.get(name, "WARNING").startswith("WARNING"):
                os.environ[name] = value
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        flags = (
            f"--xla_jf_dump_to={_dumps} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final.*"  # all passes together take 100 MB a kernel
        )
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return _dumps


def require() -> None:
    """Raises ValueError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(INSTALL)


def _libtpu_is_loaded() -> bool:
    maps = Path("/proc/self/maps")
    return maps.exists() and "libtpu.so" in maps.read_text()


def compile_tpu(
    fn: Callable, args: Sequence[Any], target: str = "v6e", from_vectors: int | None = None
) -> Report:
    """Compiles `fn(*args)` for one chip.

    Args:
      fn: a function that calls Pallas kernels, jitted or not.
      args: pytrees of `jax.ShapeDtypeStruct` (or arrays), without shardings.
      target: "v5e", "v5p", "v6e", or one with a topology: "v6e:2x2".
      from_vectors: as of `lab.Program`.

    Returns:
      A report; a refusal by JAX or the compiler is in its `reason`, not raised.

    Raises:
      ValueError: unknown target, no libtpu, or libtpu is loaded and `fn` cannot be pickled.
    """
    if not chip(target).flops_per_cycle:
        raise ValueError(f"target {target!r} is no TPU; one of: v5e, v5p, v6e")
    if prepare() is None:
        return _in_a_process(fn, args, target, from_vectors)
    return _compile(fn, args, target, from_vectors)


def on_target(target: str):
    """A context in which the plan of a kernel is that for the target."""
    from pallas_kernels.compat import on_device

    return on_device(_device(target))


def _device(target: str):
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology(target))
    return found.devices[0]


def _compile(fn, args, target: str, from_vectors: int | None) -> Report:
    import jax

    from pallas_kernels.compat import pallas_calls
    from pallas_kernels.lab.follow import follow

    _clear(_dumps)
    sharding = jax.sharding.SingleDeviceSharding(_device(target))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(args)
    )
    stage = "trace"
    try:
        with on_target(target):
            traced = jax.jit(lambda *a: fn(*a)).trace(*placed)
            stage = "lower"
            lowered = traced.lower(lowering_platforms=("tpu",))
        stage = "compile"
        compiled, hlo = _text(lowered)
        calls = list(pallas_calls(traced.jaxpr))
        kernels = _kernels(hlo, calls, find_schedules(_dumps), target.partition(":")[0])
        kernels = follow(kernels, _dumps, hlo, traced.jaxpr, from_vectors)
        return Report(target, "", kernels, int(compiled.memory_analysis().temp_size_in_bytes), hlo)
    except Exception as error:  # whatever JAX, Mosaic and libtpu refuse with
        return Report(target, f"{stage}: {shorten(error)}")
    finally:
        _clear(_dumps)


# jaxlib 0.10.2 cannot print the asynchronous gathers and scatters that libtpu may give to the
# SparseCore; they are no part of a Pallas kernel on the TensorCore.
_PRINTABLE = {
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    "xla_tpu_offload_gather_to_sparsecore": "false",
}


def _text(lowered) -> tuple[Any, str]:
    """The compiled program and its text; of a second compilation where the first is unprintable."""
    import jax

    compiled = lowered.compile()
    try:
        return compiled, compiled.as_text()
    except jax.errors.JaxRuntimeError:
        _clear(_dumps)
        compiled = lowered.compile(compiler_options=_PRINTABLE)
        return compiled, compiled.as_text()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            path.unlink()


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = ", re.MULTILINE)
# Scoped VMEM of a kernel that asks for no other limit: what libtpu 0.0.52 refuses beyond.
_DEFAULT_VMEM = {"v5e": 16 * 2**20, "v5p": 16 * 2**20, "v6e": 32 * 2**20}
_USED = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_ASKED = re.compile(r'"scoped_memory_configs":\[([^\]]*)\]')
_SIZE = re.compile(r'"memory_space":"?1"?,\s*"offset":"?\d+"?,\s*"size":"?(\d+)')


def _kernels(hlo, calls, schedules, kind: str) -> tuple[KernelReport, ...]:
    """Reports in the order of the compiled program."""
    found = _pallas_instructions(hlo)
    by_name = _match_calls([name for name, _ in found], calls)
    reports = []
    for name, text in found:
        if name not in schedules:
            raise ValueError(f"libtpu left no schedule of {name}; is a compilation cache in use?")
        used, limit = _scoped(_USED, text), _scoped(_ASKED, text) or _DEFAULT_VMEM[kind]
        call = by_name[name]
        reports.append(
            KernelReport(name, call.grid, call.parallel, kind, schedules[name], used, limit)
        )
    return tuple(reports)


def _match_calls(names: list[str], calls: "list[PallasCall]") -> "dict[str, PallasCall]":
    """The call of each compiled kernel, by the names and then by the order of `pallas_call`s.

    A kernel's instruction is its name with a number, unless the call gave no name. The traced
    program may hold calls for other platforms beside those that were compiled.
    """
    left, matched = list(calls), {}
    for by_name in (True, False):
        for name in names:
            if name in matched:
                continue
            same = [call for call in left if not by_name or is_instruction_of(name, call.name)]
            if same:
                matched[name] = same[0]
                left.remove(same[0])
    missing = [name for name in names if name not in matched]
    if missing:
        raise ValueError(f"no pallas_call in the traced program for {', '.join(missing)}")
    return matched


def _pallas_instructions(hlo: str) -> list[tuple[str, str]]:
    """(name, text) of each; the text is several lines where a kernel carries metadata."""
    starts = list(_INSTRUCTION.finditer(hlo))
    ends = [m.start() for m in starts[1:]] + [len(hlo)]
    texts = [(m[1], hlo[m.start() : end]) for m, end in zip(starts, ends, strict=True)]
    return [(n, t) for n, t in texts if 'custom_call_target="tpu_custom_call"' in t]


def _scoped(pattern: re.Pattern, text: str) -> int:
    found = pattern.search(text)
    size = _SIZE.search(found[1]) if found else None
    return int(size[1]) if size else 0


def _in_a_process(fn, args, target: str, from_vectors: int | None) -> Report:
    import jax

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(args))
    try:
        job = pickle.dumps((fn, plain, target, from_vectors))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "libtpu was loaded before the laboratory could set its flags, and fn does not pickle "
            f"({error}); call pallas_kernels.lab.tpu.prepare() before JAX first uses a TPU "
            "topology, or give a function of a module"
        ) from None
    environment = {k: v for k, v in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
    code = "from pallas_kernels.lab import tpu; tpu._serve()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(sys.path) + job,
        capture_output=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Report(target, f"the compiler's process ended with {done.returncode}: {last}")
    return pickle.loads(done.stdout)


def _serve() -> None:
    """The other end of `_in_a_process`: a job on stdin, its report on stdout."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libtpu prints must not stand before the report
    sys.path[:] = pickle.load(sys.stdin.buffer)
    prepare()
    fn, args, target, from_vectors = pickle.load(sys.stdin.buffer)
    with os.fdopen(out, "wb") as stream:
        pickle.dump(_compile(fn, args, target, from_vectors), stream)
