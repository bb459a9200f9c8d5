"""What tests of Hopper kernels share: the chip or its interpreter, the compiler, roundings.

The tests of numbers run on a Hopper GPU where JAX sees one, without tests/conftest.py, which wants
CPUs: python -m pytest --noconftest -m "" -k numbers tests/test_attention_gpu.py \\
tests/test_{monarch,block_sparse,block_diagonal,butterfly}_matmul_gpu.py
"""

import contextlib
import os
import re
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import races

from pallas_kernels.hopper import Machine
from pallas_kernels.lab import ops
from pallas_kernels.lab.gpu import INSTALL, SHARED_LIMIT, interpreter
from pallas_kernels.lab.worker import Job, Workers


def interpreted():
    """None on a GPU; else parameters of an interpreter that detects races, memory NaN at first."""
    if jax.default_backend() == "gpu":
        return None
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    return params.InterpretGPUParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )


def machine() -> Machine:
    """The GPU here, or an interpreter of two of its cores."""
    interpret = interpreted()
    return Machine() if interpret is None else Machine(interpret, cores=2)


def no_races():
    """A context whose kernels have no race, where they are detected, which the chip does not."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return races.no_races(gpu_callbacks)


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


def compiles_without_spills(op: str, name: str, names: set[str], roles: Sequence[str] = ()):
    """Compiles a case of the laboratory where jax[cuda13] is; skipped where it is nowhere.

    That interpreter runs the laboratory's worker, and needs none of what tests need.

    Args:
      name: of the case. roles: of it; () for all.
      names: the kernels there have to be.
    """
    if interpreter() is None:
        pytest.skip(INSTALL)  # 4.5 GB, which `make lab-gpu` installs and CI does not
    found = ops.find(op)
    (case,) = (case for case in ops.load(found) if case.name == name)
    with mock.patch.dict(os.environ, {"XLA_FLAGS": ""}), Workers() as workers:
        rows = [
            row
            for role in roles or case.kernels
            for row in workers.run(Job(op, str(found.folder), name, role, "h200"))
        ]
    assert not any(row.reason for row in rows), rows
    assert {row.kernel for row in rows} == names
    for row in rows:
        assert row.spills == row.fills == 0, f"{row.kernel} puts {row.spills} bytes out"
        assert 0 < row.memory_bytes <= row.memory_limit == SHARED_LIMIT
