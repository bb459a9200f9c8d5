"""What one scheduled instruction of a compiled program costs: matrix FLOPs and HBM bytes."""

import dataclasses
import math
import re

from efficient.planning.flops import window_taps
from efficient.planning.hlo import COLLECTIVES, Computation, Instruction, Module, Shape

# Opcodes that move nothing themselves. A `-done` only waits for what its `-start` was charged.
_FREE = (
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id")
    + ("while", "conditional", "call", "async-start", "async-update")
    + ("after-all", "replica-id", "opt-barrier")
)
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "pad", "convert", "copy", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")
_BOOKKEEPING = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


def matrix_flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Matrix FLOPs of one run of an instruction on one device, fused ones included."""
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode != "fusion":
        return 0
    fused = [module.computations[name] for name in instruction.called]
    return sum(matrix_flops(module, c, i) for c in fused for i in c.instructions.values())


def _dot(computation: Computation, instruction: Instruction) -> int:
    lhs = computation.instructions[instruction.operands[0]].shapes[0].dims
    contract = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    depth = math.prod(lhs[int(d)] for d in contract.group(1).split(",") if d) if contract else 1
    return 2 * math.prod(instruction.shapes[0].dims) * depth


def _convolution(computation: Computation, instruction: Instruction) -> int:
    # A TPU writes every matrix product as a convolution, batch dimensions as strange windows.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    lhs, rhs = (computation.instructions[n].shapes[0].dims for n in instruction.operands[:2])
    out = instruction.shapes[0].dims
    window = _window(instruction.attributes)
    flops = 2 * out[labels[2].index("b")] * out[labels[2].index("f")] * rhs[labels[1].index("i")]
    for axis in sorted(c for c in labels[2] if c.isdigit()):
        i = int(axis)
        flops *= window_taps(
            lhs[labels[0].index(axis)],
            rhs[labels[1].index(axis)],
            out[labels[2].index(axis)],
            stride=window["stride"][i] if "stride" in window else 1,
            low=window["pad"][i] if "pad" in window else 0,
            lhs_dilate=window["lhs_dilate"][i] if "lhs_dilate" in window else 1,
            rhs_dilate=window["rhs_dilate"][i] if "rhs_dilate" in window else 1,
        )
    return flops


def _window(attributes: str) -> dict[str, list[int]]:
    """`window={size=3x3 pad=1_1x1_1}` as lists by axis; of the padding only the low side."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=") for f in found.group(1).split()) if found else {}
    return {k: [int(v.split("_")[0]) for v in text.split("x")] for k, text in fields.items()}


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes one run of an instruction reads from and writes to HBM, padding included.

    An estimate from below for matrix products too large for on-chip memory, which read an operand
    more than once, and for Pallas kernels likewise. Values in other memory spaces are free; slices
    of an operand count as the slice; an update in place counts as the update.
    """
    opcode, operands = instruction.opcode, _operand_shapes(computation, instruction)
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    if opcode == "custom-call" and any(name in instruction.attributes for name in _BOOKKEEPING):
        return 0
    if opcode in ("copy-start", "slice-start"):
        return _transfer(instruction, operands)
    if opcode in _SLICES:
        return _moved(instruction.shapes[0], operands[0]) + _written(instruction)
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else -1]
        return update.hbm_bytes + _moved(update, instruction.shapes[0])
    if instruction.kind in COLLECTIVES and opcode.endswith("-start"):
        # The tuple of a start repeats its operands; what it writes is as large as the result.
        return 2 * sum(s.hbm_bytes for s in operands)
    return sum(s.hbm_bytes for s in operands) + _written(instruction)


def _operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    found = [computation.instructions.get(name) for name in instruction.operands]
    return [shape for i in found if i is not None for shape in i.shapes]


def _written(instruction: Instruction) -> int:
    return sum(s.hbm_bytes for s in instruction.shapes)


def _moved(part: Shape, whole: Shape) -> int:
    """Bytes of `part` where `whole` lives in HBM."""
    return part.padded_bytes if whole.space == 0 else 0


def _transfer(instruction: Instruction, operands: list[Shape]) -> int:
    # copy-start is (destination, source, flag); slice-start ((source), destination, flag).
    destination = instruction.shapes[0 if instruction.opcode == "copy-start" else 1]
    return _moved(destination, operands[0]) + destination.hbm_bytes


def _fusion_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    fused = module.computations[instruction.called[0]]
    asynchronous = _asynchronous_part(fused)
    total = 0
    for name, parameter in zip(instruction.operands, fused.parameters, strict=False):
        operand = computation.instructions.get(name)
        if operand is None or operand.shapes[0].space != 0:
            continue
        total += _parameter_read(module, fused, parameter, asynchronous)
    results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    for result in results:
        total += _result_write(fused, result, asynchronous)
    return total


def _asynchronous_part(fused: Computation) -> str:
    """'start', 'done' or 'step' of an asynchronous collective spread over fusions, or ''."""
    calls = [i.attributes for i in fused.instructions.values() if i.opcode == "custom-call"]
    for part in ("Start", "Done"):
        if any(f"AsyncCollective{part}" in text for text in calls):
            return part.lower()
    collectives = [i for i in fused.instructions.values() if i.kind in COLLECTIVES]
    return "step" if any("chain_id" in i.attributes for i in collectives) else ""


def _parameter_read(module: Module, fused: Computation, parameter, asynchronous: str) -> int:
    """Bytes a fusion reads of one HBM operand: what its slices ask for, or all of it.

    A fusion computes only what is asked of it, so the way from the operand is followed through
    nested fusions and anything that changes no value, up to a slice.
    """
    whole = parameter.shapes[0]
    read, pending = 0, [(fused, parameter, ())]
    while pending:
        computation, value, callers = pending.pop()
        users = list(computation.users.get(value.name, []))
        if value.root and callers:
            (outer, call), *rest = callers
            pending.append((outer, call, tuple(rest)))
        elif value.root:
            return whole.padded_bytes
        for user in users:
            if user.opcode in _VIEWS:
                pending.append((computation, user, callers))
            elif user.opcode in _SLICES and user.operands[0] == value.name:
                read += _slice_bytes(user.shapes[0], whole)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # updated in place: the rest is neither read nor written
            elif user.opcode == "tuple":
                continue  # handed on, as the buffers of an asynchronous collective are
            elif user.opcode == "fusion":
                inner = module.computations[user.called[0]]
                parameter = inner.parameters[user.operands.index(value.name)]
                pending.append((inner, parameter, ((computation, user), *callers)))
            elif asynchronous in ("step", "done") and _belongs_to_collective(user):
                continue  # charged to the start
            else:
                return whole.padded_bytes
    return min(read, whole.padded_bytes)


def _slice_bytes(part: Shape, whole: Shape) -> int:
    dims = part.dims
    if len(dims) == len(whole.dims):  # of a padded operand no more than there is
        dims = tuple(min(pair) for pair in zip(dims, whole.dims, strict=True))
    return dataclasses.replace(part, dtype=whole.dtype, dims=dims).padded_bytes


def _belongs_to_collective(instruction: Instruction) -> bool:
    return instruction.kind in COLLECTIVES or "AsyncCollective" in instruction.attributes


def _result_write(fused: Computation, name: str, asynchronous: str) -> int:
    instruction = fused.instructions[name]
    if instruction.shapes[0].space != 0 or instruction.opcode == "parameter":
        return 0
    if asynchronous in ("start", "step") and _belongs_to_collective(instruction):
        return 0  # charged to the done
    while instruction.opcode in ("bitcast", "reshape") and instruction.operands:
        instruction = fused.instructions[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        update = fused.instructions.get(instruction.operands[1])
        return update.shapes[0].padded_bytes if update else 0
    return sum(s.hbm_bytes for s in fused.instructions[name].shapes)
