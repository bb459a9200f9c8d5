"""Compiles a step for hardware that is not here, and says what it would need and how fast it is.

    target = Target.parse("v5e:16x16")
    mesh = jax.sharding.Mesh(target.devices, ("fsdp", "tensor"))
    # abstract arguments: jax.ShapeDtypeStruct with NamedSharding(mesh, ...)
    report = plan(jitted_step, (state, batch), target=target, mesh=mesh, labels={...})
    print(report.to_text())

The program, its memory and its collectives are the compiler's own; the times are a roofline and
stay a prediction until measured.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping

import jax

from efficient.errors import UserError
from efficient.planning.collectives import Collective
from efficient.planning.flops import FlopCount, jaxpr_flops
from efficient.planning.hardware import Target
from efficient.planning.memory import Memory, largest_values, memory_of
from efficient.planning.roofline import Roofline, read_work
from pallas_kernels.compat import on_device


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. Times are predictions; memory and collectives are the compiler's.

    Attributes:
      fits: whether the program compiles and its memory is there.
      flops: matrix FLOPs of a step over all devices, from the jaxpr.
      device_flops: matrix FLOPs that one device executes in the compiled program; on a GPU its
        share of `flops`; None if refused.
      xla_flops: XLA's own count for one device, loop bodies counted once; None if not given.
      hbm_bytes: estimate of one device's HBM traffic in a step, loops multiplied.
      largest: the largest values of the traced program before sharding, if it does not fit.
      refusal: the compiler's words, if it refused.
    """

    target: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    memory: Memory
    flops: FlopCount
    device_flops: int | None
    xla_flops: float | None
    hbm_bytes: int | None
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    peak_flops: float
    largest: tuple[str, ...]
    refusal: str
    notes: tuple[str, ...]
    seconds_to_lower: float
    seconds_to_compile: float
    versions: dict[str, str]

    def utilization(self, seconds: float, *, recomputed: bool = False) -> float:
        """Fraction of peak if a step takes `seconds`: MFU, or HFU with `recomputed`."""
        flops = self.flops.total if recomputed else self.flops.model
        return flops / (seconds * self.devices * self.peak_flops)

    def to_json(self) -> str:
        """Every field, under `report` with what the text says of them: verdict and prediction."""
        from efficient.planning import report

        return json.dumps(dataclasses.asdict(self) | {"report": report.conclusions(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        fields = json.loads(text)
        fields.pop("report", None)
        fields["memory"] = Memory(**fields["memory"])
        fields["flops"] = FlopCount(**_tuples(fields["flops"]))
        fields["collectives"] = tuple(Collective(**_tuples(c)) for c in fields["collectives"])
        fields["roofline"] = fields["roofline"] and Roofline(**fields["roofline"])
        return cls(**_tuples(fields))

    def to_text(self) -> str:
        """The report as a table for a terminal."""
        from efficient.planning import report

        return report.to_text(self)


def plan(
    fn_jitted: Callable,
    abstract_args: tuple,
    *,
    target: Target,
    mesh: jax.sharding.Mesh,
    labels: Mapping[str, object] | None = None,
    asked: int | None = None,
) -> Plan:
    """Traces, lowers and compiles `fn_jitted(*abstract_args)` for `target`, and reads the result.

    Args:
      fn_jitted: a `jax.jit` function; what it donates counts as reused.
      abstract_args: positional arguments, pytrees of `jax.ShapeDtypeStruct` whose shardings lie on
        `mesh`. A function that names bare `PartitionSpec`s needs `jax.set_mesh(mesh)` around this.
      target: where it would run.
      mesh: a mesh over all of `target.devices`.
      labels: name -> subtree of `abstract_args` (or a pytree of the same leaves) to report apart,
        such as {'parameters': state.params, 'optimizer': state.opt_state, 'batch': batch}.
      asked: model FLOPs, where the program's own count of them is none; see `FlopCount`.

    Returns:
      A `Plan`; a program too large for the chip is one with `fits=False`, not an error.

    Raises:
      UserError: mesh and target differ in size, or no argument is placed on the mesh.
    """
    leaves = jax.tree.leaves(abstract_args)
    _check(leaves, mesh, target)
    began = time.perf_counter()
    with _traced_on(target):
        traced = fn_jitted.trace(*abstract_args)
        lowered = traced.lower(lowering_platforms=(target.platform,))
    lowered_at = time.perf_counter()
    compiled, refusal = _compile(lowered)
    compiled_at = time.perf_counter()
    flops = jaxpr_flops(traced.jaxpr, platform=target.platform)
    flops = dataclasses.replace(flops, asked=asked)
    memory = memory_of(leaves, labels or {}, compiled, refusal, target)
    text, notes = _text(lowered, compiled) if compiled is not None else ("", ())
    work = read_work(text, flops, target, mesh) if text else None
    # A TPU's compiler refuses what does not fit; a GPU's allocates at run time.
    accepted = target.platform == "tpu" or memory.total <= memory.available
    fits = compiled is not None and accepted
    return Plan(
        target=str(target),
        devices=target.device_count,
        mesh={name: int(n) for name, n in mesh.shape.items()},
        fits=fits,
        memory=memory,
        flops=flops,
        device_flops=work and work.flops,
        xla_flops=_xla_flops(compiled),
        hbm_bytes=work and work.hbm_bytes,
        collectives=work.collectives if work else (),
        roofline=work and work.roofline,
        peak_flops=target.device_peak_flops,
        largest=() if fits else largest_values(traced.jaxpr),
        refusal=refusal,
        notes=(*flops.notes, *notes, *(work.notes if work else ())),
        seconds_to_lower=lowered_at - began,
        seconds_to_compile=compiled_at - lowered_at,
        versions=_versions(target),
    )


def _traced_on(target: Target):
    """A context in which kernels ask of the target what they would ask of the chip they run on."""
    if target.platform != "tpu" or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return on_device(target.devices.flat[0])


def _check(leaves, mesh, target: Target) -> None:
    if mesh.size != target.device_count:
        raise UserError(
            f"the mesh has {mesh.size} devices, {target} has {target.device_count}; "
            "reshape all of target.devices into the mesh"
        )
    devices = set(mesh.devices.flat)
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    placed = [s for s in shardings if s is not None and set(s.device_set) <= devices]
    if not placed:
        raise UserError(
            "no abstract argument lies on the target's mesh; give jax.ShapeDtypeStruct(shape, "
            "dtype, sharding=NamedSharding(mesh, spec))"
        )


def _compile(lowered):
    """(compiled, '') or (None, the compiler's refusal)."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        return None, message


# jaxlib 0.10.2 cannot print the asynchronous gathers that libtpu 0.0.51 gives to the SparseCore
# (v5p and newer): their instructions do not pass its own check.
_PRINTABLE = {"xla_tpu_offload_gather_to_sparsecore": "false"}


def _text(lowered, compiled) -> tuple[str, tuple[str, ...]]:
    """The scheduled HLO and notes on it; of a second compilation where the first is unprintable."""
    try:
        with _no_stack_trace():
            return compiled.as_text(), ()
    except jax.errors.JaxRuntimeError:
        pass
    try:
        text = lowered.compile(compiler_options=_PRINTABLE).as_text()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        return "", (f"this jaxlib cannot print the compiled program, so no roofline: {reason}",)
    return text, (
        "this jaxlib cannot print the program as compiled; FLOPs, HBM bytes and collectives were "
        "read from a second compilation without gathers on the SparseCore",
    )


@contextlib.contextmanager
def _no_stack_trace():
    """Keeps from the terminal what C++ writes of an error that Python gets and handles."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _xla_flops(compiled) -> float | None:
    cost = compiled.cost_analysis() if compiled is not None else None
    cost = cost[0] if isinstance(cost, list) and cost else cost
    return float(cost["flops"]) if cost and "flops" in cost else None


def _versions(target: Target) -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu" if target.platform == "tpu" else "jax-cuda13-plugin")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def _tuples(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
