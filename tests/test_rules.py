"""Rules: the first match fills a slot, kinds, defaults, nested slots; and the tree of modules."""

import jax
import numpy as np
import pytest

from configs import common
from efficient import model as model_lib
from efficient.channels.mlp import GLU, MLP
from efficient.errors import UserError
from efficient.init import FanIn, Normal
from efficient.linears.dense import Dense
from efficient.mixers.attention import Attention
from efficient.norms.standard import Identity, LayerNorm, RMSNorm
from efficient.scope import Rules, Scope
from models.decoder import Decoder

SIZES = {"vocab_size": 16, "width": 32, "depth": 3, "max_length": 32}
ATTENTION = {"at": r"blocks/\d+/mixer", "use": "attention", "heads": 2}


def build(*rules, stacked=False, treatment=lambda path: None, **sizes):
    found = Rules(list(rules))
    model = Decoder(Scope(found), **{**SIZES, **sizes})
    found.check_all_matched()
    return model_lib.stack_alike(model, treatment) if stacked else model


def inits(model):
    return {path: v.get_metadata("init_fn") for path, v in model_lib.walk(model)}


def test_the_first_match_wins():
    special = {"at": r"blocks/1/mixer", "use": "attention", "heads": 4}
    heads = [b.mixer.heads for b in build(special, ATTENTION).blocks.blocks]
    assert heads == [2, 4, 2]
    heads = [b.mixer.heads for b in build(ATTENTION, {**special, "at": r".*/mixer"}).blocks.blocks]
    assert heads == [2, 2, 2]


def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(UserError, match="matches no mixer slot"):
        build({**ATTENTION, "at": "mixer"})
    with pytest.raises(UserError, match="matches no mixer slot"):
        build({**ATTENTION, "at": r"blocks/\d+/mix"})


def test_defaults_fill_what_no_rule_speaks_of():
    block = build(width=128).blocks.blocks[0]
    assert isinstance(block.mixer, Attention) and block.mixer.heads == 2
    assert isinstance(block.channel, MLP) and block.channel.up.kernel.shape == (128, 512)
    assert isinstance(block.mixer_norm, RMSNorm) and isinstance(block.mixer.q_norm, Identity)
    assert block.mixer.q.bias is None


def test_a_rule_fills_slots_of_its_own_kind_only():
    wide = r"blocks/0/.*"
    model = build({"at": wide, "use": "layer_norm"}, {"at": wide, "use": "glu"})
    block, other = model.blocks.blocks[:2]
    assert isinstance(block.mixer_norm, LayerNorm) and isinstance(block.channel, GLU)
    assert isinstance(block.mixer.q, Dense)
    assert isinstance(other.mixer_norm, RMSNorm) and isinstance(other.channel, MLP)
    with pytest.raises(UserError, match="matches only channel slots, but 'attention' is a mixer"):
        build({"at": r"blocks/\d+/channel", "use": "attention"})


def test_a_rule_reaches_linears_inside_a_technique():
    dense = {"at": r"blocks/.*/channel/.*", "use": "dense", "init_std": 0.5, "bias": True}
    model = build(dense, {"at": r"blocks/\d+/channel", "use": "glu", "hidden": 48})
    found = inits(model)
    for name in ("gate", "up", "down"):
        assert found[f"blocks/2/channel/{name}/kernel"] == Normal(0.5)
        assert f"blocks/2/channel/{name}/bias" in found
    assert found["blocks/2/mixer/q/kernel"] == FanIn()
    assert "blocks/2/mixer/q/bias" not in found


def test_norms_of_the_shared_configs_leave_attention_alone():
    model = build(*common.gpt2(32, 3, 2))
    block = model.blocks.blocks[0]
    assert isinstance(block.mixer_norm, LayerNorm) and isinstance(model.final_norm, LayerNorm)
    assert isinstance(block.mixer.q_norm, Identity)
    scaled = inits(model)
    assert scaled["blocks/0/mixer/out/kernel"] == Normal(0.02 / 6**0.5)
    assert scaled["blocks/0/mixer/q/kernel"] == Normal(0.02)


def test_paths_are_stable():
    llama = build(*common.llama(4, 2, 64), depth=1, tied=False)
    assert sorted(path for path, _ in model_lib.walk(llama)) == [
        "blocks/0/channel/down/kernel",
        "blocks/0/channel/gate/kernel",
        "blocks/0/channel/up/kernel",
        "blocks/0/channel_norm/scale",
        "blocks/0/mixer/k/kernel",
        "blocks/0/mixer/out/kernel",
        "blocks/0/mixer/q/kernel",
        "blocks/0/mixer/v/kernel",
        "blocks/0/mixer_norm/scale",
        "embed/table",
        "final_norm/scale",
        "head/kernel",
    ]


def spans(model):
    return list(model.blocks.spans)


def test_alike_neighbours_are_stacked_and_others_split_them():
    assert spans(build(ATTENTION, depth=8, stacked=True)) == [(0, 8)]
    assert spans(build(ATTENTION, depth=5, stacked=True)) == [(i, i + 1) for i in range(5)]
    assert spans(build(ATTENTION, depth=5, scan_from=2, stacked=True)) == [(0, 5)]
    for rule in (
        {"at": "blocks/3/mixer", "use": "attention", "heads": 2, "window": 4},  # a setting
        {"at": "blocks/3/channel", "use": "mlp", "hidden": 64},  # a shape
        {"at": "blocks/3/channel", "use": "glu"},  # a structure
        {"at": "blocks/3/channel/up", "use": "dense", "init_std": 0.1},  # an initializer
    ):
        found = spans(build(rule, ATTENTION, depth=9, scan_from=3, stacked=True))
        assert found == [(0, 3), (3, 4), (4, 9)], rule
    frozen = {"treatment": lambda path: path.startswith(("blocks/0/", "blocks/1/"))}
    assert spans(build(depth=6, scan_from=2, stacked=True, **frozen)) == [(0, 2), (2, 6)]


def test_stacked_paths_name_their_layers():
    stacked = build(ATTENTION, depth=6, stacked=True)
    shapes = model_lib.abstract(stacked)
    assert shapes["blocks/0-5/mixer/q/kernel"].shape == (6, 32, 32)
    layers = model_lib.layers_of("blocks/0-5/mixer/q/kernel")
    assert layers == [f"blocks/{i}/mixer/q/kernel" for i in range(6)]
    assert model_lib.layers_of("embed/table") == ["embed/table"]
    single = model_lib.abstract(build(ATTENTION, depth=6))
    assert {q for p in shapes for q in model_lib.layers_of(p)} == set(single)


@pytest.mark.slow
def test_initial_values_are_the_same_stacked_or_not():
    key = jax.random.key(3)
    rules = common.gpt2(32, 3, 2)
    single = jax.jit(lambda k: model_lib.init(build(*rules, depth=3), k))(key)
    stacked = jax.jit(
        lambda k: model_lib.init(build(*rules, depth=3, scan_from=2, stacked=True), k)
    )(key)
    other = jax.jit(lambda k: model_lib.init(build(*rules, depth=3), k))(jax.random.key(4))
    assert len(stacked) < len(single)
    for path, array in stacked.items():
        layers = model_lib.layers_of(path)
        values = array if len(layers) > 1 else array[None]
        for layer, value in zip(layers, values, strict=True):
            np.testing.assert_array_equal(value, single[layer])
    kernels = [single[f"blocks/{i}/mixer/q/kernel"] for i in range(3)]
    assert all(abs(float(k.std()) - 0.02) < 2e-3 for k in kernels)
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(other["blocks/0/mixer/q/kernel"], kernels[0])
    # what else the model holds changes nothing
    deeper = jax.jit(lambda k: model_lib.init(build(*rules, depth=4), k))(key)
    np.testing.assert_array_equal(deeper["embed/table"], single["embed/table"])


def test_bind_gives_a_copy_that_holds_the_arrays():
    model = build(ATTENTION)
    arrays = model_lib.init(model, jax.random.key(0))
    bound = model_lib.bind(model, arrays)
    for path, variable in model_lib.walk(bound):
        np.testing.assert_array_equal(variable[...], arrays[path])
    shapes = [v.get_value() for _, v in model_lib.walk(model)]
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in shapes)
    with pytest.raises(KeyError):
        model_lib.bind(model, {"embed/table": arrays["embed/table"]})


def test_replace_puts_a_module_at_its_path():
    model = build(ATTENTION)
    rules = Rules([{"at": "blocks/1/mixer/q", "use": "dense", "bias": True}])
    scope = Scope(rules).at("blocks").at(1).at("mixer")
    new = scope.linear("q", 32, 32)
    model_lib.replace(model, "blocks/1/mixer/q", new)
    assert model.blocks.blocks[1].mixer.q is new
    paths = dict(model_lib.walk(model))
    assert "blocks/1/mixer/q/bias" in paths and "blocks/0/mixer/q/bias" not in paths
    model_lib.replace(model, "blocks/2", model.blocks.blocks[0])
    assert model.blocks.blocks[2] is model.blocks.blocks[0]
    found = dict(model_lib.modules(model))
    assert found["blocks/1/mixer/q"] is new and found[""] is model
    assert len(found) > 20
