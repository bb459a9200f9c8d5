"""Signatures of tensors and operators: which placements an operator can compute with.

The vocabulary of `efficient.parallel.sbp`. Along one axis of a mesh a tensor is split, S(axis),
whole on every device, B, or the sum (the maximum) of what the devices hold, P(sum), P(max); along
all axes it has a tuple of these. An operator is described by the letters of its tensors'
dimensions, from which `legal` lists what it can take and what it then gives.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from efficient.errors import UserError, nearest

PARTS = ("sum", "max")
KINDS = {
    "einsum": "multilinear: products of the operands, summed over letters that the output lacks",
    "linear": "a sum of the operands, or a linear map of one, element by element",
    "nonlinear": "any function, element by element but for the letters `over`, which it mixes",
    "sum": "the sum over the letters `over`",
    "max": "the maximum over the letters `over`",
    "lookup": "rows [V, ...] of the first operand at the indices of the second",
    "pick": "the element at the index of the second operand along the letter `over` of the first",
    "reshape": "the same numbers under other letters; `renamed` says which of them keep a split",
    "place": "where the numbers are to lie, `to`; any boxing leads there",
}


class Sbp(NamedTuple):
    """S(axis), B, P(sum) or P(max): how a tensor lies along one mesh axis.

    Attributes:
      kind: "S", "B" or "P".
      axis: of S, the dimension that is split.
      part: of P, what the devices' values are combined by.
    """

    kind: str
    axis: int | None = None
    part: str | None = None

    def __str__(self) -> str:
        return {"S": f"S({self.axis})", "B": "B", "P": f"P({self.part})"}[self.kind]

    @classmethod
    def parse(cls, text: str) -> "Sbp":
        """Reads "S(0)", "B", "P(sum)", "P(max)", or "P" for "P(sum)"."""
        text = text.strip()
        if text == "B":
            return B
        if split := re.fullmatch(r"S\((\d+)\)", text):
            return S(int(split[1]))
        part = re.fullmatch(r"P(?:\((\w+)\))?", text)
        if part and (part[1] or "sum") in PARTS:
            return P(part[1] or "sum")
        raise UserError(f"{text!r} is no signature; write S(0), B, P(sum) or P(max)")


def S(axis: int) -> Sbp:
    """Split along a dimension."""
    return Sbp("S", axis=axis)


def P(part: str = "sum") -> Sbp:
    """A part of a sum or of a maximum."""
    return Sbp("P", part=part)


B = Sbp("B")
Signature = tuple[Sbp, ...]  # along the axes of a mesh, in their order


def parse(text: str) -> Signature:
    """ "(S(0), B)" -> (S(0), B); a signature along one axis may go without brackets."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    return tuple(Sbp.parse(part) for part in text.split(","))


def show(signature: Signature) -> str:
    """The inverse of `parse`."""
    one = ", ".join(map(str, signature))
    return one if len(signature) == 1 else f"({one})"


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator of a program.

    Attributes:
      name: how messages call it.
      kind: one of `KINDS`.
      inputs: names of tensors.
      output: name of the tensor that it makes.
      over: letters; see `KINDS`.
      renamed: of a reshape, (letter of the input, letter of the output) where a split along the
        first is one along the second.
      to: of a place, the signature.
      why: of a place, who asks for it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    over: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    to: Signature = ()
    why: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"{self.name}: no operator {self.kind!r}; {nearest(self.kind, KINDS)}")


@dataclasses.dataclass(frozen=True)
class Program:
    """Operators in order, over named tensors.

    Attributes:
      dims: tensor -> its dimensions, one letter each.
      sizes: letter -> size.
      ops: in an order in which they can run.
      itemsize: tensor -> bytes a number; 4 where it is silent.
      fixed: tensors that are not sent: operators take them as they lie, or a slice of them.
    """

    dims: Mapping[str, str]
    sizes: Mapping[str, int]
    ops: tuple[Op, ...]
    itemsize: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def __post_init__(self):
        for op in self.ops:
            for name in (*op.inputs, op.output):
                if name not in self.dims:
                    raise UserError(f"{op.name}: the program gives no dimensions of {name!r}")
            read, out = "".join(self.dims[n] for n in op.inputs), self.dims[op.output]
            lost = set(read) - set(out)
            if op.kind in ("linear", "nonlinear", "place") and lost:
                raise UserError(f"{op.name}: {op.kind} keeps its letters; {min(lost)} is lost")
            if op.kind not in ("reshape", "linear", "nonlinear") and set(out) - set(read):
                raise UserError(f"{op.name}: {min(set(out) - set(read))} is in no operand")

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in self.dims[tensor])

    def nbytes(self, tensor: str) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape(tensor)) * self.itemsize.get(tensor, 4)

    @property
    def given(self) -> tuple[str, ...]:
        """The tensors that no operator makes, in the order of their first use."""
        made = {op.output for op in self.ops}
        used = (name for op in self.ops for name in op.inputs)
        return tuple(dict.fromkeys(name for name in used if name not in made))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Signatures along one mesh axis with which an operator is computed without communication."""

    inputs: tuple[Sbp, ...]
    output: Sbp
    why: str


def legal(op: Op, dims: Mapping[str, str]) -> list[Rule]:
    """What an operator can take and give along one mesh axis, splits by letter first.

    Sizes are not looked at; `fits` does that. A `place` takes anything and so has no rules.
    """
    operands, out = [dims[name] for name in op.inputs], dims[op.output]
    rules = _splits(op, operands, out) + _parts(op, operands, out)
    return [*rules, Rule((B,) * len(operands), B, "whole")]


def _splits(op: Op, operands: list[str], out: str) -> list[Rule]:
    """One rule a letter: operands that have it are split there, the others whole."""
    rules = []
    renamed = dict(op.renamed)
    for letter in dict.fromkeys("".join(operands)):
        inputs = tuple(S(d.index(letter)) if letter in d else B for d in operands)
        mixed = letter in op.over or (op.kind == "lookup" and letter == operands[0][0])
        to = renamed.get(letter, letter)
        if op.kind in ("nonlinear", "linear") and mixed:
            continue
        if op.kind == "reshape" and to not in out:
            continue
        if op.kind == "max" and mixed:
            rules.append(Rule(inputs, P("max"), f"each device has the largest of its {letter}"))
        elif op.kind in ("lookup", "pick") and mixed:
            why = f"each device has what lies in its part of {letter}, zeros for the rest"
            rules.append(Rule((inputs[0], B), P(), why))
        elif to in out:
            rules.append(Rule(inputs, S(out.index(to)), f"each device has its part of {to}"))
        else:
            rules.append(Rule(inputs, P(), f"each device sums over its part of {letter}"))
    return rules


def _parts(op: Op, operands: list[str], out: str) -> list[Rule]:
    """Rules by which parts of a sum or of a maximum pass through."""
    del out
    count = len(operands)
    if op.kind in ("einsum", "lookup", "pick"):  # linear in one operand while the others are whole
        linear = range(count) if op.kind == "einsum" else (0,)
        return [
            Rule(tuple(P() if j == i else B for j in range(count)), P(), f"linear in {name}")
            for i, name in enumerate(op.inputs)
            if i in linear
        ]
    if op.kind in ("linear", "sum"):
        return [Rule((P(),) * count, P(), "a sum of parts is a part of the sum")]
    if op.kind == "reshape":
        return [Rule((P(part),), P(part), "moves numbers only") for part in PARTS]
    if op.kind == "max":
        return [Rule((P("max"),), P("max"), "the largest of the largest")]
    return []


def fits(
    signature: Signature, shape: Sequence[int], sizes: Sequence[int]
) -> tuple[int, int] | None:
    """None where every split divides its dimension; otherwise (dimension, number of parts)."""
    ways: dict[int, int] = {}
    for n, one in zip(sizes, signature, strict=True):
        if one.kind == "S":
            ways[one.axis] = ways.get(one.axis, 1) * n
    for dim, parts in ways.items():
        if dim >= len(shape) or shape[dim] % parts:
            return dim, parts
    return None


def check(op: Op, program: Program, inputs: Sequence[Signature], mesh: Mapping[str, int]) -> None:
    """Refuses signatures of an operator's inputs that it cannot compute with as they are.

    Raises:
      UserError: names the operator, the operand, the mesh axis, and what would be legal there.
    """
    rules, outputs = legal(op, program.dims), []
    for i, axis in enumerate(mesh):
        left = rules
        for j in range(len(op.inputs)):
            kept = [r for r in left if r.inputs[j] == inputs[j][i]]
            if not kept:
                raise UserError(_refusal(op, program, inputs, i, j, axis, left))
            left = kept
        outputs.append(left[0].output)
    signatures = {**dict(zip(op.inputs, inputs, strict=True)), op.output: tuple(outputs)}
    for name, signature in signatures.items():
        dims, shape = program.dims[name], program.shape(name)
        check_fits(f"{op.name}: its tensor {name}", dims, signature, shape, mesh)


def _refusal(op, program, inputs, i, j, axis, left) -> str:
    given = inputs[j][i]
    others = [f"{n} is {inputs[k][i]}" for k, n in enumerate(op.inputs[:j])]
    beside = f" where {' and '.join(others)}" if others else ""
    allowed = ", ".join(dict.fromkeys(str(r.inputs[j]) for r in left))
    dims = ", ".join(program.dims[n] for n in op.inputs)
    return (
        f"{op.name} ({op.kind} of {dims}): operand {op.inputs[j]} cannot be {given} over"
        f" {axis!r}{beside}, {_why_not(op, program, given, j)}; legal: {allowed}"
    )


def _why_not(op: Op, program: Program, given: Sbp, j: int) -> str:
    dims = program.dims[op.inputs[j]]
    if given.kind == "S" and given.axis >= len(dims):
        return f"which has {len(dims)} dimensions"
    if given.kind == "S":
        letter = dims[given.axis]
        if letter in op.over or op.kind == "reshape":
            return f"since it needs all of {letter} on a device"
        return f"since {letter} is not split alike in every operand"
    if given.part == "max":
        return "since it does not act on parts of a maximum"
    if given.kind == "P" and op.kind in ("nonlinear", "max", "lookup", "pick"):
        return "since it is not linear in parts of a sum"
    if given.kind == "P":
        return "since parts of a sum pass through one factor, or through all terms, only"
    return "since another operand is not whole"


def check_fits(
    what: str, dims: str, signature: Signature, shape: Sequence[int], mesh: Mapping[str, int]
) -> None:
    """Refuses a signature of the wrong length, or one whose splits do not divide the shape."""
    if len(signature) != len(mesh):
        raise UserError(
            f"{what}: {show(signature)} has {len(signature)} entries for the mesh axes"
            f" {', '.join(mesh) or '(none)'}; give one each"
        )
    if wrong := fits(signature, shape, list(mesh.values())):
        dim, ways = wrong
        axes = " and ".join(a for a, s in zip(mesh, signature, strict=True) if s == S(dim))
        if dim >= len(shape):
            raise UserError(f"{what}: S({dim}) over {axes} of {len(shape)} dimensions {dims!r}")
        whole = ["B", *(f"S({i})" for i, n in enumerate(shape) if n % ways == 0)]
        raise UserError(
            f"{what}: S({dim}) over {axes} would split {dims[dim]}={shape[dim]} into {ways} parts,"
            f" which do not divide it; legal: {', '.join(whole)}"
        )
