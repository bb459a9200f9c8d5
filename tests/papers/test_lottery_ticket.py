"""The lottery ticket: masks against NumPy, exact rewinding, masked training, winning tickets."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from configs import lottery_ticket as lottery_config
from efficient.checkpoints.layout import unstack
from efficient.errors import UserError
from efficient.model import bind, init, stack_alike, state_of, walk
from efficient.scope import Context, Rules, Scope
from efficient.surgery.lora import LoRA
from efficient.surgery.lottery_ticket import LotteryTicket, MaskedLinear, prune
from efficient.surgery.merge import Merge

KEY = jax.random.key(7)


class LeNet(nnx.Module):
    """The fully connected network of the paper: 300 and 100 hidden units."""

    def __init__(self, scope, inputs=64, hidden=(300, 100), classes=10):
        sizes = [inputs, *hidden]
        for i, (before, after) in enumerate(itertools.pairwise(sizes)):
            setattr(self, f"layer{i}", scope.linear(f"layer{i}", before, after, True))
        self.head = scope.linear("head", sizes[-1], classes, True)

    def __call__(self, x, context):
        x = jax.nn.relu(self.layer0(x, context))
        return self.head(jax.nn.relu(self.layer1(x, context)), context)


def small(rules=()):
    return LeNet(Scope(Rules(rules)), inputs=12, hidden=(20, 10), classes=5)


def operate(surgery, model, values):
    model = nnx.clone(model)
    surgery.apply(model)
    return model, surgery.convert(values, model, KEY)


def begin(model):
    """As the loop draws them."""
    return jax.jit(lambda key: init(model, key))(KEY)


def after_training(values, seed=0):
    """Stands for a training phase: other numbers, masks untouched."""
    rng = np.random.default_rng(seed)
    noise = {p: rng.standard_normal(v.shape).astype(np.float32) for p, v in values.items()}
    return {p: v if v.dtype == bool else v + noise[p] for p, v in values.items()}


def masks(values):
    return {p: np.asarray(v) for p, v in values.items() if "/masks/" in p}


def numpy_prune(mask, weights, count):
    """`mask` without its `count` smallest weights, one at a time."""
    mask, size = mask.copy(), np.abs(weights)
    for _ in range(count):
        left = [(size[i], i) for i in np.ndindex(*mask.shape) if mask[i]]
        mask[min(left)[1]] = False
    return mask


def test_masks_against_numpy():
    """Layerwise, 20% of each layer and 10% of the output layer, twice."""
    model = small()
    values = begin(model)
    expected = {}
    for i in range(2):
        trained = after_training(values, seed=i)
        model, values = operate(LotteryTicket(rate=0.2, survivors="keep"), model, trained)
        for name in ("layer0", "layer1", "head"):
            old = f"{name}/kernel" if i == 0 else f"{name}/base/kernel"
            weights = np.asarray(trained[old])
            before = expected.get(name, np.ones(weights.shape, bool))
            rate = 0.1 if name == "head" else 0.2
            expected[name] = numpy_prune(before, weights, round(rate * before.sum()))
            np.testing.assert_array_equal(values[f"{name}/masks/kernel"], expected[name])
    assert not [p for p in values if p.count("base") > 1], "wrapped twice"


def test_all_layers_together():
    model = small()
    trained = after_training(begin(model))
    trained["layer0/kernel"] = 10 * trained["layer0/kernel"]
    _, values = operate(LotteryTicket(rate=0.3, together=True, survivors="keep"), model, trained)
    names = ("head", "layer0", "layer1")
    weights = [np.asarray(trained[f"{n}/kernel"]).ravel() for n in names]
    flat = numpy_prune(np.ones(490, bool), np.concatenate(weights), round(0.3 * 490))
    got = np.concatenate([values[f"{n}/masks/kernel"].ravel() for n in names])
    np.testing.assert_array_equal(got, flat)
    kept = {n: masks(values)[f"{n}/masks/kernel"].mean() for n in names}
    assert kept["layer0"] > 0.9 > 0.6 > kept["layer1"]


def test_ties_and_extremes():
    mask = jnp.asarray([True, True, False, True, True])
    equal = prune(mask, jnp.asarray([2.0, -1.0, 0.0, 1.0, -2.0]), 0.25)
    np.testing.assert_array_equal(equal, [True, False, False, True, True])
    assert prune(mask, jnp.zeros(5), 0.01).sum() == 4
    assert prune(mask, jnp.zeros(5), 0.99).sum() == 0


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_three_rounds_leave_the_cube_of_what_one_leaves(rate):
    model = LeNet(Scope(Rules()))
    values = begin(model)
    for i in range(3):
        model, values = operate(
            LotteryTicket(rate=rate, survivors="keep"), model, after_training(values, i)
        )
    kept = {p.split("/")[0]: m.mean() for p, m in masks(values).items()}
    for name in ("layer0", "layer1"):
        np.testing.assert_allclose(kept[name], (1 - rate) ** 3, atol=2e-4)
    np.testing.assert_allclose(kept["head"], (1 - rate / 2) ** 3, atol=2e-3)


def test_survivors_are_rewound_to_the_last_bit():
    model = small()
    start = begin(model)
    values = start
    for i in range(2):
        model, values = operate(LotteryTicket(), model, after_training(values, i))
        for path, array in start.items():
            moved = re.sub(r"/(\w+)$", r"/base/\1", path)
            np.testing.assert_array_equal(values[moved], array)


@pytest.mark.slow
def test_rewinding_equals_the_start_of_a_scanned_model():
    """Blocks that are drawn stacked are rewound as single layers, to the same bits."""
    from models.decoder import Decoder

    model = Decoder(Scope(Rules()), vocab_size=5, width=32, depth=3, scan_from=2, max_length=4)
    stacked = stack_alike(model)
    start = unstack(jax.jit(lambda key: init(stacked, key))(KEY))
    assert any("-" in p for p, _ in walk(stacked))
    ticket, values = operate(LotteryTicket(), model, after_training(start))
    for path, array in start.items():
        moved = path if path in values else re.sub(r"/(\w+)$", r"/base/\1", path)
        np.testing.assert_array_equal(values[moved], array)
    assert any("0-2" in p for p, _ in walk(stack_alike(ticket)))


def test_other_survivors():
    model = small()
    start = begin(model)
    trained = after_training(start)
    _, rewound = operate(LotteryTicket(), model, trained)
    _, kept = operate(LotteryTicket(survivors="keep"), model, trained)
    _, other = operate(LotteryTicket(survivors="reinitialize"), model, trained)
    path = "layer0/base/kernel"
    np.testing.assert_array_equal(kept[path], trained["layer0/kernel"])
    assert np.abs(other[path] - rewound[path]).min() < np.abs(other[path] - rewound[path]).max()
    assert abs(other[path].std() / rewound[path].std() - 1) < 0.2
    for mask in masks(rewound):
        np.testing.assert_array_equal(kept[mask], rewound[mask])
        np.testing.assert_array_equal(other[mask], rewound[mask])


def train(model, values, optimizer, x, y, steps, batch=None, seed=0):
    """(values, losses) after `steps` of an optimizer on cross-entropy; masks are state."""
    params = {p: values[p] for p, v in walk(model) if isinstance(v, nnx.Param)}
    state = {p: v for p, v in values.items() if p not in params}

    def loss_fn(params, x, y):
        bound = bind(model, params | state)
        logits = bound(x, Context(train=True))
        assert set(state_of(bound)) == set(state)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, key):
        params, opt = carry
        rows = jax.random.permutation(key, len(x))[: batch or len(x)]
        loss, grads = jax.value_and_grad(loss_fn)(params, x[rows], y[rows])
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), loss

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params | state, losses


@pytest.mark.parametrize("use", ["dense", "bitlinear"])
def test_pruned_weights_stay_zero_in_training(use):
    rule = {"at": ".*", "use": use, **({"measure": "mean"} if use == "bitlinear" else {})}
    model = small([rule])
    model, values = operate(
        LotteryTicket(rate=0.5, survivors="keep"), model, after_training(begin(model))
    )
    x = jax.random.normal(KEY, (30, 12))
    y = jnp.arange(30) % 5
    run = jax.jit(lambda v: train(model, v, optax.adamw(0.01, weight_decay=0.1), x, y, 20))
    after, losses = run(values)
    assert losses[-1] < 0.9 * losses[0]
    bound = bind(model, after)
    for name in ("layer0", "layer1", "head"):
        mask = np.asarray(values[f"{name}/masks/kernel"])
        np.testing.assert_array_equal(after[f"{name}/masks/kernel"], mask)
        matrix = np.asarray(getattr(bound, name).materialize())
        assert (matrix[~mask] == 0).all() and (matrix[mask] != 0).mean() > 0.5
        moved = np.asarray(after[f"{name}/base/kernel"] != values[f"{name}/base/kernel"])
        assert moved[mask].all()


def test_masked_layer_is_the_product_with_the_mask():
    model, values = operate(
        LotteryTicket(rate=0.5, survivors="keep"), small(), after_training(begin(small()))
    )
    layer = bind(model, values).layer0
    x = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    w = np.float64(values["layer0/base/kernel"]) * np.float64(values["layer0/masks/kernel"])
    expected = x @ w + np.float64(values["layer0/base/bias"])
    np.testing.assert_allclose(layer(jnp.asarray(x), Context()), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.materialize(), w, rtol=1e-6)
    assert isinstance(layer, MaskedLinear) and layer.flops() == 2 * 12 * 20


def test_composes_with_adapters():
    """LoRA around a masked layer: masks are carried, and are not folded into a dense layer."""
    model = small()
    LotteryTicket().apply(model)
    LoRA(at="layer0").apply(model)
    assert {"layer0/base/base/kernel", "layer0/base/masks/kernel"} < {p for p, _ in walk(model)}
    with pytest.raises(UserError, match="wraps a MaskedLinear"):
        Merge().apply(model)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_bad_rate(rate):
    with pytest.raises(UserError, match="rate must be between 0 and 1"):
        LotteryTicket(rate=rate)


def test_config_alternates_training_and_pruning():
    phases = lottery_config.get_config("smoke,rounds=2").phases
    assert [len(p["surgery"]) for p in phases] == [0, 1, 1]
    assert phases[1]["surgery"][0]["survivors"] == "rewind"


def digits():
    data = load_digits()
    x, y = (data.data / 16.0).astype(np.float32), data.target
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    return (jnp.asarray(x[:1437]), jnp.asarray(y[:1437])), (x[1437:], y[1437:])


@pytest.mark.slow
def test_winning_ticket_beats_other_initial_values():
    """21% of a LeNet: from theta_0 it is at least as accurate as from other initial values."""
    (x, y), (held_x, held_y) = digits()
    optimizer, model = optax.adam(1.2e-3), LeNet(Scope(Rules()))

    def accuracy(model, values):
        return float((bind(model, values)(held_x, Context()).argmax(-1) == held_y).mean())

    results = {"dense": [], "ticket": [], "other": []}
    for seed in range(3):
        key = jax.random.key(seed)
        values = jax.jit(lambda key: init(model, key))(key)
        current, fit = model, None
        for round_ in range(8):
            if round_ < 2:  # the tree changes once
                fit = jax.jit(
                    lambda v, m=current: train(m, v, optimizer, x, y, 300, batch=60, seed=1)[0]
                )
            trained = fit(values)
            if round_ == 0:
                results["dense"].append(accuracy(current, trained))
            if round_ == 7:
                results["ticket"].append(accuracy(current, trained))
                break
            before, last = current, trained
            current = nnx.clone(current)
            surgery = LotteryTicket(rate=0.2)
            surgery.apply(current)
            values = surgery.convert(trained, current, key)
        control = nnx.clone(before)
        surgery = LotteryTicket(rate=0.2, survivors="reinitialize", seed=11)
        surgery.apply(control)
        other = surgery.convert(last, control, key)
        for path, mask in masks(values).items():
            np.testing.assert_array_equal(other[path], mask)
        results["other"].append(accuracy(control, fit(other)))
    remaining = sum(m.sum() for m in masks(values).values()) / (64 * 300 + 300 * 100 + 1000)
    assert 0.2 < remaining < 0.23
    mean = {name: np.mean(values) for name, values in results.items()}
    print(mean, results)
    assert mean["ticket"] >= mean["other"]
    assert mean["ticket"] >= mean["dense"] - 0.01
