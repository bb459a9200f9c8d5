"""The cheapest legal signatures of a program: the search behind `efficient.parallel.sbp`.

Along one mesh axis, what every operator does along the others being given, operators are taken in
their order. What may matter later is which signatures the tensors still in use exist in; for each
such state the cheapest way to it is kept, and a state is dropped where a cheaper one can be boxed
into it for the difference. So the result is a least one: of the bytes that all devices send, then
of collectives, then of the numbers that a device makes, then of moves, then in the order of the
rules. Axes come one after the other, and then again until none alone can be improved; what one axis
sends depends on the others by what they leave of a tensor on a device only.

A tensor becomes parts of a sum, the rest of them zeros, only where it is added to others. To do so
elsewhere is legal, but never sends less than to gather it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from efficient.errors import UserError
from efficient.parallel.sbp_boxing import Cost, Move, moves
from efficient.parallel.sbp_ops import Op, Program, Rule, Signature, check, fits, legal, show

Total = tuple[int, int, int, int]  # bytes, collectives, numbers made, moves


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rules of an operator, one along each mesh axis, and the signatures they amount to."""

    rules: tuple[Rule, ...]
    inputs: tuple[Signature, ...]
    output: Signature

    @classmethod
    def of(cls, rules: tuple[Rule, ...], operands: int) -> "Choice":
        inputs = tuple(tuple(r.inputs[j] for r in rules) for j in range(operands))
        return cls(rules, inputs, tuple(r.output for r in rules))


Held = tuple[Signature, ...]  # the signatures that a tensor exists in, its operator's first


@dataclasses.dataclass(frozen=True)
class _State:
    """The signatures in which the tensors still in use exist, and the least cost of that."""

    cost: Total
    held: Mapping[str, Held]
    before: "_State | None" = None
    choice: Choice | None = None


def cheapest(
    program: Program,
    placements: Mapping[str, Signature],
    mesh: Mapping[str, int],
    boxing: bool,
) -> list[tuple[Op, Choice, list[tuple[str, Move]]]]:
    """Each operator, how it is computed, and the moves of its operands before; see `explain`."""
    search = _Search(program, placements, {}, boxing)
    states = search.along(0, [()] * len(program.ops)) if not mesh else []
    for count in range(1, len(mesh) + 1):
        rules = [s.choice.rules for s in states] or [()] * len(program.ops)
        search = _Search(program, placements, dict(list(mesh.items())[:count]), boxing)
        states = search.along(count - 1, [(*r, None) for r in rules])
    improved = len(mesh) > 1
    while improved:
        improved = False
        for axis in range(len(mesh)):
            found = search.along(axis, [s.choice.rules for s in states])
            if found and found[-1].cost < states[-1].cost:
                states, improved = found, True
    return [
        (op, after.choice, search.moved(op, after))
        for op, after in zip(program.ops, states, strict=True)
    ]


def _refuse(
    op: Op,
    program: Program,
    state: _State,
    placements: Mapping[str, Signature],
    mesh: Mapping[str, int],
) -> None:
    """Says why no choice of an operator takes what there is and gives what is wanted."""
    wanted = placements.get(op.output)
    for i, axis in enumerate(mesh):
        outputs = dict.fromkeys(str(r.output) for r in legal(op, program.dims))
        if wanted and str(wanted[i]) not in outputs:
            raise UserError(
                f"{op.name} ({op.kind}): its output {op.output} cannot be {wanted[i]} over"
                f" {axis!r}; legal: {', '.join(outputs)}"
            )
    there = [state.held[name][0] for name in op.inputs]
    check(op, program, there, mesh)
    raise UserError(
        f"{op.name} ({op.kind}): from {', '.join(map(show, there))} its output {op.output} cannot"
        f" be {show(wanted or ())}; leave its placement out"
    )


class _Search:
    """Steps from states to states, with the prices of boxings remembered."""

    def __init__(
        self,
        program: Program,
        placements: Mapping[str, Signature],
        mesh: Mapping[str, int],
        boxing: bool,
    ):
        count = len(mesh)
        self.program, self.mesh, self.boxing = program, mesh, boxing
        self.sizes = tuple(mesh.values())
        self.placements = {name: s[:count] for name, s in placements.items()}
        self._prices: dict[tuple, tuple[Cost, tuple[Move, ...]]] = {}
        self._made: dict[tuple[str, Signature], int] = {}

    def along(self, axis: int, rules: Sequence[tuple[Rule | None, ...]]) -> list[_State]:
        """The states on the cheapest way, with all rules but those along one axis as given."""
        start = {name: (self.placements[name],) for name in self.program.given}
        states = [_State((0, 0, 0, 0), start)]
        for i, (op, given) in enumerate(zip(self.program.ops, rules, strict=True)):
            later = frozenset(n for after in self.program.ops[i + 1 :] for n in after.inputs)
            choices = self.choices(op, axis, given, states[0])
            reached = self.advance(states, op, choices, later)
            if not reached:
                _refuse(op, self.program, states[0], self.placements, self.mesh)
            states = self.undominated(reached)
        path = [states[0]]
        while path[-1].before is not None:
            path.append(path[-1].before)
        return path[-2::-1]

    def choices(
        self, op: Op, axis: int, given: tuple[Rule | None, ...], state: _State
    ) -> list[Choice]:
        """What an operator may do along an axis: what is legal, wanted, and sends nothing fixed."""
        if op.kind == "place":
            to = op.to[: len(self.sizes)]
            return [Choice(tuple(Rule((one,), one, op.why) for one in to), (to,), to)]
        free = legal(op, self.program.dims) if given else [None]
        found = [
            Choice.of(
                (*given[:axis], *([rule] if rule else ()), *given[axis + 1 :]), len(op.inputs)
            )
            for rule in free
        ]
        return [choice for choice in found if self._allowed(op, choice, state)]

    def _allowed(self, op: Op, choice: Choice, state: _State) -> bool:
        if self.placements.get(op.output, choice.output) != choice.output:
            return False
        tensors = [*zip(op.inputs, choice.inputs, strict=True), (op.output, choice.output)]
        if any(fits(s, self.program.shape(n), self.sizes) for n, s in tensors):
            return False
        fixed = [(n, s) for n, s in tensors[:-1] if n in self.program.fixed]
        return not any(self.price(n, state.held[n][:1], s)[0][0] for n, s in fixed)

    def price(self, name: str, held: Held, wanted: Signature) -> tuple[Cost, tuple[Move, ...]]:
        """The least cost of a tensor in the signature `wanted`, and the moves to it."""
        key = (name, held, wanted)
        if key not in self._prices:
            shape, nbytes = self.program.shape(name), self.program.nbytes(name)
            ways = (moves(h, wanted, shape, nbytes, self.sizes) for h in held)
            self._prices[key] = min(ways, key=lambda found: found[0])
        return self._prices[key]

    def made(self, name: str, signature: Signature) -> int:
        """Numbers of the tensor on one device."""
        key = (name, signature)
        if key not in self._made:
            parts = (n for n, one in zip(self.sizes, signature, strict=True) if one.kind == "S")
            self._made[key] = math.prod(self.program.shape(name)) // math.prod(parts)
        return self._made[key]

    def advance(
        self, states: Sequence[_State], op: Op, choices: Sequence[Choice], later: frozenset[str]
    ) -> list[_State]:
        """The states after an operator; of those with the same signatures the first cheapest."""
        best: dict[tuple, _State] = {}
        for state in states:
            for choice in choices:
                after = self._follow(state, op, choice, later)
                key = after and tuple(sorted(after.held.items()))
                if after and (key not in best or after.cost < best[key].cost):
                    best[key] = after
        return list(best.values())

    def _follow(self, state, op, choice, later) -> _State | None:
        cost, held = state.cost, dict(state.held)
        for name, wanted in zip(op.inputs, choice.inputs, strict=True):
            if wanted in held[name]:
                continue
            added, _ = self.price(name, held[name], wanted)
            if not self.boxing and op.kind != "place":
                return None
            added_to = op.kind == "place" or (op.kind == "linear" and len(op.inputs) > 1)
            if not added_to and not any(_same_parts(h, wanted) for h in held[name]):
                return None
            cost = _sum(cost, added)
            held[name] = (*held[name], wanted)
        made = self.made(op.output, choice.output)
        cost = (cost[0], cost[1], cost[2] + made, cost[3])
        held[op.output] = (choice.output,)
        return _State(cost, {n: h for n, h in held.items() if n in later}, state, choice)

    def undominated(self, states: list[_State]) -> list[_State]:
        """By cost, without those that a cheaper one can be boxed into at no greater cost."""
        kept: list[_State] = []
        for state in sorted(states, key=lambda s: s.cost):
            if not any(self._dominates(other, state) for other in kept):
                kept.append(state)
        return kept

    def _dominates(self, a: _State, b: _State) -> bool:
        cost = a.cost
        for name, signatures in b.held.items():
            held = a.held[name]
            if held == signatures:
                continue
            for signature in signatures:
                if signature not in held:
                    added, _ = self.price(name, held, signature)
                    cost = _sum(cost, added)
                    if cost > b.cost:
                        return False
        return True

    def moved(self, op: Op, after: _State) -> list[tuple[str, Move]]:
        """The moves of an operator's operands on the way to the state after it."""
        held, found = dict(after.before.held), []
        for name, wanted in zip(op.inputs, after.choice.inputs, strict=True):
            if wanted not in held[name]:
                found += [(name, move) for move in self.price(name, held[name], wanted)[1]]
                held[name] = (*held[name], wanted)
        return found


def _sum(total: Total, added: Cost) -> Total:
    """A total with what a boxing adds to it."""
    return (total[0] + added[0], total[1] + added[1], total[2], total[3] + added[2])


def _same_parts(held: Signature, wanted: Signature) -> bool:
    """Whether all parts of sums that are wanted are there already."""
    return all(h == w for h, w in zip(held, wanted, strict=True) if w.kind == "P")
