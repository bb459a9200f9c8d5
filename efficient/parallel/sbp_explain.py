"""What each boundary of a program needs, and why: `explain`, of `efficient.parallel.sbp`.

Mesh axes that are neighbours and split every given and every placed tensor alike are taken for one,
`data+fsdp`: a collective then runs over all their devices at once. Given tensors that the program
only places elsewhere, such as gathered parameters, are moved first, before axes are compared.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from efficient.errors import UserError, nearest
from efficient.parallel.sbp_boxing import Move, moves
from efficient.parallel.sbp_ops import Op, Program, Rule, Signature, check_fits
from efficient.parallel.sbp_search import Choice, cheapest


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Where a tensor is wanted with another signature than it has, along one mesh axis.

    Attributes:
      op: the operator that wants it.
      tensor: the tensor.
      axis: the mesh axis, or several that are taken for one, joined by `+`.
      devices: along it.
      before, after: signatures along all axes of the mesh.
      collective: `none` (zeros are put beside it), `slice`, `all-gather`, `reduce-scatter`,
        `all-reduce` or `all-to-all`.
      payload: bytes of what the devices along the axis hold of the tensor together.
      total: bytes that the devices along the axis send together.
      reason: why it is one thing and must be the other.
    """

    op: str
    tensor: str
    axis: str
    devices: int
    before: Signature
    after: Signature
    collective: str
    payload: int
    total: int
    reason: str

    @property
    def bytes(self) -> float:
        """Bytes that each device sends."""
        return self.total / self.devices


@dataclasses.dataclass(frozen=True)
class Step:
    """One operator with the signatures that it is computed with."""

    op: Op
    inputs: tuple[Signature, ...]
    output: Signature
    boundaries: tuple[Boundary, ...]  # before it runs, in order


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The steps of a program on a mesh (axis -> devices)."""

    mesh: Mapping[str, int]
    steps: tuple[Step, ...]

    @property
    def boundaries(self) -> list[Boundary]:
        return [boundary for step in self.steps for boundary in step.boundaries]

    @property
    def collectives(self) -> list[Boundary]:
        """The boundaries at which something is sent."""
        return [b for b in self.boundaries if b.collective not in ("none", "slice")]


def explain(
    program: Program,
    placements: Mapping[str, Signature],
    mesh: Mapping[str, int],
    boxing: bool = True,
) -> Explanation:
    """The signatures with which a program sends least, and every boundary between them.

    Along one axis they are the best there are; see `sbp_search` for several.

    Args:
      placements: the signature of every tensor that the program is given, along the axes of the
        mesh; of one that it makes, the signature that its operator must give it.
      mesh: axis -> devices, in the order in which they split a dimension together.
      boxing: whether tensors may be brought from one signature to another, other than by a place.

    Raises:
      UserError: a placement does not divide its tensor, an operator cannot give what is asked of
        it, or, without boxing, take what there is. It names operator, operand and what is legal.
    """
    _check_placements(program, placements, mesh)
    first, rest, placements = _moved_first(program, placements, mesh)
    known = [*(placements[n] for n in rest.given), *(op.to for op in rest.ops if op.to)]
    known += [placements[op.output] for op in rest.ops if op.output in placements]
    groups = _alike(known, mesh)
    names = {"+".join(group): math.prod(mesh[axis] for axis in group) for group in groups}

    def join(signature: Signature) -> Signature:
        """Along the groups of axes, of what all axes of a group have alike."""
        along = dict(zip(mesh, signature, strict=True))
        return tuple(along[group[0]] for group in groups)

    ops = tuple(dataclasses.replace(op, to=join(op.to) if op.to else ()) for op in rest.ops)
    wanted = {name: join(signature) for name, signature in placements.items()}
    found = cheapest(dataclasses.replace(rest, ops=ops), wanted, names, boxing)
    why = {name: ("as it is placed",) * len(names) for name in rest.given}
    later = {}
    for op, choice, changes in found:
        why[op.output] = tuple(rule.why for rule in choice.rules)
        later[op.output] = _step(op, choice, changes, why, names, groups)
    return Explanation(
        dict(mesh), tuple(first.get(op.output) or later[op.output] for op in program.ops)
    )


def _check_placements(
    program: Program, placements: Mapping[str, Signature], mesh: Mapping[str, int]
) -> None:
    for name in program.given:
        if name not in placements:
            raise UserError(f"tensor {name!r} is given to the program: say how it is placed")
    for name, signature in placements.items():
        if name not in program.dims:
            raise UserError(f"the program has no tensor {name!r}; {nearest(name, program.dims)}")
        check_fits(name, program.dims[name], signature, program.shape(name), mesh)
    for op in program.ops:
        if op.kind == "place":
            dims, shape = program.dims[op.output], program.shape(op.output)
            check_fits(op.name, dims, op.to, shape, mesh)


def _moved_first(program: Program, placements, mesh: Mapping[str, int]):
    """The steps that place given tensors, the program without them, and placements for it."""
    first: dict[str, Step] = {}
    placements, groups = dict(placements), [(axis,) for axis in mesh]
    for op in program.ops:
        if op.kind != "place" or op.inputs[0] not in program.given:
            continue
        name = op.inputs[0]
        shape, nbytes = program.shape(name), program.nbytes(name)
        _, path = moves(placements[name], op.to, shape, nbytes, tuple(mesh.values()))
        choice = Choice(tuple(Rule((one,), one, op.why) for one in op.to), (op.to,), op.to)
        why = {name: ("as it is placed",) * len(mesh)}
        changes = [(name, move) for move in path]
        first[op.output] = _step(op, choice, changes, why, mesh, groups)
        placements[op.output] = op.to
    ops = tuple(op for op in program.ops if op.output not in first)
    return first, dataclasses.replace(program, ops=ops), placements


def _alike(known: Sequence[Signature], mesh: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The mesh axes, neighbours together along which all these signatures are the same."""
    groups: list[tuple[str, ...]] = []
    for i, axis in enumerate(mesh):
        if i and all(signature[i] == signature[i - 1] for signature in known):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return groups


def _step(
    op: Op,
    choice: Choice,
    changes: Sequence[tuple[str, Move]],
    why: Mapping[str, tuple[str, ...]],
    names: Mapping[str, int],
    groups: Sequence[tuple[str, ...]],
) -> Step:
    """A step along groups of axes as one along all axes."""

    def spread(signature: Signature) -> Signature:
        pairs = zip(signature, groups, strict=True)
        return tuple(one for one, group in pairs for _ in group)

    boundaries = []
    for name, move in changes:
        axis = list(names)[move.axis]
        need = op.why or f"it is placed as {choice.output[move.axis]}"
        if op.kind != "place":
            rule = choice.rules[move.axis]
            need = f"{op.kind} takes {rule.inputs[op.inputs.index(name)]} to give {rule.output}"
        before, after = spread(move.before), spread(move.after)
        sent = (before, after, move.collective, move.payload, move.total)
        reason = f"{why[name][move.axis]}; {need}"
        boundaries.append(Boundary(op.name, name, axis, names[axis], *sent, reason))
    inputs = tuple(spread(signature) for signature in choice.inputs)
    to = dataclasses.replace(op, to=spread(op.to)) if op.to else op
    return Step(to, inputs, spread(choice.output), tuple(boundaries))
