"""What differs between JAX 0.10.2 and the newest release. No other file here asks for a version."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core as jex_core


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """A `pallas_call` of a traced program.

    Attributes:
      name: of the kernel.
      grid: its sizes; None for one that is an array of the program.
      parallel: whether a dimension of the grid is "parallel" (TPU).
    """

    name: str
    grid: tuple[int | None, ...]
    parallel: bool


def pallas_calls(closed: Any) -> Iterator[PallasCall]:
    """The `pallas_call`s of a traced program, in program order.

    Args:
      closed: a `jax.extend.core.ClosedJaxpr` or `Jaxpr`, such as `jax.jit(f).trace(x).jaxpr`.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            grid = eqn.params["grid_mapping"].grid
            grid = tuple(n if isinstance(n, int) else None for n in grid)
            yield PallasCall(kernel_name(eqn.params), grid, _parallel(eqn.params))
            continue
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, (jex_core.ClosedJaxpr, jex_core.Jaxpr)):
                    yield from pallas_calls(item)


def _parallel(params: dict[str, Any]) -> bool:
    given = params.get("compiler_params")
    semantics = getattr(given, "dimension_semantics", None) or ()
    return any("parallel" in str(getattr(s, "value", s)).lower() for s in semantics)


def kernel_name(params: dict[str, Any]) -> str:
    """The name of a kernel, from the parameters of its `pallas_call`."""
    # 0.10 keeps the function's own name beside its source line; `name` is the one the caller gave.
    name = params.get("name")
    if name:
        return name
    info = params.get("name_and_src_info")
    return getattr(info, "name", None) or getattr(params["jaxpr"].debug_info, "func_name", "kernel")


def on_device(device: jax.Device):
    """A context in which Pallas lowers as on `device`, which need not be here.

    Some lowerings ask which TPU it is: that of `//` of traced integers, and of kernels that ask
    `pltpu.get_tpu_info`. Where this JAX cannot be told, they fail and say so.
    """
    try:
        cores = getattr(device, "num_cores", None)
        about = jax.sharding.AbstractDevice(device.device_kind, cores, device.platform)
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=about)
        return jax.sharding.use_abstract_mesh(mesh)
    except (AttributeError, TypeError):
        return contextlib.nullcontext()


def tpu_facts() -> tuple[int, int, int, float] | None:
    """Facts about the TPU being traced for, or None if there is none, or this JAX cannot tell.

    VMEM bytes per core, number of cores, matrix-unit columns, bfloat16 FLOPs per byte of HBM
    traffic.
    """
    try:
        about = pltpu.get_tpu_info()
        ridge = about.bf16_ops_per_second / about.mem_bw_bytes_per_second
        return about.vmem_capacity_bytes, about.num_cores, about.mxu_column_size, ridge
    except (AttributeError, ValueError):  # no TPU, or a JAX that cannot tell
        return None
