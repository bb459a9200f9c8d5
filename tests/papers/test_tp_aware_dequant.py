"""TP-aware dequantization: 4-bit groups, both forms of an MLP, and what four devices send."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import common
from configs import tp_aware_dequant as config
from efficient.channels.mlp import GLU, MLP
from efficient.errors import UserError
from efficient.linears.int4 import (
    Int4,
    Quantized,
    act_order,
    dequantize,
    group_index,
    pack,
    quantize,
    unpack,
)
from efficient.model import abstract, bind
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from efficient.surgery.tp_aware_dequant import TPAwareDequant, aware, naive, permuted_for
from pallas_kernels.mesh import shard_map

D, F, GROUP = 32, 64, 8
WAYS = 4
BOTH = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def matrix_of(weights: Quantized) -> np.ndarray:
    """The matrix of inputs as they come, in float64, from the bytes."""
    packed, scales, zeros, order = (np.asarray(a) for a in weights[:4])
    matrix = np.zeros((2 * len(packed), packed.shape[1]))
    size = len(matrix) // len(scales)
    for i, row in enumerate(order):
        byte = packed[i // 2].astype(np.int64)
        level = byte // 16 if i % 2 else byte % 16
        matrix[row] = (level - zeros[i // size].astype(np.int64)) * np.float64(scales[i // size])
    return matrix


def mlp(gated, seed=0):
    """(up, gate or None, down) with biases, and rows of very unequal norms."""
    shapes = {"up": (D, F), "gate": (D, F), "down": (F, D)}
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        spread = np.random.default_rng(seed + i).permutation(np.geomspace(0.1, 1, shape[0]))
        kernel = draw(*shape, seed=seed + i) * np.float32(spread[:, None])
        bias = jnp.asarray(draw(shape[1], seed=seed + 10 + i))
        made[name] = quantize(jnp.asarray(kernel), GROUP, bias=bias)
    return made["up"], made["gate"] if gated else None, made["down"]


def mlp_by_hand(x, up, gate, down):
    x = np.float64(x)

    def features(x, weights):
        return x @ matrix_of(weights) + np.float64(weights.bias)

    h = silu(features(x, up)) if gate is None else silu(features(x, gate)) * features(x, up)
    return features(h, down)


def test_bytes_hold_two_rows_and_come_back():
    levels = np.random.default_rng(0).integers(0, 16, (12, 5)).astype(np.uint8)
    packed = np.asarray(pack(jnp.asarray(levels)))
    assert packed.dtype == np.uint8
    for j in range(6):
        np.testing.assert_array_equal(packed[j], levels[2 * j] + 16 * levels[2 * j + 1])
    np.testing.assert_array_equal(unpack(jnp.asarray(packed)), levels)


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0], ids=["both_signs", "positive", "negative"])
@pytest.mark.parametrize("given", [False, True], ids=["row_norms", "given_order"])
def test_levels_are_within_half_a_step_of_each_group(shift, given):
    """Against groups that NumPy forms row by row, along the order of falling importance."""
    kernel = draw(24, 10) * np.geomspace(0.01, 10, 10, dtype=np.float32) + np.float32(shift)
    kernel[:, 3] = 0
    order = np.random.default_rng(1).permutation(24)
    weights = quantize(jnp.asarray(kernel), 6, jnp.asarray(order) if given else None)
    if not given:
        norms = (np.float64(kernel) ** 2).sum(1)
        order = np.array(sorted(range(24), key=lambda r: -norms[r]))
    groups = [sorted(order[i : i + 6]) for i in range(0, 24, 6)]
    np.testing.assert_array_equal(weights.order, np.concatenate(groups))
    matrix = matrix_of(weights)
    for g, rows in enumerate(groups):
        part = np.float64(kernel[rows])
        step = (np.maximum(part.max(0), 0) - np.minimum(part.min(0), 0)) / 15
        step[step == 0] = 1
        np.testing.assert_allclose(weights.scales[g], step, rtol=1e-6)
        zero = -np.minimum(part.min(0), 0) / step
        assert (np.abs(np.asarray(weights.zeros[g]) - zero) <= 0.5001).all()
        assert (np.abs(matrix[rows] - part) <= 0.5001 * step).all()
    error = np.abs(matrix - kernel)
    assert error.max() > 0 and not matrix[:, 3].any()
    levels = np.asarray(unpack(weights.packed))
    assert levels.max() == 15 and (levels.min() == 0 or shift)
    found = dequantize(weights.packed, weights.scales, weights.zeros)
    np.testing.assert_allclose(found, matrix[np.asarray(weights.order)], rtol=1e-6, atol=0)


def test_sorted_rows_are_those_of_act_order():
    """GPTQ's form looks up the group of each row; sorted, it gives the same rows bit for bit."""
    kernel = jnp.asarray(draw(24, 10))
    order = act_order(jnp.asarray(draw(24, seed=2)))
    groups = np.asarray(group_index(order, 6))
    weights = quantize(kernel, 6, order)
    by_group = np.asarray(weights.order)
    assert (np.diff(groups) < 0).any() and np.bincount(groups).tolist() == [6] * 4
    np.testing.assert_array_equal(groups[by_group], np.repeat(np.arange(4), 6))
    scattered = pack(unpack(weights.packed)[np.argsort(by_group)])
    looked_up = dequantize(scattered, weights.scales, weights.zeros, jnp.asarray(groups))
    in_runs = dequantize(*weights[:3])
    np.testing.assert_array_equal(np.asarray(looked_up)[by_group], in_runs)
    # Scales and zeros change from one row to the next as often as there are other groups.
    assert np.count_nonzero(np.diff(groups[by_group])) == 3 < np.count_nonzero(np.diff(groups))


@BOTH
def test_aware_is_naive_is_numpy(gated):
    up, gate, down = mlp(gated)
    x = draw(2, 5, D, seed=7)
    expected = mlp_by_hand(x, up, gate, down)
    tolerance = 1e-5 * np.abs(expected).max()
    found = naive(jnp.asarray(x), up, down, gate, activation=jax.nn.silu)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    first = [None if w is None else permuted_for(w, down) for w in (up, gate)]
    found = aware(jnp.asarray(x), first[0], down, first[1], activation=jax.nn.silu)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    # Of columns that were not permuted it is another function.
    other = aware(jnp.asarray(x), up, down, gate, activation=jax.nn.silu)
    assert np.abs(other - expected).max() > 0.1 * np.abs(expected).max()


def mesh_of():
    return jax.make_mesh((WAYS,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:WAYS])


COLUMNS = Quantized(*(P(None, "tensor"),) * 3, P(), P("tensor"))
ROWS = Quantized(*(P("tensor", None),) * 3, P(), P())


def collectives(compiled) -> dict[str, int]:
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", compiled.as_text())
    return dict(collections.Counter(found))


@BOTH
def test_collectives_of_four_devices(gated):
    """One sum after the second product, of the values of one device; the naive form gathers too."""
    up, gate, down = mlp(gated)
    mesh, x = mesh_of(), jnp.asarray(draw(2, 5, D, seed=7))
    expected = mlp_by_hand(x, up, gate, down)
    for form, wanted in (
        (naive, {"all-gather": 1, "all-reduce": 1}),
        (aware, {"all-reduce": 1}),
    ):
        first = [permuted_for(w, down) if form is aware else w for w in (up, gate) if w is not None]

        def run(x, down, *first, form=form):
            return form(x, first[0], down, *first[1:], activation=jax.nn.silu, axis="tensor")

        specs = (P(), ROWS, *(COLUMNS for _ in first))
        step = jax.jit(shard_map(run, mesh, specs, P()))
        compiled = step.lower(x, down, *first).compile()
        assert collectives(compiled) == wanted
        found = step(x, down, *first)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def channel(gated, form=True, group_size=GROUP, width=D, hidden=F):
    """(the channel before surgery, after it, arrays before, arrays after), in a host."""
    host = nnx.Module()
    technique = GLU if gated else MLP
    host.channel = technique(
        Scope(Rules(), "channel"), width, hidden=hidden, activation="silu", bias=True
    )
    old = {
        p: jnp.asarray(draw(*s.shape, seed=i) / np.float32(s.shape[0] ** 0.5))
        for i, (p, s) in enumerate(abstract(host).items())
    }
    new, surgery = nnx.clone(host), TPAwareDequant(at="channel", group_size=group_size, aware=form)
    surgery.apply(new)
    return host, new, old, surgery.convert(old, new, jax.random.key(0))


def weights_of(values, name, order):
    """The `Quantized` of a layer; rows without an order come in that of `order`."""
    parts = (values[f"channel/{name}/{n}"] for n in ("packed", "scales", "zeros"))
    order = values.get(f"channel/{name}/order", order)
    return Quantized(*parts, order, values[f"channel/{name}/bias"])


@BOTH
@pytest.mark.parametrize("form", [True, False], ids=["aware", "naive"])
def test_layers_of_surgery_against_numpy(gated, form):
    """The module's value, and that of its materialized matrices, in float32 and bfloat16."""
    _, new, old, values = channel(gated, form)
    x = jnp.asarray(draw(2, 5, D, seed=7))
    names = ("gate", "up", "down") if gated else ("up", "down")
    weights = {n: quantize(old[f"channel/{n}/kernel"], GROUP) for n in names}
    weights = {n: w._replace(bias=old[f"channel/{n}/bias"]) for n, w in weights.items()}
    expected = mlp_by_hand(x, weights["up"], weights.get("gate"), weights["down"])
    run = jax.jit(lambda v, x: bind(new, v).channel(x, Context()))
    size = np.abs(expected).max()
    np.testing.assert_allclose(run(values, x), expected, rtol=0, atol=1e-5 * size)
    low = run(values, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), expected, rtol=0, atol=2**-5 * size)
    bound = bind(new, values).channel
    assert (bound.down.order is None) == form
    for name in names:
        expected = matrix_of(weights[name])
        by_next = np.asarray(weights["down"].order)
        if form:
            expected = expected[by_next] if name == "down" else expected[:, by_next]
        np.testing.assert_allclose(getattr(bound, name).materialize(), expected, rtol=1e-6)
    shapes = jax.eval_shape(lambda v: bind(new, v).channel(x, Context()), abstract(new))
    assert shapes.shape == x.shape


@BOTH
def test_the_layers_of_an_mlp_send_one_sum(gated):
    """What XLA's partitioner makes of the modules, whose arrays are split as the paper's."""
    _, new, _, values = channel(gated)
    mesh, x = mesh_of(), jnp.asarray(draw(2, 5, D, seed=7))
    run = jax.jit(lambda v, x: bind(new, v).channel(x, Context()))
    expected = run(values, x)

    def spec(path):
        layer, name = path.split("/")[-2:]
        return getattr(ROWS if layer == "down" else COLUMNS, name)

    placed = {p: jax.device_put(a, NamedSharding(mesh, spec(p))) for p, a in values.items()}
    x = jax.device_put(x, NamedSharding(mesh, P()))
    step = jax.jit(
        lambda v, x: bind(new, v).channel(x, Context()), out_shardings=NamedSharding(mesh, P())
    )
    assert collectives(step.lower(placed, x).compile()) == {"all-reduce": 1}
    held = placed["channel/down/packed"].addressable_shards[0].data
    assert held.shape == (F // 2 // WAYS, D)
    np.testing.assert_allclose(step(placed, x), expected, rtol=1e-5, atol=1e-5)


def test_bytes_held_are_those_of_four_bits():
    """I O / 2 bytes, 5 for each group and output; permuting columns changes none but places."""
    layer = Int4(64, 96, True, 16)
    sizes = {p: s.size * s.dtype.itemsize for p, s in abstract(layer).items()}
    assert sizes == {
        "packed": 64 * 96 // 2,
        "scales": 4 * 4 * 96,
        "zeros": 4 * 96,
        "order": 4 * 64,
        "bias": 4 * 96,
    }
    shapes, x = abstract(layer), jax.ShapeDtypeStruct((7, 64), jnp.float32)
    counted = count_flops(lambda v, x: bind(layer, v)(x, Context()), shapes, x)
    assert counted == 7 * layer.flops() == 7 * 2 * 64 * 96
    up, _, down = mlp(False)
    moved = permuted_for(up, down)
    columns = np.asarray(down.order)
    assert (np.diff(columns) < 0).any()
    for before, after in zip(up[:3], moved[:3], strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(np.asarray(before)[:, columns], after)
    np.testing.assert_array_equal(np.asarray(up.bias)[columns], moved.bias)
    np.testing.assert_array_equal(up.order, moved.order)


@pytest.fixture(scope="module")
def trained():
    """(the model, its arrays, a batch) of a tiny decoder trained on the copying task."""
    rules = common.llama(2, 2, hidden=F)
    optimizer = {"name": "adamw", "learning_rate": 1e-2}
    run, state = tiny.start(tiny.config(common.phase(60, optimizer=optimizer), rules=rules))
    for batch in tiny.batches(run, 60):
        state, _ = run.train_step(run.phases[0])(state, batch)
    return run.phases[0], dict(state["params"]), batch


@pytest.mark.slow
def test_surgery_keeps_the_loss_of_a_trained_decoder(trained):
    """Nearer to the dense model's than weights that are zero, rescaled or of other rows.

    The loss that was trained: of the tokens that the task scores.
    """
    phase, values, batch = trained

    def loss(model, values):
        logits = jax.jit(lambda v: bind(model, v)(batch, Context()))(values)
        logits = np.float64(logits)
        top = logits.max(-1, keepdims=True)
        logits = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        targets = np.asarray(batch["targets"])
        at = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return -np.average(at, weights=batch["weights"])

    model, surgery = nnx.clone(phase.single), TPAwareDequant(group_size=16)
    surgery.apply(model)
    new = surgery.convert(values, model, jax.random.key(0))
    assert {p: a.shape for p, a in new.items()} == {p: s.shape for p, s in abstract(model).items()}
    dense, quantized = loss(phase.single, values), loss(model, new)
    error = abs(quantized - dense)

    def changed(at, change):
        return {p: change(a) if re.fullmatch(at, p) else a for p, a in new.items()}

    channels = r"blocks/\d+/channel/(up|gate|down)/"
    wrong = [
        loss(model, changed(channels + "scales", lambda a: 0 * a)),
        loss(model, changed(channels + "scales", lambda a: a / 2)),
        loss(model, changed(channels + "scales", lambda a: a * 2)),
        loss(model, changed(r".*/channel/down/packed", lambda a: a[::-1])),
    ]
    assert 0 < error < 0.05 * min(abs(other - dense) for other in wrong)
    arrays = [a.nbytes for p, a in new.items() if re.fullmatch(channels + "packed", p)]
    kernels = [a.nbytes for p, a in values.items() if re.fullmatch(channels + "kernel", p)]
    assert len(arrays) == 6 and sum(kernels) == 8 * sum(arrays)


@pytest.mark.parametrize(
    ("arguments", "sizes", "words"),
    [
        ({"group_size": 5}, {}, "group_size=5 does not divide the 32 inputs of channel/.*is 4"),
        ({"group_size": 0}, {}, "group_size=0 does not divide the 32 inputs of channel/.*is 1"),
        ({"group_size": 32}, {"hidden": 80}, "the 80 inputs of channel/down; .* is 40"),
        ({"group_size": 1}, {"hidden": 63}, "channel/down has 63 inputs.*input width even"),
        ({"group_size": 1}, {"width": 31}, "channel/(up|gate) has 31 inputs.*input width even"),
    ],
)
def test_sizes_that_do_not_divide(arguments, sizes, words):
    with pytest.raises(UserError, match=words) as error:
        channel(True, **(arguments | sizes))
    assert "\n" not in str(error.value)


def test_other_wrong_input():
    host, new, old, _ = channel(False)
    with pytest.raises(UserError, match="matches nothing"):
        TPAwareDequant(at="mixer").apply(nnx.clone(host))
    with pytest.raises(UserError, match="channel/up is Int4, not a dense layer; leave it out"):
        TPAwareDequant(at="channel", group_size=GROUP).apply(nnx.clone(new))
    old["channel/down/kernel"] = old["channel/down/kernel"].at[0, 1].set(jnp.nan)
    with pytest.raises(UserError, match=r"channel/down/kernel has 1 value\(s\) that are not fin"):
        TPAwareDequant(at="channel", group_size=GROUP).convert(old, new, jax.random.key(0))


def test_config_quantizes_last():
    dense, last = config.get_config("group=16,naive").phases
    assert (dense["steps"], last["steps"]) == (600, 0)
    (surgery,) = last["surgery"]
    assert (surgery["group_size"], surgery["aware"]) == (16, False)
