"""OneFlow's signatures: on simulated devices in NumPy, against all combinations, and XLA."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from configs import common
from efficient.errors import UserError
from efficient.parallel.mesh import make_mesh
from efficient.parallel.placement import Placement
from efficient.parallel.sbp import B, Op, P, Program, S, check, explain, legal, main, parse, show
from efficient.parallel.sbp_boxing import boxing, moves
from efficient.parallel.sbp_model import Device, decoder_program, mesh_axes
from efficient.parallel.sbp_ops import fits
from efficient.planning.collectives import find_collectives
from efficient.planning.hardware import Target
from efficient.planning.hlo import Module
from efficient.training import experiment

PLAIN = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]


def program_of(dims, sizes, *ops):
    return Program(dims, sizes, tuple(ops))


MATMUL = Op("y", "einsum", ("x", "w"), "y")
MATRICES = program_of({"x": "MK", "w": "KN", "y": "MN"}, {"M": 4, "K": 8, "N": 12}, MATMUL)


def test_signatures_read_and_print():
    for text in ("S(0)", "B", "P(sum)", "P(max)", "(S(0), B)", "(S(1), P(max), S(12))"):
        assert show(parse(text)) == text
    assert parse("P") == (P("sum"),) and parse("( S(0),B )") == (S(0), B)
    for wrong in ("S", "S(-1)", "P(mean)", "B(0)", "", "S(0) B"):
        with pytest.raises(UserError, match="is no signature"):
            parse(wrong)


def test_signatures_of_a_matrix_product():
    """The list of `matmul_op.cpp` along one axis; along two the paper's (S(0), B) x (B, S(1))."""
    found = {(*map(str, r.inputs), str(r.output)) for r in legal(MATMUL, MATRICES.dims)}
    assert found == {
        ("S(0)", "B", "S(0)"),
        ("B", "S(1)", "S(1)"),
        ("S(1)", "S(0)", "P(sum)"),
        ("P(sum)", "B", "P(sum)"),
        ("B", "P(sum)", "P(sum)"),
        ("B", "B", "B"),
    }
    mesh = {"a": 2, "b": 2}
    for x, w, y in (
        ("(S(0), B)", "(B, S(1))", "(S(0), S(1))"),
        ("(S(0), S(1))", "(B, S(0))", "(S(0), P(sum))"),
    ):
        placed = {"x": parse(x), "w": parse(w)}
        check(MATMUL, MATRICES, list(placed.values()), mesh)
        step = explain(MATRICES, placed, mesh, boxing=False).steps[0]
        assert show(step.output) == y and not step.boundaries


@pytest.mark.parametrize(
    ("kind", "dims", "over", "illegal"),
    [
        ("nonlinear", "BTD", "", {"P(sum)", "P(max)"}),
        ("nonlinear", "BTD", "D", {"P(sum)", "P(max)", "S(2)"}),
        ("linear", "BTD", "", {"P(max)"}),
    ],
)
def test_what_elementwise_operators_take(kind, dims, over, illegal):
    op = Op("f", kind, ("x",), "y", over=over)
    taken = {str(r.inputs[0]) for r in legal(op, {"x": dims, "y": dims})}
    assert taken == {"S(0)", "S(1)", "S(2)", "B", "P(sum)", "P(max)"} - illegal


# Simulated devices: local arrays by the coordinates of a device, and real exchanges.


class Devices:
    def __init__(self, sizes):
        self.sizes, self.sent = sizes, 0
        self.places = list(itertools.product(*map(range, sizes)))

    def slices(self, signature, place, ndim):
        """(index, count) of the part of each dimension that a device has; first axis slowest."""
        parts = [(0, 1)] * ndim
        for one, at, n in zip(signature, place, self.sizes, strict=True):
            if one.kind == "S":
                index, count = parts[one.axis]
                parts[one.axis] = (index * n + at, count * n)
        return parts

    def cut(self, x, parts):
        index = (
            slice(i * n // c, (i + 1) * n // c) for (i, c), n in zip(parts, x.shape, strict=True)
        )
        return x[tuple(index)]

    def scatter(self, x, signature, rng):
        """Local arrays whose combination is x; parts of sums and maxima are drawn."""
        local = dict.fromkeys(self.places, x)
        for axis, one in enumerate(signature):
            if one.kind != "P":
                continue
            n = self.sizes[axis]
            drawn = rng.integers(-4, 5, (n, *x.shape))
            if one.part == "sum":  # the same along every other axis, or B would be no copy
                parts = [drawn[i] - drawn[i - 1] for i in range(n)]
            else:
                owner = rng.integers(0, n, x.shape)
                parts = [np.where(owner == i, 0, -1 - abs(drawn[i])) for i in range(n)]
            for place in self.places:
                first = place[axis] == 0 or one.part == "max"
                local[place] = local[place] * first + parts[place[axis]]
        return {p: self.cut(v, self.slices(signature, p, x.ndim)) for p, v in local.items()}

    def groups(self, axis):
        rest = [range(n) for i, n in enumerate(self.sizes) if i != axis]
        for other in itertools.product(*rest):
            yield [(*other[:axis], i, *other[axis:]) for i in range(self.sizes[axis])]

    def move(self, local, axis, before, after):
        """One boxing, by blocks that devices of a group hand to each other and count."""
        new = {}
        for group in self.groups(axis):
            held = [local[place] for place in group]
            new |= dict(zip(group, _exchange(self, held, before, after), strict=True))
        return new

    def assemble(self, local, signature, shape):
        """The whole array; asserts that what should be equal is."""
        for axis in reversed(range(len(signature))):
            one, whole = signature[axis], {}
            for group in self.groups(axis):
                held = [local[place] for place in group]
                if one.kind == "S":
                    value = np.concatenate(held, axis=one.axis)
                elif one.kind == "P":
                    value = sum(held) if one.part == "sum" else np.maximum.reduce(held)
                else:
                    value = held[0]
                    for other in held[1:]:
                        np.testing.assert_array_equal(other, value)
                whole.update(dict.fromkeys(group, value))
            local = whole
        value = next(iter(local.values()))
        assert value.shape == shape
        return value


def _exchange(devices, held, before, after):
    """Local arrays of a group after a boxing: blocks go from device to device, in rings."""
    n = len(held)

    def send(block):
        devices.sent += block.nbytes
        return block

    def scatter_sums(axis):
        combine = np.add if before.part == "sum" else np.maximum
        split = [np.array_split(h, n, axis) for h in held]
        done = []
        for i in range(n):  # block i travels once around and grows, ending at device i
            value = split[(i + 1) % n][i]
            for hop in range(2, n + 1):
                value = combine(send(value), split[(i + hop) % n][i])
            done.append(value)
        return done

    def gather(parts, axis):
        whole = [np.concatenate(parts, axis)] * n
        for part in parts:
            for _ in range(n - 1):
                send(part)
        return whole

    kinds = before.kind + after.kind
    if kinds == "BS":
        return [np.array_split(h, n, after.axis)[i] for i, h in enumerate(held)]
    if kinds in ("BP", "SP"):
        empty = 0 if after.part == "sum" else np.iinfo(held[0].dtype).min
        if kinds == "BP":
            return [h if i == 0 else np.full_like(h, empty) for i, h in enumerate(held)]
        out = []
        for i, h in enumerate(held):
            blocks = [np.full_like(h, empty)] * n
            out.append(np.concatenate([*blocks[:i], h, *blocks[i + 1 :]], before.axis))
        return out
    if kinds == "SB":
        return gather(held, before.axis)
    if kinds == "SS":
        blocks = [np.array_split(h, n, after.axis) for h in held]
        for i, j in itertools.permutations(range(n), 2):
            send(blocks[i][j])
        return [np.concatenate([b[i] for b in blocks], before.axis) for i in range(n)]
    if kinds == "PS":
        return scatter_sums(after.axis)
    return gather(scatter_sums(0), 0)


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_of_boxings(n):
    """Every pair of signatures: the values stay, and what was sent is the table's."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (8, 16))
    table = {
        "BS": ("slice", 0),
        "BP": ("none", 0),
        "SP": ("none", 0),
        "SS": ("all-to-all", (n - 1) * x.nbytes // n),
        "SB": ("all-gather", (n - 1) * x.nbytes),
        "PS": ("reduce-scatter", (n - 1) * x.nbytes),
        "PB": ("all-reduce", 2 * (n - 1) * x.nbytes),
    }
    signatures = (S(0), S(1), B, P("sum"), P("max"))
    for before, after in itertools.permutations(signatures, 2):
        if before.kind == after.kind == "P":
            assert boxing(before, after, n, x.nbytes) == table["PB"]
            continue
        devices = Devices((n,))
        local = devices.scatter(x, (before,), rng)
        local = devices.move(local, 0, before, after)
        np.testing.assert_array_equal(devices.assemble(local, (after,), x.shape), x)
        assert boxing(before, after, n, x.nbytes) == table[before.kind + after.kind]
        assert devices.sent == boxing(before, after, n, x.nbytes)[1]
    assert all(boxing(s, s, n, x.nbytes) == ("none", 0) for s in signatures)


def test_several_axes_change_in_the_cheapest_order():
    """Along two axes: values stay, bytes are those counted, and no order is cheaper."""
    rng = np.random.default_rng(1)
    x, sizes = rng.integers(-9, 9, (8, 16)), (2, 4)
    ones = (S(0), S(1), B, P())
    for before, after in itertools.product(itertools.product(ones, repeat=2), repeat=2):
        devices = Devices(sizes)
        local = devices.scatter(x, before, rng)
        cost, path = moves(before, after, x.shape, x.nbytes, sizes)
        for move in path:
            local = devices.move(local, move.axis, move.before[move.axis], move.after[move.axis])
        np.testing.assert_array_equal(devices.assemble(local, after, x.shape), x)
        assert devices.sent == cost[0]
        if len({s.axis for s in (*before, *after) if s.kind == "S"}) < 2:
            continue
        alternatives = []
        for order in itertools.permutations(range(2)):
            devices, local, here = Devices(sizes), devices.scatter(x, before, rng), before
            for axis in order:
                to = (*here[:axis], after[axis], *here[axis + 1 :])
                if here[1].kind == to[1].kind == "S" and axis == 0 and here[1] in (here[0], to[0]):
                    break  # a later axis splits the dimension: not one collective
                if fits(to, x.shape, sizes):
                    break
                local = devices.move(local, axis, here[axis], to[axis])
                here = to
            else:
                alternatives.append(devices.sent)
        assert cost[0] <= min(alternatives, default=cost[0])


def compute(op, program, values, first=0):
    """An operator on whole or local arrays.

    Args:
      first: of a lookup, the first index of the part of the table that is here.
    """
    dims = [program.dims[n] for n in op.inputs]
    out = program.dims[op.output]
    if op.kind == "einsum":
        return np.einsum(",".join(dims) + "->" + out, *values)
    if op.kind == "linear":
        shapes = [[v.shape[d.index(c)] if c in d else 1 for c in out] for v, d in zip(values, dims)]
        return sum(v.reshape(shape) for v, shape in zip(values, shapes, strict=True))
    if op.kind == "nonlinear":
        x = values[0]
        y = x * x % 7
        for letter in op.over:
            y = y + x.max(axis=dims[0].index(letter), keepdims=True)
        return y
    if op.kind in ("sum", "max"):
        axes = tuple(dims[0].index(letter) for letter in op.over)
        return values[0].sum(axes) if op.kind == "sum" else values[0].max(axes)
    if op.kind == "lookup":
        table, ids = values
        mine = (ids >= first) & (ids < first + len(table))
        return np.where(mine[..., None], table[np.where(mine, ids - first, 0)], 0)
    if op.kind == "pick":
        x, ids = values
        axis = dims[0].index(op.over)
        mine = (ids >= first) & (ids < first + x.shape[axis])
        taken = np.take_along_axis(x, np.expand_dims(np.where(mine, ids - first, 0), axis), axis)
        return np.where(mine, taken.squeeze(axis), 0)
    if op.kind == "reshape":
        return values[0].reshape(values[0].shape[:1] + _split_heads(op, program, values[0]))
    return values[0]


def _split_heads(op, program, x):
    """[B, E] -> [B, N, H] or back: whole heads H on every device."""
    heads = program.sizes["H"]
    return (x.shape[1] // heads, heads) if op.renamed == (("E", "N"),) else (x.shape[1] * heads,)


def simulate(program, found, values, placed, sizes, rng):
    """Runs the steps of an explanation on simulated devices; checks every tensor and the bytes."""
    devices, whole, local = Devices(sizes), dict(values), {}
    for name in program.given:
        local[name, placed[name]] = devices.scatter(values[name], placed[name], rng)
    for step in found.steps:
        for b in step.boundaries:
            axis = list(found.mesh).index(b.axis)
            before = devices.sent
            moved = devices.move(local[b.tensor, b.before], axis, b.before[axis], b.after[axis])
            local[b.tensor, b.after] = moved
            groups = len(devices.places) // sizes[axis]
            assert devices.sent - before == b.total * groups
            if b.collective in ("none", "slice"):
                assert b.total == 0
        op = step.op
        whole[op.output] = compute(op, program, [whole[n] for n in op.inputs])
        result = {}
        for place in devices.places:
            given = [local[n, s][place] for n, s in zip(op.inputs, step.inputs, strict=True)]
            first = 0
            if op.kind in ("lookup", "pick"):
                dims = program.dims[op.inputs[0]]
                dim = dims.index(op.over) if op.over else 0
                index, count = devices.slices(step.inputs[0], place, len(dims))[dim]
                first = index * (program.sizes[dims[dim]] // count)
            result[place] = compute(op, program, given, first)
        local[op.output, step.output] = result
        got = devices.assemble(result, step.output, whole[op.output].shape)
        np.testing.assert_array_equal(got, whole[op.output], err_msg=f"{op} {step}")


def random_program(rng, axes):
    """A chain with branches over [B, E], [B, N, H], [B, D], [B]; integers, so sums are exact."""
    sizes = {"B": 8, "D": 8, "E": 16, "N": 8, "H": 2, "V": 16, "F": 8}
    dims = {"table": "VD", "ids": "B", "w": "DE", "u": "ND", "bias": "E"}
    ops = [Op("embed", "lookup", ("table", "ids"), "embed")]
    dims["embed"] = "BD"
    count = itertools.count()

    def add(kind, letters, *inputs, **fields):
        name = f"{kind}{next(count)}"
        dims[name] = letters
        ops.append(Op(name, kind, inputs, name, **fields))
        return name

    x = "embed"
    if rng.random() < 0.5:
        x = add("nonlinear", "BD", x, over=rng.choice(["", "D"]))
    y = add("einsum", "BE", x, "w")
    if rng.random() < 0.6:
        y = add("linear", "BE", y, "bias")
    if rng.random() < 0.6:
        y = add("nonlinear", "BE", y)
    heads = add("reshape", "BNH", y, renamed=(("E", "N"),))
    if rng.random() < 0.5:
        heads = add("nonlinear", "BNH", heads, over=rng.choice(["", "H", "N"]))
    z = add("einsum", "BD", heads, "u")
    z = add("linear", "BD", z, x)
    if rng.random() < 0.5:
        merged = add("reshape", "BE", heads, renamed=(("N", "E"),))
        z = add("linear", "BD", z, add("einsum", "BD", merged, "w"))
    kind = rng.choice(["max", "sum", "pick"])
    if kind == "pick":
        dims["targets"] = "B"
        last = add("pick", "B", z, "targets", over="D")
    else:
        last = add(str(kind), "B", z, over="D")
    if rng.random() < 0.5:
        ones = [(S(0), B)[i] for i in rng.integers(0, 2, axes)]
        add("place", "B", last, to=tuple(ones))
    return Program(dims, sizes, tuple(ops), dict.fromkeys(dims, 8))


def draw(program, rng):
    values = {}
    for name in program.given:
        high = {"ids": 16, "targets": 8}.get(name)
        shape = program.shape(name)
        values[name] = rng.integers(*((0, high) if high else (-3, 4)), shape)
    return values


def draw_signature(program, name, sizes, rng):
    shape = program.shape(name)
    ones = [S(i) for i in range(len(shape))] + [B, P()]
    while True:
        signature = tuple(ones[i] for i in rng.integers(0, len(ones), len(sizes)))
        if fits(signature, shape, sizes) is None and (
            name not in ("ids", "targets") or P() not in signature
        ):
            return signature


@pytest.mark.parametrize("seed", range(24))
def test_programs_on_simulated_devices(seed):
    """Random programs, placements and meshes: every tensor is that of one device, bytes too."""
    rng = np.random.default_rng(seed)
    sizes = ((2,), (4,), (2, 2), (2, 4))[seed % 4]
    program = random_program(rng, len(sizes))
    placed = {n: draw_signature(program, n, sizes, rng) for n in program.given}
    mesh = dict(zip("ab", sizes, strict=False))
    if len(sizes) == 2:  # so that the two axes are not taken for one
        placed["w"] = (S(0), B)
    found = explain(program, placed, mesh)
    simulate(program, found, draw(program, rng), placed, sizes, rng)


def least(program, placed, sizes):
    """Bytes of the best of all combinations of legal signatures, along all axes together."""

    def follow(i, held):
        if i == len(program.ops):
            return 0
        op, best = program.ops[i], math.inf
        for rules in itertools.product(legal(op, program.dims), repeat=len(sizes)):
            wanted = [tuple(r.inputs[j] for r in rules) for j in range(len(op.inputs))]
            output = tuple(r.output for r in rules)
            names = (*op.inputs, op.output)
            if any(
                fits(s, program.shape(n), sizes)
                for n, s in zip(names, (*wanted, output), strict=True)
            ):
                continue
            cost, now = 0, {**held, op.output: (output,)}
            for name, signature in zip(op.inputs, wanted, strict=True):
                shape, nbytes = program.shape(name), program.nbytes(name)
                cost += min(moves(h, signature, shape, nbytes, sizes)[0][0] for h in held[name])
                now[name] = tuple(dict.fromkeys((*now[name], signature)))
            if cost < best:
                best = min(best, cost + follow(i + 1, now))
        return best

    return follow(0, {name: (placed[name],) for name in program.given})


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_the_search_finds_the_least(sizes):
    rng = np.random.default_rng(3)
    dims = {"x": "MK", "w": "KN", "y": "MN", "z": "MN", "u": "NK", "o": "MK", "s": "M"}
    ops = (
        MATMUL,
        Op("z", "nonlinear", ("y",), "z", over="N"),
        Op("o", "einsum", ("z", "u"), "o"),
        Op("s", "max", ("o",), "s", over="K"),
    )
    for _ in range(6 if len(sizes) == 1 else 2):
        length = {"M": 8, "K": 8, "N": int(rng.choice([4, 16, 32]))}
        program = Program(dims, length, ops if len(sizes) == 1 else ops[:2])
        placed = {n: draw_signature(program, n, sizes, rng) for n in program.given}
        placed["w"] = placed["w"] if len(sizes) == 1 else (S(0), B)
        mesh = dict(zip("ab", sizes, strict=False))
        found = explain(program, placed, mesh)
        total = sum(b.total * math.prod(sizes) // b.devices for b in found.boundaries)
        assert total == least(program, placed, sizes)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (
            ("S(0)", "S(0)"),
            r"y \(einsum of MK, KN\): operand w cannot be S\(0\) over 'a' where x is S\(0\), since"
            r" K is not split alike in every operand; legal: B",
        ),
        (("P", "P"), r"operand w cannot be P\(sum\) .* where x is P\(sum\), .*factor.*; legal: B"),
        (("P(max)", "B"), r"operand x cannot be P\(max\) .* maximum; legal: S\(0\), S\(1\), B, P"),
        (("S(2)", "B"), r"operand x cannot be S\(2\) over 'a', which has 2 dimensions"),
    ],
)  # fmt: skip
def test_illegal_operands_are_named(operands, message):
    with pytest.raises(UserError, match=message):
        check(MATMUL, MATRICES, [parse(o) for o in operands], {"a": 2})


def test_illegal_placements_are_named():
    ops = (MATMUL, Op("gelu", "nonlinear", ("y",), "h"))
    program = program_of({**MATRICES.dims, "h": "MN"}, MATRICES.sizes, *ops)
    whole = {"x": (B,), "w": (B,)}
    for placements, message in (
        ({"x": (B,)}, "tensor 'w' is given to the program: say how it is placed"),
        ({**whole, "q": (B,)}, "no tensor 'q'"),
        ({**whole, "x": (B, B)}, r"x: \(B, B\) has 2 entries for the mesh axes a"),
        ({**whole, "x": (S(0),)}, r"x: S\(0\) over a would split M=4 into 8 .*; legal: B, S\(1\)"),
        (
            {**whole, "h": (P(),)},
            r"gelu \(nonlinear\): its output h cannot be P\(sum\) .*; legal: S\(0\), S\(1\), B",
        ),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            explain(program, placements, {"a": 8})
    parts = {"x": (S(1),), "w": (S(0),)}
    assert [b.collective for b in explain(program, parts, {"a": 4}).boundaries] == [
        "reduce-scatter"
    ]
    with pytest.raises(
        UserError, match=r"gelu .* operand y cannot be P\(sum\) .*not linear.*legal"
    ):
        explain(program, parts, {"a": 4}, boxing=False)
    with pytest.raises(UserError, match="no operator 'relu'"):
        Op("f", "relu", ("x",), "y")
    heads = Op("heads", "reshape", ("x",), "h", renamed=(("E", "N"),))
    split = program_of({"x": "BE", "h": "BNH"}, {"B": 2, "E": 12, "N": 6, "H": 2}, heads)
    with pytest.raises(
        UserError, match=r"heads: its tensor h: S\(1\) over a would split N=6 into 4"
    ):
        explain(split, {"x": (S(1),)}, {"a": 4}, boxing=False)


def explained(mesh, placement, rules=None, tied=True, batch=8, length=64, **model):
    config = common.small_lm(common.parse("smoke"))
    config.model.update({"vocab_size": 256, "tied": tied, "width": 64, **model})
    config.rules = common.llama(8, 8, 128) if rules is None else rules
    devices = np.array([Device(i) for i in range(math.prod(mesh.values()))], dtype=object)
    placed = Placement.parse(make_mesh(mesh, devices), placement)
    abstract, _ = experiment.build_model(config, {})
    program, placements = decoder_program(abstract, placed, batch, length, 2)
    return explain(program, placements, mesh_axes(placed))


def counted(found, payload=None):
    """(part of the model, collective) -> how often, over tensor, of that payload."""
    counts = {}
    for b in found.collectives:
        if b.axis == "tensor" and payload in (None, b.payload):
            key = (b.op.split("/")[0].split()[0], b.collective)
            counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize(("rules", "tied"), [("llama", False), ("gpt2", True)])
def test_megatron(rules, tied):
    """What `test_megatron.py` finds in compiled programs: [B / d, T, D] twice a block, and once."""
    mesh, activation = {"data": 2, "tensor": 4}, 2 * 8 // 2 * 64 * 64
    rules = common.llama(8, 8, 128) if rules == "llama" else common.gpt2(64, 2, 8)
    plain = explained(mesh, PLAIN, rules, tied)
    assert counted(plain, activation) == {("embed", "all-reduce"): 1, ("blocks", "all-reduce"): 2}
    split = explained(mesh, [], rules, tied)
    assert counted(split, activation) == {
        ("embed", "reduce-scatter"): 1,
        ("blocks", "all-gather"): 2,
        ("blocks", "reduce-scatter"): 2,
        ("head", "all-gather"): 1,
    }
    small = 4 * 8 // 2 * 64  # one number a token: maximum, sum of exponentials, logit at the target
    for found in (plain, split):
        others = [b for b in found.collectives if b.axis == "tensor" and b.payload != activation]
        assert [b.payload for b in others] == [small] * 3
        assert {b.op.split(":")[0] for b in others} == {"loss"}
    sent = [sum(b.bytes for b in f.collectives if b.payload == activation) for f in (plain, split)]
    assert sent == [3 * 2 * activation * 3 / 4] * 2


def test_parameters_are_gathered_over_fsdp():
    found = explained({"data": 2, "fsdp": 2, "tensor": 2}, [], tied=False)
    gathered = {b.tensor: b for b in found.collectives if b.axis == "fsdp"}
    names = [f"blocks/0/{n}/kernel" for n in ("mixer/q", "mixer/k", "mixer/v", "mixer/out")]
    names += [f"blocks/0/channel/{n}/kernel" for n in ("gate", "up", "down")]
    assert set(gathered) == {*names, "embed/table", "head/kernel"}
    assert {b.collective for b in gathered.values()} == {"all-gather"}
    assert gathered["blocks/0/channel/up/kernel"].bytes == 2 * 64 * 128 // 2 / 2
    rest = [b for b in found.collectives if b.axis not in ("fsdp", "tensor")]
    assert [(b.op, b.axis, b.payload) for b in rest] == [("loss", "data+fsdp", 4)]


def test_one_key_head_is_gathered():
    """Gemma's: queries are split by heads, the one key head has to be whole."""
    found = explained({"tensor": 4}, [], common.gemma(4, 1, 32, 128))
    mixer = [(b.tensor, b.collective) for b in found.collectives if "mixer/" in b.op]
    assert mixer == [("blocks/0/mixer/k", "all-gather"), ("blocks/0/mixer/v", "all-gather")]


@pytest.mark.parametrize("layout", ["megatron", "gathered", "fsdp"])
def test_a_compiled_program_has_these_collectives(layout):
    """Two layers on eight devices: kinds, axes and bytes are those of the program XLA makes."""
    mesh = {"data": 2, "tensor": 4}
    batch, width, hidden = 32, 16, 64
    batched = ("data", None)
    specs = x, w1, w2, o = {
        "megatron": (batched, (None, "tensor"), ("tensor", None), batched),
        "gathered": ((("data", "tensor"), None), (None, "tensor"), ("tensor", None), batched),
        "fsdp": (batched, ("data", "tensor"), ("tensor", "data"), batched),
    }[layout]
    dims = {"x": "BD", "w1": "DF", "w2": "FD", "h": "BF", "a": "BF", "y": "BD", "o": "BD"}
    gather = layout == "fsdp"
    ops = [
        Op("up", "einsum", ("x", "w1g" if gather else "w1"), "h"),
        Op("relu", "nonlinear", ("h",), "a"),
        Op("down", "einsum", ("a", "w2g" if gather else "w2"), "y"),
        Op("out", "place", ("y",), "o", to=signature(o, mesh)),
    ]
    if gather:
        dims |= {"w1g": "DF", "w2g": "FD"}
        ops = [
            Op("w1g", "place", ("w1",), "w1g", to=(B, S(1))),
            Op("w2g", "place", ("w2",), "w2g", to=(B, S(0))),
            *ops,
        ]
    program = Program(dims, {"B": batch, "D": width, "F": hidden}, tuple(ops))
    placed = {n: signature(s, mesh) for n, s in (("x", x), ("w1", w1), ("w2", w2))}
    expected = sorted(
        (b.collective, b.axis, b.bytes) for b in explain(program, placed, mesh).collectives
    )

    real = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)

    def on(spec):
        return NamedSharding(real, Spec(*spec))

    def mlp(x, w1, w2):
        if gather:
            w1 = jax.lax.with_sharding_constraint(w1, on((None, "tensor")))
            w2 = jax.lax.with_sharding_constraint(w2, on(("tensor", None)))
        return jax.nn.relu(x @ w1) @ w2

    shapes = ((batch, width), (width, hidden), (hidden, width))
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on(spec))
        for shape, spec in zip(shapes, specs[:3], strict=True)
    ]
    text = jax.jit(mlp, out_shardings=on(o)).lower(*given).compile().as_text()
    found = find_collectives(Module(text), Target.parse("h200:8"), real)
    assert sorted((c.kind, "+".join(c.axes), c.wire) for c in found) == expected
    assert len(re.findall(r"= \S+ all-(reduce|gather)|reduce-scatter\(", text)) >= len(expected)


def signature(spec, mesh):
    """Of a PartitionSpec's entries."""
    found = dict.fromkeys(mesh, B)
    for dim, entry in enumerate(spec):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            found[axis] = S(dim)
    return tuple(found.values())


def test_command(capsys, tmp_path):
    main(["--config=configs/llama_7b.py:smoke", "--mesh", "data=2,tensor=2"])
    shown = capsys.readouterr().out
    assert re.search(r"blocks/0/mixer gives .*P\(sum\).*reduce-scatter", shown)
    assert "tensor=2: a block 2 all-gather, 2 reduce-scatter," in shown
    assert "all axes:" in shown
    main(["--config=configs/llama_7b.py:smoke", "--mesh", "data=1"])
    assert "nothing is sent" in capsys.readouterr().out
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1")
    for config, mesh, message in (
        ("configs/lama_7b.py", "data=2", "did you mean 'configs/llama_7b.py'"),
        (str(empty), "data=2", "no get_config"),
        ("configs/llama_7b.py:smoke", "data=2,tensr=2", "no axis 'tensr'"),
        ("configs/llama_7b.py:smoke", "data", "write each axis once"),
        ("configs/llama_7b.py:smoke", "data=3", "split B=4 into 3 parts"),
        ("configs/digits.py", "data=2", "no program of Vision"),
        ("configs/monarch.py", "data=2", "no program of Monarch"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([f"--config={config}", "--mesh", mesh])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and message in error
