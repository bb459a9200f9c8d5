"""Instructions of a TPU kernel's scalar unit, read from the compiler's last dump."""

import dataclasses
import re

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_ADDRESS = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[ >]*\{", re.MULTILINE)
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(
    r"(?:%(\w+) = )?([\w.]+)\s*(?:\[(?:thread|resolvable):\S+\]\s*)?(.*)", re.DOTALL
)
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:, %(\w+))?\),?\s*")
_MEMORY = re.compile(r"\[smem:\[#allocation(\w+)(?: \+ (\S+?))?\]\],?\s*")
_ALLOCATION = re.compile(r"\[#allocation(\w+)\]$")
_OPERAND = re.compile(r"index: (\d+), kind: input")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = op (predicate, old) arguments`; cell is the (allocation, index) of sld and sst."""

    op: str
    name: str | None
    arguments: tuple
    predicate: str | None
    negated: bool
    old: str | None
    cell: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Pointer:
    """The start of an operand or of an allocation of scalar memory; no address is computed.

    kind: "operand", "value" of an operand that is no array in memory, or "smem".
    """

    kind: str
    name: str


def parse(dump: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    """Instructions of each bundle, and the bundle at which each numbered region starts."""
    starts = list(_ADDRESS.finditer(dump))
    ends = [m.start() for m in starts[1:]] + [len(dump)]
    bundles, regions = [], {}
    for i, (match, end) in enumerate(zip(starts, ends, strict=True)):
        text = dump[match.end() : end]
        body, _, after = text.rpartition("}")
        for region in _START.findall(after):
            regions.setdefault(region, i)
        parts = (part.strip() for part in _COMMENT.sub("", body).split(";;"))
        bundles.append([_instruction(part) for part in parts if part])
    return bundles, regions


def _instruction(text: str) -> Instruction:
    name, op, rest = _INSTRUCTION.match(text).groups()
    cell, predicate, negated, old = None, None, False, None
    if op in ("sld", "sst"):
        match = _MEMORY.match(rest)
        cell = (match[1], _argument(match[2] or "0")) if match else (None, None)
        rest = rest[match.end() :] if match else ""
    match = _PREDICATE.match(rest)
    if match:
        negated, predicate, old = match[1] == "!", match[2], match[3]
        rest = rest[match.end() :]
    if op == "sbr.rel":
        region = rest.rpartition("$region")[2].strip()
        return Instruction(op, None, (region,), predicate, negated, old)
    if op.startswith("inlined_call_operand"):
        number = _OPERAND.search(rest)
        kind = "value" if rest.startswith("<no memory space>") else "operand"
        given = (Pointer(kind, number[1]),) if number else (None,)
        return Instruction("smov.u32", name, given, predicate, negated, old)
    given = tuple(_argument(part.strip()) for part in rest.split(", ") if part.strip())
    return Instruction(op, name, given, predicate, negated, old, cell)


def _argument(text: str):
    """A name, an integer, a float or a pointer; None for what is none of them."""
    text = text.strip()
    if text.startswith("%"):
        return text[1:]
    allocation = _ALLOCATION.match(text)
    if allocation:
        return Pointer("smem", allocation[1])
    try:
        return signed(int(text.removeprefix("$"), 0))
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def signed(value: int) -> int:
    """A word as an integer of 32 bits."""
    return (value + 2**31) % 2**32 - 2**31


def needed_for_branches(bundles: list[list[Instruction]]) -> set[Instruction]:
    """Instructions that branches depend on, through registers and scalar memory."""
    writers: dict[str, list[Instruction]] = {}
    for bundle in bundles:
        for instruction in bundle:
            for place in _writes(instruction):
                writers.setdefault(place, []).append(instruction)
    found: set[Instruction] = set()
    todo = [x for bundle in bundles for x in bundle if x.op == "sbr.rel"]
    while todo:
        for place in _reads(todo.pop()):
            for instruction in writers.pop(place, ()):
                if instruction not in found:
                    found.add(instruction)
                    todo.append(instruction)
    return found


def _writes(instruction: Instruction):
    if instruction.op == "sst":
        return (f"[{instruction.cell[0]}]",)
    if instruction.op.endswith("_to_smem"):
        return ("[]",)
    return () if instruction.name is None else (instruction.name,)


def _reads(instruction: Instruction):
    if instruction.op == "sbr.rel":
        return () if instruction.predicate is None else (instruction.predicate,)
    names = [x for x in instruction.arguments if isinstance(x, str)]
    names += [x for x in (instruction.predicate, instruction.old) if x is not None]
    if instruction.cell is not None:
        names += [x for x in instruction.cell[1:] if isinstance(x, str)]
        # A copy may write to any allocation.
        names += [f"[{instruction.cell[0]}]", "[]"] if instruction.op == "sld" else []
    return names
