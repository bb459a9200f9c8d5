"""Meshes of eight devices against one device: the same steps, and arrays that lie as the rules say.

What may differ is the order of float32 sums. How much that is, is measured on one device: the same
batches with their rows in other orders, which is the same mathematics. Twenty steps let the
difference grow as they do on a mesh; a mesh may differ by ten times the most that was measured.
"""

import re

import jax
import numpy as np
import pytest
import tiny

from configs import common
from efficient.errors import UserError
from efficient.model import layers_of
from efficient.parallel.mesh import make_mesh
from efficient.training import loop
from efficient.training.run import flatten

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "sequence": {"data": 2, "sequence": 4},
    "sequence and fsdp": {"fsdp": 4, "sequence": 2},
    "sequence and tensor": {"sequence": 4, "tensor": 2},
    "ulysses": {"data": 2, "sequence": 2, "tensor": 2},
    "pipeline": {"data": 4, "pipeline": 2},
    "pipeline and tensor": {"pipeline": 2, "data": 2, "tensor": 2},
    "pipeline and sequence": {"pipeline": 2, "fsdp": 2, "sequence": 2},
}
FIELDS = {
    "ulysses": {"sequence": {"name": "ulysses"}},
    "pipeline": {"accumulate": 2},
    "pipeline and tensor": {"accumulate": 4},
    "pipeline and sequence": {"accumulate": 4},
}
FAST = ("all", "pipeline")
OF_GPT2 = ("sequence", "sequence and fsdp", "pipeline", "pipeline and sequence")
OTHER_SHAPES = {"ulysses": ("llama",), "sequence and tensor": ("gpt2", "monarch")}
OTHER_SHAPES |= {"pipeline and tensor": ("gpt2", "llama")}
OF_VIT = ("sequence and tensor", "pipeline and sequence")
STEPS = 20
MONARCH = {"at": r"blocks/\d+/(mixer|channel)/.*", "use": "monarch", "blocks": 4, "bias": True}


def shaped(shape: str, mesh=None, **fields):
    """A small decoder or ViT of some shape; Adam whose epsilon does not blow up rounding."""
    mesh = {"data": -1} if mesh is None else mesh
    optimizer = {"name": "adamw", "learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    phase = common.phase(STEPS, optimizer=optimizer, ema=0.9)
    if shape == "vit":
        config = common.digits(common.parse("smoke"))
        phase["objective"] = {"name": "classification"}
        settings = {"batch_size": 8, "phases": [phase], "mesh": mesh, **fields}
        for name, value in settings.items():
            config[name] = value
        return config
    rules, model = {
        "gpt2": (None, {}),
        "llama": (tiny.llama_rules(heads=8, kv_heads=4), {"tied": False, "vocab_size": 16}),
        "monarch": ([MONARCH, *common.gpt2(32, 2, 2)], {}),
    }[shape]
    fields = {"rules": rules, "model": model, **fields}
    return tiny.config(phase, mesh=mesh, **fields)


def run_steps(run, state, batches):
    """(state and metrics after the first step, after the last one) as NumPy arrays."""
    step = run.train_step(run.phases[0])
    kept = []
    for index, batch in enumerate(batches):
        state, metrics = step(state, batch)
        if index in (0, len(batches) - 1):
            kept.append(of_layers(tiny.host(state)) | tiny.host(metrics))
    return kept


def of_layers(arrays):
    """Arrays of single layers: a pipeline stacks even two."""
    return {
        layer: array[i] if stacked else array
        for path, array in arrays.items()
        for layers in (layers_of(path),)
        for stacked in (len(layers) > 1,)
        for i, layer in enumerate(layers)
    }


def units(arrays) -> dict[str, float]:
    """The last place of the largest number among all parameters, all first moments, ...

    The least that is asked of an array: one whose gradient is zero but for rounding, as that of
    the keys' bias is, has no scale of its own.
    """
    kinds = {path: re.match(r"optimizer/.*?/[mn]u/|\w+", path)[0] for path in arrays}
    top: dict[str, float] = {}
    for path, kind in kinds.items():
        top[kind] = max(top.get(kind, 0.0), float(np.abs(arrays[path]).max()))
    return {path: float(np.spacing(np.float32(top[kind]))) for path, kind in kinds.items()}


OTHERS = [pytest.param(s, marks=pytest.mark.slow) for s in ("llama", "monarch", "vit")]


@pytest.fixture(scope="module", params=["gpt2", *OTHERS])
def one_device(request):
    """(shape, results on one device, the most that an order of rows changes each array)."""
    run, _ = tiny.start(shaped(request.param))
    batches = tiny.batches(run, STEPS)
    expected = run_steps(run, run.start(), batches)
    noise = [dict.fromkeys(e, 0.0) for e in expected]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(8)
        turned = [{name: a[order] for name, a in batch.items()} for batch in batches]
        for found, wanted, most in zip(
            run_steps(run, run.start(), turned), expected, noise, strict=True
        ):
            for path in wanted:
                most[path] = max(most[path], np.abs(found[path] - wanted[path]).max())
    return request.param, expected, noise


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in MESHES]
)
def test_a_mesh_takes_the_steps_of_one_device(one_device, name):
    shape, expected, noise = one_device
    shapes = OTHER_SHAPES.get(name, ("gpt2",) if name in OF_GPT2 else ("gpt2", "llama", "monarch"))
    if shape not in (*shapes, *(["vit"] if name in OF_VIT else [])):
        pytest.skip("another shape has this mesh; of gpt2, two heads do not do for ulysses")
    config = shaped(shape, MESHES[name], **FIELDS.get(name, {}))
    run, state = tiny.start(config, jax.devices())
    found = run_steps(run, state, tiny.batches(run, STEPS))
    for got, wanted, most in zip(found, expected, noise, strict=True):
        assert set(got) == set(wanted)
        unit = units(wanted)
        for path in wanted:
            error = np.abs(got[path] - wanted[path]).max()
            assert error <= 10 * max(most[path], unit[path]), (path, error, most[path])
    blocks = "stages/0/blocks" if shape == "vit" else "blocks"
    kernel = f"params/{blocks}/0/mixer/q/{'right' if shape == 'monarch' else 'kernel'}"
    moved = np.abs(expected[1][kernel] - expected[0][kernel]).max()
    assert moved > 1e4 * noise[1][kernel]


# The shape of what one device holds of an array, on data=2 x fsdp=2 x tensor=2.
SHARDS = {
    "params/embed/table": (8, 16),  # [16, 32]: vocabulary over tensor, width over fsdp
    "params/blocks/0/mixer/q/kernel": (16, 16),
    "params/blocks/0/mixer/out/kernel": (16, 16),
    "params/blocks/0/channel/up/kernel": (16, 64),
    "params/blocks/0/channel/up/bias": (64,),
    "params/blocks/0/channel/down/kernel": (64, 16),
    "params/blocks/0/channel/down/bias": (32,),
    "params/final_norm/scale": (32,),
    "params/position/table": (16, 32),  # no rule: fsdp splits the largest dimension
}


def test_arrays_lie_as_the_rules_say():
    _, state = tiny.start(shaped("gpt2", MESHES["all"]), jax.devices())
    arrays = flatten(state)
    for path, shard in SHARDS.items():
        shapes = {s.data.shape for s in arrays[path].addressable_shards}
        assert shapes == {shard}, path
        name = path.removeprefix("params/")
        assert arrays[f"ema/{name}"].sharding == arrays[path].sharding
        moments = [a for p, a in arrays.items() if p.startswith("opt") and p.endswith(f"u/{name}")]
        assert [m.sharding for m in moments] == [arrays[path].sharding] * 2
    # every device holds an eighth or a quarter of what is split over all axes, not a copy
    q = arrays["params/blocks/0/mixer/q/kernel"]
    assert len({str(s.index) for s in q.addressable_shards}) == 4


def test_a_stack_is_split_within_its_layers_and_by_the_config_first():
    placement = [{"at": r"blocks/.*/mixer/q/kernel", "spec": [None, ["fsdp", "tensor"]]}]
    config = shaped("gpt2", {"fsdp": 4, "tensor": 2}, depth=6, placement=placement)
    run, state = tiny.start(config, jax.devices())
    shards = {
        path: state["params"][f"blocks/0-5/mixer/{path}/kernel"].addressable_shards[0].data.shape
        for path in "qk"
    }
    assert shards == {"q": (6, 32, 4), "k": (6, 8, 16)}
    batch = tiny.batches(run, 1)[0]
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 32)}


@pytest.mark.slow
def test_a_run_goes_on_upon_another_mesh(one_device, tmp_path):
    shape, expected, noise = one_device
    if shape != "gpt2":
        pytest.skip("one shape does")
    first = shaped(shape, MESHES["all"], checkpoint_every=7, keep_checkpoints=9, log_every=20)
    loop.train(first, str(tmp_path))
    for step in (14, 20):
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"{step}")
    loop.train(shaped(shape, MESHES["tensor"], log_every=20), str(tmp_path))
    assert tiny.steps_in(tmp_path)[-1] == 20
    found = tiny.checkpoint(tmp_path)
    checked, unit = 0, units(expected[1])
    for path in (p for p in expected[1] if "/" in p):
        error = np.abs(found[path] - expected[1][path]).max()
        assert error <= 10 * max(noise[1][path], unit[path]), path
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data=3\) takes 3 of 8 devices"),
        ({"data": -1, "tensor": 3}, "tensor=3 does not divide 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
        ({"date": 8}, "no axis 'date'; did you mean 'data'"),
    ],
)
def test_meshes_that_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, jax.devices())


def test_an_axis_over_which_nothing_is_split_is_refused():
    config = shaped("gpt2", {"data": 4, "expert": 2})
    with pytest.raises(UserError, match="config.mesh.expert=2: nothing is split over 'expert'"):
        tiny.start(config, jax.devices())
    config.placement = [{"at": "position/table", "spec": ["expert"]}]
    tiny.start(config, jax.devices())


def test_heads_that_the_mesh_does_not_divide_are_refused():
    config = shaped("gpt2", {"data": 2, "tensor": 4})
    message = "blocks/0/mixer has 2 heads, which config.mesh.tensor=4 .* one of 1, 2, or"
    with pytest.raises(UserError, match=message):
        tiny.start(config, jax.devices())
    # unless a rule leaves heads whole
    config.placement = [{"at": "activations/heads", "spec": [["data", "fsdp"], "sequence"]}]
    tiny.start(config, jax.devices())


def test_placements_that_are_refused():
    for spec, message in (
        ([None, None, "fsdp"], "3 axes for shape"),
        ([["fsdp", "tensor", "data"]], "8 devices, which do not divide the dimension 4"),
    ):
        placement = [{"at": r".*/q_norm/scale", "spec": spec}]
        rules = [{"at": r".*/q_norm", "use": "rms_norm"}, *common.gpt2(32, 2, 8)]
        with pytest.raises(UserError, match=message):
            tiny.start(
                shaped("gpt2", MESHES["all"], rules=rules, placement=placement), jax.devices()
            )
