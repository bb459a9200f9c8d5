"""What every surgery must keep. One joins by a row.

A surgery has two halves: `apply` changes declarations, so that a resumed run can rebuild a phase's
model without values, and `convert` gives the arrays of the changed model. Each row applies one to a
small decoder of two alike blocks, as a phase would.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from efficient import model as model_lib
from efficient import registry
from efficient.checkpoints import layout
from efficient.errors import UserError
from efficient.objectives.likelihood import NextToken
from efficient.scope import Context, Rules, Scope
from efficient.surgery.common import carry
from models.decoder import Decoder

B, T, V, D, LAYERS = 4, 8, 24, 16, 2
CHANNEL = r"blocks/\d+/channel/(up|down)"
MONARCH = [{"at": CHANNEL, "use": "monarch", "blocks": 4}]
PRUNE = {"at": CHANNEL, "sparsity": 0.5, "block": [4, 4]}
TOKENS = [{"at": CHANNEL, "use": "pattention", "tokens": 20}]
# What an adapter multiplies by a factor that begins at zero.
UNTIL_ANOTHER_MOVES = ("lora_a", "a_out", "a_in", "b_out")
INFERENCE = {"sparse_int8"}  # what it makes has no gradient
# Of whose model a step is compiled among the fast tests.
QUICK = {"ia3", "lottery_ticket"}
# The array that is spoilt, for each that makes arrays from others' values.
UP = "blocks/1/channel/up"
READS = {
    "block_prune": f"{UP}/kernel",
    "dense_to_low_rank": f"{UP}/kernel",
    "dense_to_monarch": f"{UP}/kernel",
    "gwnlp": f"{UP}/kernel",
    "lottery_ticket": f"{UP}/kernel",
    "merge": "blocks/1/mixer/q/b_in",
    "monarch_to_dense": f"{UP}/left",
    "sparse_int8": f"{UP}/base/kernel",
    "tp_aware_dequant": f"{UP}/kernel",
}
KEEPS, CHANGES = True, False  # whether the function is as before

# name: (arguments, rules before the host's own, surgeries before, whether the function is kept)
ROWS: dict[str, tuple[dict, list, list, bool]] = {
    "block_prune": (PRUNE, [], [], CHANGES),
    "companion": ({}, [], [], KEEPS),
    "dense_to_low_rank": ({"at": CHANNEL, "rank": 6}, [], [], CHANGES),
    "dense_to_monarch": ({"at": CHANNEL, "blocks": 4}, [], [], CHANGES),
    "grow_tokens": ({"factor": 1.5}, TOKENS, [], KEEPS),
    "gwnlp": ({"rank": 3}, [], [], KEEPS),
    "ia3": ({}, [], [], KEEPS),
    "lora": ({"rank": 3}, [], [], KEEPS),
    "lora_mini": ({"rank": 3, "inner": 4}, [], [], KEEPS),
    "lottery_ticket": ({"rate": 0.5, "survivors": "keep"}, [], [], CHANGES),
    "merge": ({}, [], [("lora_mini", {"rank": 3, "inner": 4})], KEEPS),
    "monarch_to_dense": ({"at": CHANNEL}, MONARCH, [], KEEPS),
    "sparse_int8": ({}, [], [("block_prune", PRUNE)], CHANGES),
    "tp_aware_dequant": ({"group_size": 8}, [], [], CHANGES),
}


def test_every_surgery_has_a_row():
    names = {t.name for t in registry.techniques("surgery") if not t.name.startswith("test_")}
    assert names == set(ROWS), "give each surgery a row here, and take stale ones out"


def make(name: str, arguments: dict):
    technique = registry.find(name, "surgery")
    registry.check_arguments(technique, arguments, name)
    return technique.build(**arguments)


def operate(surgery, model, values, key):
    """(the changed model, its arrays) as a run makes them."""
    model = nnx.clone(model)
    surgery.apply(model)
    return model, getattr(surgery, "convert", carry)(values, model, key)


def host(name: str) -> Decoder:
    """The model that a row begins with."""
    rules = Rules([*ROWS[name][1], *common.gpt2(D, LAYERS, 2)])
    sizes = {"vocab_size": V, "width": D, "depth": LAYERS, "max_length": T, "scan_from": 2}
    return Decoder(Scope(rules), **sizes)


class Operation:
    """The model and its arrays before and after one surgery."""

    def __init__(self, name: str):
        self.arguments, _, earlier, self.keeps = ROWS[name]
        self.name, self.before, self.key = name, host(name), jax.random.key(0)
        values = jax.jit(functools.partial(model_lib.init, self.before))(self.key)
        rng = np.random.default_rng(0)

        def moved(v):  # trained somewhat: nothing is zero or one any more
            if not jnp.issubdtype(v.dtype, jnp.floating):
                return v
            return jnp.asarray(np.asarray(v) + 0.05 * rng.standard_normal(v.shape), v.dtype)

        for other, arguments in earlier:
            surgery = make(other, arguments)
            self.before, values = operate(surgery, self.before, values, self.key)
        self.old = {path: moved(v) for path, v in values.items()}
        surgery = make(name, self.arguments)
        self.after, self.new = operate(surgery, self.before, self.old, self.key)
        tokens = rng.integers(V, size=(B, T + 1))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.batch = jax.tree.map(jnp.asarray, batch)

    def logits(self, model, arrays):
        return jax.jit(lambda a: model_lib.bind(model, a)(self.batch, Context()))(arrays)


# `make test-slow` checks these: each is much like one that `make test` does.
SLOW = {"block_prune", "companion", "dense_to_low_rank", "grow_tokens"}
SLOW |= {"gwnlp", "lora_mini", "sparse_int8"}
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ROWS]


@pytest.fixture(scope="module", params=PARAMS)
def operation(request):
    return Operation(request.param)


def test_the_structure_can_be_rebuilt_without_values(operation):
    again = nnx.clone(operation.before)
    make(operation.name, operation.arguments).apply(again)
    assert model_lib.abstract(again) == model_lib.abstract(operation.after)
    assert model_lib.is_param(again) == model_lib.is_param(operation.after)
    changed = model_lib.abstract(again) != model_lib.abstract(operation.before)
    assert changed, "it changed nothing"


def test_convert_gives_the_declared_arrays_and_no_others(operation):
    declared = model_lib.abstract(operation.after)
    assert set(operation.new) == set(declared)
    for path, array in operation.new.items():
        assert (array.shape, array.dtype) == (declared[path].shape, declared[path].dtype), path
        assert np.isfinite(np.asarray(array, np.float64)).all(), path
    _, again = operate(
        make(operation.name, operation.arguments), operation.before, operation.old, operation.key
    )
    for path, array in operation.new.items():  # a resumed run comes by the same bits
        np.testing.assert_array_equal(again[path], array, err_msg=path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", READS)
def test_an_array_that_is_not_finite_is_refused_by_its_path(name, value):
    (arguments, _, earlier, _), model, key = ROWS[name], host(name), jax.random.key(0)
    rng = np.random.default_rng(0)
    shapes = model_lib.abstract(model)
    values = {p: jnp.asarray(rng.normal(size=s.shape), s.dtype) for p, s in shapes.items()}
    for other, other_arguments in earlier:
        model, values = operate(make(other, other_arguments), model, values, key)
    array = values[READS[name]]
    spoilt = array.ravel().at[:2].set(value).reshape(array.shape)
    words = f"^{name}: {READS[name]} has 2 value\\(s\\) that are not finite; start from"
    with pytest.raises(UserError, match=words):
        operate(make(name, arguments), model, values | {READS[name]: spoilt}, key)


def test_what_it_does_not_speak_of_is_kept_to_the_last_bit(operation):
    for path in ("embed/table", "blocks/1/mixer_norm/scale", "final_norm/scale"):
        np.testing.assert_array_equal(operation.new[path], operation.old[path], err_msg=path)


def test_the_function_is_kept_where_the_row_says_so(operation):
    before = operation.logits(operation.before, operation.old)
    after = operation.logits(operation.after, operation.new)
    difference = float(jnp.abs(after - before).max() / jnp.abs(before).max())
    assert np.isfinite(after).all()
    assert difference < 1e-5 if operation.keeps else 1e-3 < difference < 2, difference


@pytest.mark.parametrize(
    "operation",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in ROWS],
    indirect=True,
)
def test_the_blocks_are_still_alike_and_every_parameter_is_trained(operation):
    model = model_lib.stack_alike(operation.after)
    assert model.blocks.spans == ((0, LAYERS),)
    arrays = layout.stack(operation.new, list(model_lib.abstract(model)))
    single = operation.logits(operation.after, operation.new)
    stacked = operation.logits(model, arrays)
    atol = 1e-5 * float(jnp.abs(single).max())
    np.testing.assert_allclose(stacked, single, rtol=0, atol=atol)
    if operation.name in INFERENCE:
        return
    params = {p: a for p, a in arrays.items() if model_lib.is_param(model)[p]}

    def loss(params):
        context = Context(rng=jax.random.key(1), progress=0.5, train=True)
        return NextToken()(model_lib.bind(model, arrays | params), operation.batch, context)[0]

    for path, grad in jax.jit(jax.grad(loss))(params).items():
        assert np.isfinite(grad).all(), path
        silent = operation.keeps and path.endswith(UNTIL_ANOTHER_MOVES)
        assert silent or np.abs(grad).max() > 0, path
