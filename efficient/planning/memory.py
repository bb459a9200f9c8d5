"""What a compiled program, or one the compiler refused, needs of a device's memory."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efficient.planning.flops import inner_jaxprs
from efficient.planning.hardware import Target

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    # libtpu 0.0.51, and the wording of older compilers.
    re.compile(r"required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      labelled: arguments by the caller's labels, without the padding of layouts.
      other_arguments: arguments under no label.
      arguments, outputs, aliased, temporaries, code: the compiler's figures, padding included;
        `aliased` is the part of the outputs that reuses donated arguments. None if it refused.
      total: what the program needs at once.
      available: what the chip has for it.
    """

    labelled: dict[str, int]
    other_arguments: int
    arguments: int | None
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    code: int | None
    total: int
    available: int

    @property
    def spare(self) -> int:
        return self.available - self.total


def memory_of(leaves, labels: Mapping, compiled, refusal: str, target: Target) -> Memory:
    """`Memory` of the compiled program, or where `compiled` is None of the compiler's refusal."""
    labelled = {k: sum(map(device_bytes, jax.tree.leaves(v))) for k, v in labels.items()}
    other = sum(map(device_bytes, leaves)) - sum(labelled.values())
    if compiled is None:
        needed, available = refused_bytes(refusal)
        return Memory(
            labelled, other, None, None, None, None, None,
            total=needed or sum(labelled.values()) + other,
            available=available or target.device_hbm_bytes,
        )  # fmt: skip
    stats = compiled.memory_analysis()
    fresh_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + fresh_outputs + stats.temp_size_in_bytes
    return Memory(
        labelled,
        other,
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        total=total + stats.generated_code_size_in_bytes,
        available=target.device_hbm_bytes,
    )


def device_bytes(leaf) -> int:
    """Bytes of one device's shard of an abstract array, without layout padding."""
    sharding, shape = getattr(leaf, "sharding", None), jnp.shape(leaf)
    shape = shape if sharding is None else sharding.shard_shape(shape)
    dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    four_bits = dtype.name in ("int4", "uint4", "float4_e2m1fn")  # two to a byte
    return math.prod(shape) * dtype.itemsize // (2 if four_bits else 1)


def refused_bytes(message: str) -> tuple[int, int]:
    """(needed, available) from the compiler's out-of-memory message; zeros if it says neither."""
    for pattern in _REFUSALS:
        found = pattern.search(message)
        if found:
            needed, unit, available, unit_of_available = found.groups()
            return (
                int(float(needed) * _UNITS[unit]),
                int(float(available) * _UNITS[unit_of_available]),
            )
    return 0, 0


def largest_values(closed_jaxpr, count: int = 6) -> tuple[str, ...]:
    """The largest values a traced program computes, whole and before sharding, as text."""
    found: dict[str, int] = {}
    pending = [(closed_jaxpr.jaxpr, "")]
    while pending:
        jaxpr, outer = pending.pop()
        for eqn in jaxpr.eqns:
            where = f"{outer}/{eqn.source_info.name_stack}".strip("/")
            for var in eqn.outvars:
                if hasattr(var.aval, "shape") and eqn.primitive.name not in ("jit", "pjit"):
                    size = math.prod(var.aval.shape) * var.aval.dtype.itemsize
                    text = f"{var.aval.str_short()} {eqn.primitive.name} in {where or 'the step'}"
                    found[text] = max(size, found.get(text, 0))
            pending += [(inner, where) for inner in inner_jaxprs(eqn.params)]
    largest = sorted(found.items(), key=lambda item: -item[1])[:count]
    return tuple(f"{size / 2**30:.2f} GiB {text}" for text, size in largest)
