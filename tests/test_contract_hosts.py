"""Every linear, and every surgery on linears, in a ViT with a class token and in a mixer MLP.

The contracts of linears and of surgeries build a bare layer and a decoder. Here each technique has
a slot that mixes tokens: of attention over 33 of them, one no patch, and of an MLP over the columns
and rows of an oblong grid, whose arrays are [B, columns, rafts, features]. A host is one program
for all. Linears join by their first row in `test_contract_linears.ROWS`, which must fit 16, 32 and
64 features; surgeries by a row in `SURGERIES`.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contract_linears import NOT_READ
from test_contract_linears import ROWS as LINEARS
from test_contract_surgery import INFERENCE, UNTIL_ANOTHER_MOVES, make, operate
from test_contract_surgery import ROWS as IN_DECODER

from efficient import model as model_lib
from efficient import registry
from efficient.objectives.likelihood import Classification
from efficient.scope import Context, Rules, Scope
from models.vision import Vision

WIDTH, DEPTH, CLASSES, BATCH = 16, 3, 5, 3
SIZE = (8, 16)  # in patches of 2 x 2: a grid of 4 x 8
NO_NORM = [{"at": r".*/mixer_norm", "use": "identity"}, {"at": ".*/position", "use": "no_position"}]
# host: (what the head reads, the linears of its mixer, its rules)
HOSTS = {
    "vit": (
        "class_token",
        ("q", "k", "v", "out"),
        [{"at": r".*/mixer", "use": "attention", "heads": 2}],
    ),
    "mixer": (
        "mean",
        ("vertical_up", "vertical_down", "horizontal_up", "horizontal_down"),
        [{"at": r".*/mixer", "use": "raft", "raft": 4, "activation": "relu"}, *NO_NORM],
    ),
}
MLP = {"at": r".*/channel", "use": "mlp", "hidden": 32, "activation": "relu", "bias": True}
HEADS = ["matryoshka_heads"]  # linears that are for the head alone
IN_BLOCKS = [name for name in LINEARS if name not in HEADS]

NOT_ON_LINEARS = {"companion"}
SLOT, CHANNEL = "its own slot that mixes tokens", "stages/0/blocks/0/channel"
PRUNE = {"at": SLOT, "sparsity": 0.5, "block": [4, 4]}
LORA_MINI = {"at": SLOT, "rank": 3, "inner": 4}
# name: (arguments, linear in the slot, surgeries before)
SURGERIES: dict[str, tuple[dict, dict, list]] = {
    "block_prune": (PRUNE, {}, []),
    "dense_to_low_rank": ({"at": SLOT, "rank": 6}, {}, []),
    "dense_to_monarch": ({"at": SLOT, "blocks": 4}, {}, []),
    "grow_tokens": ({"at": SLOT, "factor": 1.5}, {"use": "pattention", "tokens": 20}, []),
    "gwnlp": ({"at": SLOT, "rank": 3}, {}, []),
    "ia3": ({"outputs": SLOT, "inputs": "stages/0/blocks/1/channel/down"}, {}, []),
    "lora": ({"at": SLOT, "rank": 3}, {}, []),
    "lora_mini": (LORA_MINI, {}, []),
    "lottery_ticket": ({"at": SLOT, "rate": 0.5, "survivors": "keep"}, {}, []),
    "merge": ({"at": SLOT}, {}, [("lora_mini", LORA_MINI)]),
    "monarch_to_dense": ({"at": SLOT}, {"use": "monarch", "blocks": 4}, []),
    "sparse_int8": ({"at": SLOT}, {}, [("block_prune", PRUNE)]),
    "tp_aware_dequant": ({"at": CHANNEL, "group_size": 8}, {}, []),
}


def keeps(name: str) -> bool:
    """Whether a surgery keeps the function, by its row for the decoder."""
    return IN_DECODER[name][3]


def slots(host: str) -> list[str]:
    """Paths of the linears of the host's mixers."""
    names = HOSTS[host][1]
    return [f"stages/0/blocks/{i}/mixer/{name}" for i in range(DEPTH) for name in names]


def build(host: str, rules: list[dict]) -> Vision:
    pooling, _, own = HOSTS[host]
    scope = Scope(Rules([*rules, *own, MLP]))
    stage = {"width": WIDTH, "depth": DEPTH, "kernel": 2, "stride": 2}
    sizes = {"image_size": SIZE, "channels": 1, "num_classes": CLASSES}
    model = Vision(scope, stages=[stage], pooling=pooling, **sizes)
    scope.rules.check_all_matched()
    return model


def draw(model) -> model_lib.Arrays:
    """Parameters at random, none of them zero or one; other arrays as they begin."""
    rng, is_param = np.random.default_rng(0), model_lib.is_param(model)
    state = model_lib.init(model, jax.random.key(0), only=lambda path: not is_param[path])
    shapes = {p: s.shape for p, s in model_lib.abstract(model).items() if is_param[p]}
    normal = {p: 0.3 * rng.standard_normal(shape) for p, shape in shapes.items()}
    return state | {p: jnp.asarray(a, jnp.float32) for p, a in normal.items()}


def images() -> dict:
    image = np.random.default_rng(1).standard_normal((BATCH, *SIZE, 1))
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.arange(BATCH)}


def one_step(model, arrays) -> model_lib.Arrays:
    """Gradients by path, of a loss that a small step along them makes smaller."""
    params = {p: arrays[p] for p, yes in model_lib.is_param(model).items() if yes}

    def loss(params):
        context = Context(rng=jax.random.key(1), progress=0.5, train=True)
        return Classification()(model_lib.bind(model, arrays | params), images(), context)[0]

    step = jax.jit(jax.value_and_grad(loss))
    before, grads = step(params)
    size = 0.01 / np.sqrt(sum(float(jnp.sum(g**2)) for g in grads.values()))
    after, _ = step({p: a - size * grads[p] for p, a in params.items()})
    assert np.isfinite(before) and after < before
    return grads


def check_trained(grads: model_lib.Arrays, at: str, silent: str = "") -> None:
    """Every parameter at `at` has a gradient, but for those whose path there matches `silent`."""
    own = {p.removeprefix(f"{at}/"): g for p, g in grads.items() if p.startswith(f"{at}/")}
    assert own
    for path, gradient in own.items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient) or re.fullmatch(silent, path), path


@functools.cache
def host_of_linears(host: str):
    """(the path of each slot and the linear in it, the model, a step's gradients)."""
    filled = dict(zip(slots(host), itertools.cycle(IN_BLOCKS)))
    assert set(filled.values()) == set(IN_BLOCKS), "make DEPTH larger"
    filled |= zip(["head"], HEADS, strict=True)
    rules = [{"at": at, "use": name, **LINEARS[name][0]} for at, name in filled.items()]
    model = build(host, rules)
    return filled, model, one_step(model, draw(model))


def test_every_linear_and_surgery_is_here():
    assert {t.name for t in registry.techniques("linear")} == {*IN_BLOCKS, *HEADS}
    names = {t.name for t in registry.techniques("surgery") if not t.name.startswith("test_")}
    assert names == {*SURGERIES, *NOT_ON_LINEARS}, "give each surgery a row here"


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("host", HOSTS)
def test_linear_is_trained(host, name):
    filled, model, grads = host_of_linears(host)
    kind = registry.find(name, "linear").build
    own = {path for path, other in filled.items() if other == name}
    assert own <= {path for path, module in model_lib.modules(model) if type(module) is kind}
    for path in own:
        check_trained(grads, path, NOT_READ.get(name, ""))


def at_slot(arguments: dict, slot: str) -> dict:
    return {n: slot if value == SLOT else value for n, value in arguments.items()}


class Operated:
    """A host on whose linears every surgery has worked, first those that keep the function."""

    def __init__(self, host: str):
        in_slots = [name for name, row in SURGERIES.items() if SLOT in row[0].values()]
        assert len(in_slots) <= len(slots(host)), "make DEPTH larger"
        self.where = dict(zip(in_slots, slots(host))) | {"tp_aware_dequant": CHANNEL}
        rules = [{"at": self.where[n], **row[1]} for n, row in SURGERIES.items() if row[1]]
        self.now = build(host, rules)
        self.arrays = draw(self.now)
        for name, (_, _, earlier) in SURGERIES.items():
            for other, arguments in earlier:
                self.operate(other, at_slot(arguments, self.where[name]))
        rng = np.random.default_rng(2)
        self.arrays = {  # what a surgery has made zero is trained somewhat
            p: a + 0.1 * rng.standard_normal(a.shape).astype(a.dtype) if a.dtype == "float32" else a
            for p, a in self.arrays.items()
        }
        self.before = self.logits()
        for kept in (True, False):
            for name, (arguments, _, _) in SURGERIES.items():
                if keeps(name) == kept:
                    self.operate(name, at_slot(arguments, self.where[name]))
            if kept:
                self.kept = self.logits()
        self.grads = one_step(self.now, self.arrays)

    def operate(self, name: str, arguments: dict) -> None:
        surgery, key = make(name, arguments), jax.random.key(0)
        self.now, self.arrays = operate(surgery, self.now, self.arrays, key)

    def logits(self):
        run = jax.jit(lambda arrays: model_lib.bind(self.now, arrays)(images(), Context()))
        return run(self.arrays)


operated = functools.cache(Operated)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_surgeries_keep_the_function(host):
    found = operated(host)
    difference = float(jnp.abs(found.kept - found.before).max() / jnp.abs(found.before).max())
    assert difference < 1e-5


@pytest.mark.parametrize("name", [name for name in SURGERIES if name not in INFERENCE])
@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_operated_linear_is_trained(host, name):
    found = operated(host)
    silent = ".*(" + "|".join(UNTIL_ANOTHER_MOVES) + ")" if keeps(name) else ""
    check_trained(found.grads, found.where[name], silent)


FUSING = [n for n in IN_BLOCKS if getattr(registry.find(n, "linear").build, "fuses", ())]
CHANNELS = [("mlp", name) for name in FUSING] + [("glu", "monarch")]


@pytest.mark.parametrize(("channel", "name"), CHANNELS)
@pytest.mark.parametrize(("activation", "fused"), [("gelu", True), ("gelu_exact", False)])
def test_feed_forward_blocks_fuse_the_activation(channel, name, activation, fused):
    """In evaluation it is an argument of the product, where the product has it; else it follows."""
    rules = Rules([{"at": ".*", "use": name, "kind": "linear", **LINEARS[name][0]}])
    block = registry.find(channel, "channel").build(
        Scope(rules, "channel"), 16, hidden=32, activation=activation, bias=True
    )
    values = model_lib.init(block, jax.random.key(0))
    values = {p: v + 0.1 * jnp.arange(v.size).reshape(v.shape) / v.size for p, v in values.items()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)

    def run(x, train):
        return model_lib.bind(block, values)(x, Context(train=train))

    def calls(jaxpr):
        names = [equation.primitive.name for equation in jaxpr.eqns]
        return names.count("custom_vjp_call"), sum(n in ("tanh", "erf", "erfc") for n in names)

    for train in (False, True):
        products, outside = calls(jax.make_jaxpr(lambda x, t=train: run(x, t))(x).jaxpr)
        assert products == {"mlp": 2, "glu": 3}[channel]
        assert outside == (train or not fused)
    found, wanted = run(x, False), run(x, True)
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
