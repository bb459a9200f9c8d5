"""Reads the optimized, scheduled HLO text of a compiled program: shapes, loops, how often.

`compiled.cost_analysis()` counts the body of a while loop once, so a scan over layers looks like
one layer. Here every instruction comes with the number of times it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM_BITS = re.compile(r"^[a-z]+(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_TILE = re.compile(r"T\(([^)]*)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
)

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array type. `space` is 0 for HBM; TPU VMEM is 1, flags and scalars have higher ones."""

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        if self.dtype == "pred":
            return 8
        found = _ITEM_BITS.match(self.dtype)  # f8e4m3fn is 8, c64 is 64
        return int(found.group(1)) if found else 0

    @property
    def logical_bytes(self) -> int:
        return math.prod(self.dims) * self.bits // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes in memory: minor axes rounded up to the tile of the layout."""
        if not self.tile or not self.dims:
            return self.logical_bytes
        order = self.layout or tuple(reversed(range(len(self.dims))))
        physical = [self.dims[d] for d in reversed(order)]
        for i, tile in enumerate(reversed(self.tile), start=1):
            if i <= len(physical) and tile > 1:
                physical[-i] = -(-physical[-i] // tile) * tile
        return math.prod(physical) * self.bits // 8

    @property
    def hbm_bytes(self) -> int:
        return self.padded_bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool
    inner: str  # the text between the parentheses: a constant's value, a parameter's number

    @property
    def kind(self) -> str:
        """The opcode without `-start`."""
        return self.opcode.removesuffix("-start")

    @property
    def called(self) -> tuple[str, ...]:
        return tuple(_CALLED.findall(self.attributes))

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        found = [i for i in self.instructions.values() if i.root]
        return found[0] if found else list(self.instructions.values())[-1]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inner))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    def source(self, name: str) -> Instruction | None:
        """The instruction behind copies, bitcasts and converts of a value."""
        found = self.instructions.get(name)
        while found is not None and found.opcode in ("copy", "bitcast", "convert", "reshape"):
            found = self.instructions.get(found.operands[0]) if found.operands else None
        return found


class Module:
    """A parsed module. `scheduled()` yields what the device runs, with how often."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.notes: set[str] = set()
        self._parse(text)

    def _parse(self, text: str) -> None:
        name, body = None, {}
        for line in text.splitlines():
            if name is None:
                if line.rstrip().endswith("{") and ("%" in line or line.startswith("ENTRY")):
                    found = _NAME.search(line)
                    if found and "->" in line:
                        name, body = found.group(1), {}
                        if line.startswith("ENTRY"):
                            self.entry = name
            elif line.startswith("}"):
                self.computations[name] = Computation(name, body)
                name = None
            else:
                instruction = parse_instruction(line)
                if instruction is not None:
                    body[instruction.name] = instruction

    def scheduled(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction outside fusions, with the number of times it runs in one step."""
        yield from self._walk(self.computations[self.entry], 1)

    def _walk(self, computation: Computation, times: int):
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                turns = times * self.trip_count(computation, instruction)
                for which in ("condition", "body"):
                    yield from self._walk(self.computations[instruction.attribute(which)], turns)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    yield from self._walk(self.computations[name], times)
            elif instruction.opcode == "conditional":
                # Which branch runs is not known here; the largest one stands for them all.
                branches = [self.computations[name] for name in _branches(instruction)]
                yield from self._walk(max(branches, key=_weight), times)

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Turns of a while loop: as the compiler states it, or a counter against a constant."""
        stated = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.attributes)
        if stated:
            return int(stated.group(1))
        turns = self._counted(computation, loop)
        if turns is None:
            self.notes.add(f"loop {loop.name} of unknown length counts as one turn")
            return 1
        return turns

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        test = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        compare = test.root
        if compare.opcode != "compare" or len(compare.operands) != 2:
            return None
        init = computation.instructions.get(loop.operands[0])
        if init is None or init.opcode != "tuple":
            return None

        def entering(instruction) -> int | None:
            if instruction is None:
                return None
            if instruction.opcode == "get-tuple-element":
                instruction = computation.source(init.operands[_index(instruction)])
            return _constant(instruction)

        left, right = (test.source(name) for name in compare.operands)
        direction = re.search(r"direction=(\w+)", compare.attributes).group(1)
        if left is None or left.opcode != "get-tuple-element":
            return None
        start, bound = entering(left), entering(right)
        step = _step(body, _index(left))
        if None in (start, bound, step) or step == 0:
            return None
        if direction in ("LT", "GT", "NE"):
            return max(0, -(-(bound - start) // step))
        return max(0, (bound - start) // step + 1) if direction in ("LE", "GE") else None


def _weight(computation: Computation) -> int:
    return sum(s.padded_bytes for i in computation.instructions.values() for s in i.shapes)


def _branches(instruction: Instruction) -> list[str]:
    return _NAME.findall(" ".join("".join(b) for b in _BRANCHES.findall(instruction.attributes)))


def _index(instruction: Instruction) -> int:
    return int(re.search(r"index=(\d+)", instruction.attributes).group(1))


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.inner) if re.fullmatch(r"-?\d+", instruction.inner) else None


def _step(body: Computation, index: int) -> int | None:
    """What one turn adds to tuple element `index`."""
    if body.root.opcode != "tuple":
        return None
    update = body.source(body.root.operands[index])
    if update is None or update.opcode not in ("add", "subtract") or len(update.operands) != 2:
        return None
    sources = [body.source(name) for name in update.operands]
    constants = [_constant(s) for s in sources if _constant(s) is not None]
    if len(constants) == 1:
        return constants[0] if update.opcode == "add" else -constants[0]
    # The step itself may be sunk into the loop's tuple; jax only ever counts by one.
    both = all(s is not None and s.opcode == "get-tuple-element" for s in sources)
    return 1 if both and update.opcode == "add" else None


def parse_instruction(line: str) -> Instruction | None:
    """Reads `[ROOT] %name = type opcode(operands), attributes`; None for anything else."""
    line = _COMMENT.sub("", line).strip()
    root = line.startswith("ROOT ")
    line = line.removeprefix("ROOT ")
    head, equals, rest = line.partition(" = ")
    if not equals or not head.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    open_at = rest.find("(")
    if open_at < 0:
        return None
    close_at = _closing(rest, open_at)
    inner = rest[open_at + 1 : close_at]
    opcode = rest[:open_at]
    operands = () if opcode in ("parameter", "constant") else tuple(_NAME.findall(inner))
    return Instruction(
        head[1:], opcode, parse_shapes(types), operands, rest[close_at + 1 :], root, inner
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


@functools.lru_cache(maxsize=65536)
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The array types of a type, tuples flattened."""
    return tuple(_shape(*found) for found in _ARRAY.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    order, _, rest = layout.partition(":")
    tile, space = _TILE.search(rest), _SPACE.search(rest)
    return Shape(
        dtype,
        tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d),
        tuple(int(d) for d in order.split(",") if d.isdigit()),
        tuple(int(t) if t.isdigit() else 1 for t in tile.group(1).split(",")) if tile else (),
        int(space.group(1)) if space else 0,
    )
