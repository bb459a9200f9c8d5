"""Redco's two rules: by hand on small modules, and against Megatron's rules on every host."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common, digits, gemma_2b, gpt2_124m, llama_7b
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.parallel import megatron
from efficient.parallel.mesh import make_mesh
from efficient.parallel.placement import Placement
from efficient.parallel.redco import derive, expand
from efficient.scope import Context, Rules, Scope
from efficient.training import experiment

FACTS = {"vocab_size": 256, "image_size": (8, 8), "channels": 1, "num_classes": 10}
COLUMN, ROW = ("fsdp", "tensor"), ("tensor", "fsdp")


class Chain(nnx.Module):
    """Linears of these names and widths, in this order."""

    def __init__(self, layers, rules=()):
        scope = Scope(Rules(rules))
        for name, inputs, outputs in layers:
            setattr(self, name, scope.linear(name, inputs, outputs))


class Listed(nnx.Module):
    def __init__(self, widths):
        scope = Scope(Rules(()))
        pairs = enumerate(itertools.pairwise(widths))
        self.layers = nnx.List([scope.linear(f"layers/{i}", a, b) for i, (a, b) in pairs])


def spec_of(rules, path):
    return next((tuple(r["spec"]) for r in rules if re.fullmatch(r["at"], path)), None)


@pytest.mark.parametrize(
    ("layers", "sides"),
    [
        ([("up", 8, 32), ("down", 32, 8)], "CR"),
        ([("gate", 8, 32), ("up", 8, 32), ("down", 32, 8)], "CCR"),
        ([("fc1", 8, 32), ("fc2", 32, 8)], "CR"),
        ([("a", 8, 16), ("b", 16, 32), ("c", 32, 4), ("d", 4, 8)], "CRCR"),
        ([("a", 8, 8), ("b", 8, 8), ("c", 8, 8)], "CRC"),
        ([("gate", 8, 8), ("up", 8, 8), ("down", 8, 8)], "CCR"),
        ([("wi_0", 8, 8), ("wi_1", 8, 8), ("wo", 8, 8)], "CCR"),
        ([("q", 8, 8), ("k", 8, 4), ("v", 8, 4), ("out", 8, 8)], "CCCR"),
        ([("q", 8, 12), ("k", 8, 12), ("v", 8, 12), ("o", 12, 8)], "CCCR"),
        ([("out", 8, 8), ("v", 8, 8), ("k", 8, 8), ("q", 8, 8)], "RCCC"),
        ([("first", 8, 32), ("second", 32, 8), ("head", 8, 64)], "CRC"),
    ],
)
def test_rules_by_hand(layers, sides):
    rules = derive(Chain(layers))
    found = [spec_of(rules, f"{name}/kernel") for name, *_ in layers]
    assert found == [COLUMN if side == "C" else ROW for side in sides]


def test_a_list_is_a_chain():
    rules = derive(Listed([4, 16, 8, 16, 4]))
    found = [spec_of(rules, f"layers/{i}/kernel") for i in range(4)]
    assert found == [COLUMN, ROW, COLUMN, ROW]


@pytest.mark.parametrize(
    ("shape", "sizes", "spec"),
    [
        ((8, 12), {"tensor": 4, "fsdp": 2}, ("fsdp", "tensor")),
        ((8, 10), {"tensor": 4, "fsdp": 2}, ("tensor", "fsdp")),  # outputs do not divide
        ((8, 9), {"tensor": 4, "fsdp": 2}, ("tensor", None)),
        ((9, 10), {"tensor": 4, "fsdp": 3}, ("fsdp", None)),  # neither does
        ((7, 12), {"tensor": 4, "fsdp": 2}, (None, "tensor")),
        ((7, 12), None, ("fsdp", "tensor")),
    ],
)
def test_odd_shapes(shape, sizes, spec):
    assert derive(Chain([("up", *shape)]), sizes)[0]["spec"] == list(spec)


def hosts():
    """Name -> (config, facts) of every host and shape."""
    small = common.small_lm(common.parse("smoke"))
    found = {"gpt2_124m": gpt2_124m, "llama_7b": llama_7b, "gemma_2b": gemma_2b, "digits": digits}
    configs = {name: module.get_config(None) for name, module in found.items()}
    for name, rules in {
        "small llama": common.llama(2, 1, 128),
        "square llama": common.llama(2, 2, 64),
        "hybrid": [{"at": r"blocks/\d+", "use": "hybrid_norm"}, *common.gpt2(64, 2, 2)],
        "pieces": [
            {"at": r"blocks/\d+/channel", "use": "mini_sequence", "of": "mlp", "pieces": 2},
            *common.llama(2, 2, 128)[::2],
        ],
    }.items():
        configs[name] = small.copy_and_resolve_references()
        configs[name].rules = rules
    return configs


HOSTS = hosts()


def built(name):
    model, _ = experiment.build_model(HOSTS[name], FACTS if "2b" not in name else {})
    return model


@pytest.mark.parametrize("name", HOSTS)
def test_derived_kernels_lie_as_megatrons(name):
    """Every kernel of a linear, the table, the head and the biases of columns."""
    model = built(name)
    rules, spoken = derive(model), set()
    for path, _ in model_lib.walk(model):
        derived = spec_of(rules, path)
        by_hand = next((s for at, s in megatron.RULES if re.fullmatch(at, path)), None)
        if derived is not None and path.endswith("bias") and by_hand is None:
            # Behind a row it is whole, as without a rule; that of a head lies as logits do.
            assert derived == (("tensor",) if path == "head/bias" else (None,)), path
            continue
        spoken |= {path.split("/")[-2]} if derived else set()
        if path.endswith(("kernel", "embed/table")) and "patch" not in path:
            assert derived == by_hand is not None, path
        elif derived is not None:
            assert derived == by_hand, path
    expected = {"q", "k", "v", "out", "up", "down"}
    expected |= {"gate"} if "llama" in name or "gemma" in name else set()
    expected |= {"head"} if name in ("llama_7b", "digits") else set()
    assert spoken == expected | ({"embed"} if name != "digits" else set())


@pytest.mark.parametrize("use", [{"use": "monarch", "blocks": 4}, {"use": "low_rank", "rank": 8}])
def test_factors_stay_with_the_defaults(use):
    """The rules speak of kernels; factors, also beside them, keep Megatron's splits."""
    config = common.small_lm(common.parse("smoke"))
    where = r"blocks/\d+/(mixer/q|channel/up)"
    config.rules = [{"at": where, **use}, *common.llama(2, 2, 128)]
    model, _ = experiment.build_model(config, FACTS)
    rules = derive(model)
    placement = Placement.parse(make_mesh({"data": -1}), rules)
    default = Placement(placement.mesh)
    factors = [p for p, _ in model_lib.walk(model) if re.fullmatch(rf"{where}/[^/]*", p)]
    assert len(factors) == 2 * 2 * 2
    for path in factors:
        assert spec_of(rules, path) is None
    for path, _ in model_lib.walk(model):
        assert (placement.spec(path) or ()) == (default.spec(path) or ()), path
    # A factorised `up` counts among the layers: what follows it splits its inputs.
    assert spec_of(rules, "blocks/0/channel/down/kernel") == ROW


@pytest.mark.parametrize(
    ("name", "path", "derived", "by_hand"),
    [
        ("digits", "head/kernel", ("tensor", "fsdp"), (("fsdp",), None)),
        ("gpt2_124m", "embed/table", (None, "tensor"), (None, ("fsdp",))),
    ],
)
def test_where_it_departs_from_megatrons(name, path, derived, by_hand):
    """10 classes and 50,257 tokens: the other dimension is split, where Megatron's splits none."""
    model, mesh = built(name), make_mesh({"fsdp": 2, "tensor": 4})
    shape = dict(model_lib.walk(model))[path].shape
    assert spec_of(derive(model, mesh.shape), path) == derived
    spec = Placement(mesh).sharding(path, shape).spec
    found = tuple(None if s is None else (s if isinstance(s, tuple) else (s,)) for s in spec)
    assert found == by_hand


def test_config_entries_expand():
    model = built("digits")
    own = {"at": "head/kernel", "spec": [None, None]}
    sizes = {"fsdp": 1, "tensor": 2}
    assert expand([own, {"derive": "redco"}], model, sizes) == [own, *derive(model, sizes)]
    assert expand([own], model, sizes) == [own]
    for wrong in ({"derive": "alpa"}, {"derive": "redco", "at": "x"}):
        with pytest.raises(UserError, match=r"config.placement\[1\]: .* write {'derive': 'redco'}"):
            expand([own, wrong], model, sizes)


def test_rules_match_arrays_below_adapters_and_all_layers():
    rules = derive(built("small llama"))
    assert all(re.search(r"\\d\+|^embed|^head", r["at"]) for r in rules)
    assert spec_of(rules, "blocks/17/mixer/q/base/kernel") == COLUMN
    # Layers that differ are told apart.
    config = common.small_lm(common.parse("smoke"))
    config.rules = [{"at": "blocks/1/channel", "use": "mlp", "hidden": 126}, *config.rules]
    model, _ = experiment.build_model(config, FACTS)
    rules = derive(model, {"tensor": 4})
    ups = [spec_of(rules, f"blocks/{i}/channel/up/kernel") for i in range(2)]
    assert ups == [COLUMN, ROW]


def test_arrays_lie_as_by_default_where_sizes_divide():
    """So that the program is the default's, of which `test_mesh.py` shows the steps."""
    model, mesh = built("small llama"), make_mesh({"fsdp": 2, "tensor": 4})
    derived, default = Placement.parse(mesh, derive(model, mesh.shape)), Placement(mesh)
    for path, array in model_lib.walk(model):
        shapes = (placement.sharding(path, array.shape) for placement in (derived, default))
        assert len({s.shard_shape(array.shape) for s in shapes}) == 1, path


def test_a_derived_placement_computes_the_same():
    """Logits on eight devices, with the head's inputs split, since its outputs do not divide."""
    model, _ = experiment.build_model(digits.get_config("smoke"), FACTS)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    placement = Placement.parse(mesh, derive(model, mesh.shape))
    arrays = model_lib.init(model, jax.random.key(0))
    where = {p: placement.sharding(p, a.shape) for p, a in arrays.items()}
    split = [p for p, s in where.items() if not s.is_fully_replicated]
    assert sum(math.prod(arrays[p].shape) for p in split) > 0.9 * sum(
        a.size for a in arrays.values()
    )
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32)}

    def logits(arrays, batch, placement):
        return model_lib.bind(model, arrays)(batch, Context(placement=placement))

    run = jax.jit(logits, static_argnums=2)
    whole = run(arrays, batch, None)
    found = run(jax.device_put(arrays, where), jax.device_put(batch, placement.batch), placement)
    # Sums of up to 128 terms in another order.
    allowed = 128 * np.finfo(np.float32).eps * np.abs(whole).max()
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(found, whole, rtol=0, atol=allowed)
