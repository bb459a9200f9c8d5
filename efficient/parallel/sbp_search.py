"""The cheapest legal signatures of a program: the search behind `efficient.parallel.sbp`.

Operators are taken in their order. What may matter later is which signatures the tensors still in
use exist in; for each such state the cheapest way to it is kept, and a state is dropped where a
cheaper one can be boxed into it for the difference. So the result is a least one, of the bytes that
all devices send, then of collectives, then of moves, then in the order of the rules, as long as no
more than `WIDTH` states are left; of more the cheapest go on, which three axes or more may need.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from efficient.errors import UserError
from efficient.parallel.sbp_boxing import Cost, Move, moves
from efficient.parallel.sbp_ops import Op, Program, Rule, Signature, check, joint, legal, show

WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rules of an operator, one along each mesh axis, and the signatures they amount to."""

    rules: tuple[Rule, ...]
    inputs: tuple[Signature, ...]
    output: Signature


Held = tuple[Signature, ...]  # the signatures that a tensor exists in, its operator's first


@dataclasses.dataclass(frozen=True)
class _State:
    """The signatures in which the tensors still in use exist, and the least cost of that."""

    cost: Cost
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
    search = _Search(program, tuple(mesh.values()), boxing)
    states = [_State((0, 0, 0), {name: (placements[name],) for name in program.given})]
    for i, op in enumerate(program.ops):
        later = frozenset(name for after in program.ops[i + 1 :] for name in after.inputs)
        choices = _choices(op, program, placements.get(op.output), mesh)
        reached = search.advance(states, op, search.allowed(op, choices, states[0]), later)
        if not reached:
            _refuse(op, program, states[0], placements, mesh)
        states = search.undominated(reached)
    path: list[_State] = []
    state = states[0]
    while state.before is not None:
        path.append(state)
        state = state.before
    return [
        (op, after.choice, search.moved(op, after))
        for op, after in zip(program.ops, reversed(path), strict=True)
    ]


def _choices(
    op: Op, program: Program, wanted: Signature | None, mesh: Mapping[str, int]
) -> list[Choice]:
    """What an operator may do along all axes so that its output is as wanted."""
    if op.kind == "place":
        return [Choice(tuple(Rule((one,), one, op.why) for one in op.to), (op.to,), op.to)]
    found = [
        Choice(
            rules,
            tuple(tuple(r.inputs[j] for r in rules) for j in range(len(op.inputs))),
            tuple(r.output for r in rules),
        )
        for rules in joint(op, program, list(mesh.values()))
    ]
    kept = [choice for choice in found if wanted in (None, choice.output)]
    if kept:
        return kept
    for i, axis in enumerate(mesh):
        outputs = dict.fromkeys(str(r.output) for r in legal(op, program.dims))
        if str(wanted[i]) not in outputs:
            raise UserError(
                f"{op.name} ({op.kind}): its output {op.output} cannot be {wanted[i]} over"
                f" {axis!r}; legal: {', '.join(outputs)}"
            )
    outputs = dict.fromkeys(show(choice.output) for choice in found)
    raise UserError(
        f"{op.name} ({op.kind}): its output {op.output} cannot be {show(wanted)}, since its inputs"
        f" would not divide; legal: {', '.join(outputs)}"
    )


def _refuse(op: Op, program: Program, state: _State, placements, mesh) -> None:
    """Says why no choice of an operator takes what there is."""
    there = [state.held[name][0] for name in op.inputs]
    check(op, program, there, mesh)
    raise UserError(
        f"{op.name} ({op.kind}): from {', '.join(map(show, there))} its output {op.output} cannot"
        f" be {show(placements[op.output])}; leave its placement out"
    )


class _Search:
    """Steps from states to states, with the prices of boxings remembered."""

    def __init__(self, program: Program, sizes: Sequence[int], boxing: bool):
        self.program, self.sizes, self.boxing = program, tuple(sizes), boxing
        self._prices: dict[tuple, tuple[Cost, tuple[Move, ...]]] = {}

    def price(self, name: str, held: Held, wanted: Signature) -> tuple[Cost, tuple[Move, ...]]:
        """The least cost of a tensor in the signature `wanted`, and the moves to it."""
        key = (name, held, wanted)
        if key not in self._prices:
            shape, nbytes = self.program.shape(name), self.program.nbytes(name)
            ways = (moves(h, wanted, shape, nbytes, self.sizes) for h in held)
            self._prices[key] = min(ways, key=lambda found: found[0])
        return self._prices[key]

    def allowed(self, op: Op, choices: list[Choice], state: _State) -> list[Choice]:
        """The choices that send nothing of a fixed tensor, which is alike in all states."""
        fixed = [j for j, name in enumerate(op.inputs) if name in self.program.fixed]

        def free(choice: Choice) -> bool:
            priced = ((op.inputs[j], choice.inputs[j]) for j in fixed)
            return not any(self.price(n, state.held[n][:1], wanted)[0][0] for n, wanted in priced)

        return [choice for choice in choices if free(choice)]

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
            cost = (cost[0] + added[0], cost[1] + added[1], cost[2] + added[2])
            held[name] = (*held[name], wanted)
        held[op.output] = (choice.output,)
        return _State(cost, {n: h for n, h in held.items() if n in later}, state, choice)

    def undominated(self, states: list[_State]) -> list[_State]:
        """By cost, without those that a cheaper one can be boxed into at no greater cost."""
        kept: list[_State] = []
        for state in sorted(states, key=lambda s: s.cost):
            if not any(self._dominates(other, state) for other in kept):
                kept.append(state)
            if len(kept) == WIDTH:
                break
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
                    cost = (cost[0] + added[0], cost[1] + added[1], cost[2] + added[2])
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
