"""The scalar program of a TPU kernel, run over the kernel's grid: how often each bundle issues.

What a grid step executes is decided by scalars: the step's indices, arrays prefetched to scalar
memory, flags. All of them are in the compiler's last dump, so the branches of every step can be
followed on any machine, for a kernel and for its peer alike. Vectors are not computed. Where a
branch depends on a value that is not known here, both of its sides are charged: the count is never
too low. A backward branch of that kind, a loop of unknown length, ends the attempt.

Instructions that no branch depends on are left out, and an instruction unknown here gives an
unknown value.
"""

import dataclasses
import operator
import re
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from pallas_kernels.lab.instructions import (
    Instruction,
    Pointer,
    needed_for_branches,
    parse,
    signed,
)

DELAY = 4  # bundles after a branch that issue whether it is taken or not
# Straight blocks of bundles to run before the attempt ends; an unknown branch, whose sides start
# from a copy of all that is known, is as much work as some hundreds.
MOST_BLOCKS, OF_BOTH_SIDES = 300_000, 300


class Unknown(Exception):
    """The program cannot be followed; the message says why."""


@dataclasses.dataclass
class _State:
    """Values by SSA name, each with the time of its writing; cells of scalar memory.

    guards: name -> (predicate, negated) of values that hold only where that does, by assumption.
    """

    values: dict
    memory: dict
    guards: dict
    clock: int = 0

    def copy(self) -> "_State":
        memory = {name: dict(cells) for name, cells in self.memory.items()}
        return _State(dict(self.values), memory, dict(self.guards), self.clock)

    def assume(self, predicate: str, value: bool) -> None:
        """The predicate's value, without what was computed for the other."""
        self.put(predicate, value)
        for name, (guard, negated) in list(self.guards.items()):
            if guard == predicate:
                del self.guards[name]
                if value == negated:
                    del self.values[name]

    def merge(self, other: "_State") -> None:
        """What is the same in both stays known."""
        for name in self.values | other.values:
            if self.get(name) != other.get(name):
                self.put(name, None)
        for name in self.memory | other.memory:
            mine, its = (state.memory.setdefault(name, {}) for state in (self, other))
            self.memory[name] = {i: x for i, x in mine.items() if its.get(i) == x}

    def get(self, argument):
        if not isinstance(argument, str):
            return argument
        return self.values[argument][1] if argument in self.values else None

    def put(self, name: str, value) -> None:
        self.clock += 1
        self.values[name] = (self.clock, value)
        self.guards.pop(name, None)


def executed(
    dump: str, operands: Mapping[int, Sequence[int]], from_vectors: int | None = None
) -> tuple[list[int], bool]:
    """How often each bundle of a kernel issues on one core, and whether all branches were known.

    Args:
      dump: the text of `...-final_bundles.txt`.
      operands: words of the prefetched operands whose values are known, by operand number.
      from_vectors: what scalars computed by the vector units are taken to be; None is unknown.

    Raises:
      Unknown: why the program could not be followed.
    """
    machine = _Machine(parse(dump), operands, from_vectors)
    return machine.run(), machine.known


def words(array: np.ndarray, layout: str) -> list[int] | None:
    """An array as the 32-bit words of scalar memory; None where the layout is not understood.

    Args:
      layout: of the HLO operand, such as "2,1,0:T(4,128)(4,1)": the last two axes in tiles of
        4 x 128, where 4 rows of bytes share a word.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "iub" or array.ndim == 0:
        return None
    order, _, tiling = layout.partition(":")
    if order != ",".join(str(axis) for axis in range(array.ndim - 1, -1, -1)):
        return None
    numbers = [tuple(map(int, t.split(","))) for t in re.findall(r"\(([\d,]+)\)", tiling)]
    tile, packed = (numbers + [(1,), (1,)])[:2]
    rows, columns = tile if len(tile) == 2 else (1, tile[0])
    share = packed[0] if len(numbers) > 1 else 1
    if share * array.dtype.itemsize != 4 or rows % share:
        return None
    flat = array.reshape(-1, *array.shape[-2:]) if array.ndim > 1 else array[None, None]
    pads = [(0, -flat.shape[1] % rows), (0, -flat.shape[2] % columns)]
    flat = np.pad(flat, [(0, 0), *pads])
    n, r, c = flat.shape
    tiles = flat.reshape(n, r // rows, rows // share, share, c // columns, columns)
    tiles = tiles.transpose(0, 1, 4, 2, 5, 3)
    return np.ascontiguousarray(tiles).view(np.int32).reshape(-1).tolist()


def _unsigned(value: int) -> int:
    return value % 2**32


_BINARY = {
    "sadd.s32": operator.add,
    "ssub.s32": operator.sub,
    "smul.u32": operator.mul,
    "sand.u32": operator.and_,
    "sor.u32": operator.or_,
    "sxor.u32": operator.xor,
    "sshll.u32": lambda a, b: _unsigned(a) << b if 0 <= b < 32 else 0,
    "sshrl.u32": lambda a, b: _unsigned(a) >> b if 0 <= b < 32 else 0,
    "sshra.s32": lambda a, b: a >> min(_unsigned(b), 31),
    "smin.u32": lambda a, b: min(_unsigned(a), _unsigned(b)),
    "smax.u32": lambda a, b: max(_unsigned(a), _unsigned(b)),
}
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _compare(op: str, a, b):
    _, how, kind = op.split(".")[:3]
    if kind == "u32":
        a, b = _unsigned(a), _unsigned(b)
    if kind == "f32":
        a, b = (struct.unpack("f", struct.pack("i", x))[0] if isinstance(x, int) else x
                for x in (a, b))  # fmt: skip
    return _COMPARE[how](a, b)


def _logic(op: str, given):
    """Of three values, None unknown: one known argument may decide alone."""
    if op == "pneg":
        return None if given[0] is None else not given[0]
    if op in ("pxor", "pnxor"):
        return None if None in given else (given[0] != given[1]) == (op == "pxor")
    absorbing = op in ("por", "pnor")
    if absorbing in given:
        value = absorbing
    elif None in given:
        return None
    else:
        value = not absorbing
    return value != op.startswith("pn")


class _Machine:
    """Runs straight blocks of bundles: between the targets of branches and their ends."""

    def __init__(self, program, operands, from_vectors):
        self.bundles, regions = program
        self.operands, self.from_vectors = operands, from_vectors
        self.targets = {}
        for i, bundle in enumerate(self.bundles):
            for instruction in bundle:
                if instruction.op == "sbr.rel":
                    region = instruction.arguments[0]
                    if i in self.targets or region not in regions:
                        raise Unknown(f"bundle {i:#x}: a branch to {region}")
                    self.targets[i] = regions[region]
                elif instruction.op.startswith(("sbr", "scall", "sret")):
                    raise Unknown(f"bundle {i:#x}: {instruction.op}")
        self.code, self.ends = self._blocks()
        self.counts = dict.fromkeys(self.code, 0)
        self.left, self.known = MOST_BLOCKS, True

    def _blocks(self):
        """Instructions that matter and the end of each block, by its first bundle."""
        cuts = {0, *self.targets.values(), *(i + DELAY + 1 for i in self.targets)}
        cuts = sorted(cut for cut in cuts if cut < len(self.bundles))
        ends = dict(zip(cuts, [*cuts[1:], len(self.bundles)], strict=True))
        needed = needed_for_branches(self.bundles)
        code = {}
        for start, end in ends.items():
            branches = [i for i in range(start, end) if i in self.targets]
            if len(branches) > 1 or (branches and end != branches[0] + DELAY + 1):
                raise Unknown(f"bundle {branches[0]:#x}: a branch among others' delay slots")
            code[start] = [
                (i, instruction)
                for i in range(start, end)
                # A phi stands for a register as it was before the bundle.
                for instruction in sorted(self.bundles[i], key=lambda x: not x.op.endswith("phi"))
                if instruction.op == "sbr.rel" or instruction in needed
            ]
        return code, ends

    def run(self) -> list[int]:
        state = _State({}, {}, {})
        self._run(0, state, len(self.bundles))
        counts = [0] * len(self.bundles)
        for start, end in self.ends.items():
            counts[start:end] = [self.counts[start]] * (end - start)
        return counts

    def _run(self, pc: int, state: _State, until: int) -> int:
        """Runs from `pc` to the first block at or after `until`, and gives that."""
        first = pc
        while pc < until:
            self.left -= 1
            if pc < first or self.left < 0:
                raise Unknown("too long" if self.left < 0 else f"bundle {pc:#x}: a jump back")
            self.counts[pc] += 1
            branch, taken = None, False
            for i, instruction in self.code[pc]:
                if instruction.op == "sbr.rel":
                    branch, taken = instruction, self._holds(instruction, state)
                    at = i
                else:
                    self._step(instruction, state)
            if branch is None or taken is False:
                pc = self.ends[pc]
            elif taken:
                pc = self.targets[at]
            else:
                pc = self._both(branch, self.ends[pc], self.targets[at], state)
        return pc

    def _both(self, branch: Instruction, through: int, target: int, state: _State) -> int:
        """Both sides of a branch on an unknown value: the bundle at which they meet again."""
        self.known = False
        self.left -= OF_BOTH_SIDES
        if target < through:
            raise Unknown(f"bundle {target:#x}: a loop of unknown length")
        taken = state.copy()
        taken.assume(branch.predicate, not branch.negated)
        state.assume(branch.predicate, branch.negated)
        met = self._run(through, state, target)
        if met > target:
            met = self._run(target, taken, met)
        state.merge(taken)
        return met

    def _holds(self, instruction: Instruction, state: _State):
        """Whether a predicated instruction is issued; None where that is unknown."""
        if instruction.predicate is None:
            return True
        value = state.get(instruction.predicate)
        return None if value is None else value != instruction.negated

    def _step(self, instruction: Instruction, state: _State) -> None:
        holds = self._holds(instruction, state)
        if holds is False:
            if instruction.old is not None:
                state.put(instruction.name, state.get(instruction.old))
            return
        if instruction.op == "sst":
            self._store(instruction, state, holds)
        elif instruction.op.startswith("dma.") and instruction.op.endswith("_to_smem"):
            self._copy(instruction, state)
        elif instruction.name is not None:
            value, old = self._value(instruction, state), instruction.old
            known = holds or old is None or value == state.get(old)
            state.put(instruction.name, value if known else None)
            if holds is None and old is None:
                # Hoisted from a side that a later branch on the same predicate takes or not.
                state.guards[instruction.name] = (instruction.predicate, instruction.negated)

    def _store(self, instruction, state, holds) -> None:
        allocation, index = instruction.cell[0], state.get(instruction.cell[1])
        if allocation is None:
            raise Unknown("a store to an unknown place")
        if index is None:
            state.memory[allocation] = {}
        else:
            value = state.get(instruction.arguments[0]) if holds else None
            state.memory.setdefault(allocation, {})[index] = value

    def _copy(self, instruction, state) -> None:
        source, _, target = (state.get(x) for x in instruction.arguments[:3])
        if not isinstance(target, Pointer):
            raise Unknown("a copy to an unknown place")
        known = ()
        if isinstance(source, Pointer) and source.kind == "operand":
            known = self.operands.get(int(source.name), ())
        state.memory[target.name] = dict(enumerate(known))

    def _word(self, value):
        """An operand of one element is handed over as its value."""
        if isinstance(value, Pointer) and value.kind == "value":
            return next(iter(self.operands.get(int(value.name), ())), None)
        return value

    def _value(self, instruction: Instruction, state: _State):
        op = instruction.op
        if op == "spop":
            return self.from_vectors
        if op == "sld":
            allocation, index = instruction.cell[0], state.get(instruction.cell[1])
            return state.memory.get(allocation, {}).get(index)
        if op.endswith("phi"):
            # The register holds what was written last, unless it is unknown whether that was.
            written = [x for x in instruction.arguments if x in state.values]
            last = max(written, key=lambda x: state.values[x][0], default=None)
            return None if last in state.guards else state.get(last)
        given = [state.get(x) for x in instruction.arguments]
        if op in ("por", "pand", "pnor", "pnand", "pneg", "pxor", "pnxor"):
            return _logic(op, given)
        if op == "scalar_select":
            known = given[0] is not None or given[1] == given[2]
            return given[2 if not given[0] else 1] if known else None
        if op.startswith(("smov", "pmov", "int_to_ptr")):
            return self._word(given[-1])
        if op == "sshll.u32" and isinstance(given[0], Pointer):
            return given[0]  # an address in units of another size
        if any(x is None or isinstance(x, Pointer) for x in given):
            return None
        if op in _BINARY and len(given) == 2:
            return signed(_BINARY[op](*given))
        if op.startswith("scmp.") and op.split(".")[1] in _COMPARE:
            return _compare(op, *given)
        return None
