"""What tests of Hopper kernels share: the interpreter, the compiler, errors against roundings."""

import json
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import Machine
from pallas_kernels.lab.gpu import INSTALL, SHARED_LIMIT, compile_gpu, interpreter


def machine() -> Machine:
    """An interpreter that detects races; memory starts as NaN."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpret = params.InterpretGPUParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    return Machine(interpret, cores=2)


def no_races():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    assert not interpret_pallas_call.get_races().races_found


def rounded(a, dtype):
    """To dtype and back to float64."""
    return np.asarray(jnp.asarray(a, dtype), np.float64)


def check(found: dict, right: dict, naive: dict):
    """Each array's error is at most twice that of the naive form, and 2^-20 of its greatest.

    right and naive are float64; naive has the roundings that any kernel of this dtype makes. Twice,
    for a sum in float32 that is off by its last bit may be rounded to the other side.
    """
    for name, expected in right.items():
        array, near = np.asarray(found[name], np.float64), np.asarray(naive[name], np.float64)
        assert array.shape == expected.shape and np.isfinite(array).all(), name
        greatest = np.abs(expected).max()
        assert greatest > 0
        error, allowed = (np.abs(a - expected).max() for a in (array, near))
        assert error <= 2 * allowed + 2.0**-20 * greatest, (name, error, allowed, greatest)


def lowered_kernels(prefix: str, fn, *args) -> set[str]:
    """Mosaic GPU kernels in the program of fn(*args) for CUDA, of the names that begin so."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return set(re.findall(rf"({prefix}_\w+)_mosaic_gpu", text))


def print_reports(fn, args):
    """ptxas' report of each kernel of fn(*args); run by the interpreter that has jax[cuda13]."""
    report = compile_gpu(fn, args)
    assert report.ok, report.reason
    for kernel in report.kernels:
        print(json.dumps([kernel.name, kernel.spill_stores, kernel.shared_bytes]))


def compiles_without_spills(call: str, names: set[str]):
    """Runs `call` of `print_reports` where jax[cuda13] is; skipped where it is nowhere.

    Args:
      call: "module.function(arguments)" of the tests.
      names: the kernels there have to be.
    """
    python = interpreter()
    if python is None:
        pytest.skip(INSTALL)  # 4.5 GB, which `make lab-gpu` installs and CI does not
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [python, "-c", f"import {call.partition('.')[0]}; {call}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert {kernel for kernel, _, _ in kernels} == names
    for kernel, spills, shared in kernels:
        assert spills == 0, f"{kernel} puts {spills} bytes of registers out"
        assert shared <= SHARED_LIMIT
