"""AMSP: scopes of parameters, gradients and optimizer state, on fake devices and in TPU programs.

What a mesh may differ by from one device is measured as in `test_mesh`: on one device, by the same
batches with their rows in other orders.
"""

import collections
import functools
import itertools
import math

import jax
import numpy as np
import pytest
import tiny
from test_mesh import run_steps, shaped, units

from configs import common
from efficient.checkpoints.checkpoint import Checkpointer
from efficient.errors import UserError
from efficient.parallel import scope_costs
from efficient.parallel.scope_costs import Job, cost, search
from efficient.parallel.scopes import FIRST_DIMENSION, LAYOUTS, Scopes
from efficient.training import step as step_lib
from efficient.training.plan import plan_config
from efficient.training.run import flatten, unflatten

MESH = {"data": 2, "fsdp": 4}
BLOCK = {"gather": "block"}
MIXED = Scopes("group", "global", "global")
# By name: scopes, and how many microbatches; `kept` accumulates whole gradients.
CASES = {
    "zero_1": (LAYOUTS["zero_1"], 1),
    "zero_2": (LAYOUTS["zero_2"], 2),
    "zero_3": (LAYOUTS["zero_3"], 1),
    "zero_3 by blocks": (Scopes("global", "global", "global", "block"), 1),
    "mics by blocks": (Scopes("group", "group", "group", "block"), 2),
    "redundant parameters": (Scopes("group", "global", "global", "block"), 1),
    "redundant optimizer": (Scopes("replicated", "global", "group"), 2),
    "kept gradients": (Scopes("group", "replicated", "global", "block"), 2),
}
FAST = "redundant parameters"


def marked(names):
    """All but one name are slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n != FAST)) for n in names]


STEPS = 8


def layout(scopes, microbatches=1, mesh=MESH, **fields):
    """Three blocks, of which two alike ones are scanned, computed again by the backward pass."""
    model = {"remat": "full", "scan_from": 2, **fields.pop("model", {})}
    rules = [{"at": "blocks/0", "use": "post_norm"}, *common.gpt2(32, 3, 2)]
    fields = {"accumulate": microbatches, "batch_size": 16, "depth": 3, "rules": rules, **fields}
    fields["model"] = model
    config = shaped("gpt2", mesh, **fields)
    config.scopes = scopes.to_config()
    return config


@functools.cache
def one_device(microbatches):
    """(states after the first and the last step, what orders of rows change)."""
    run, first = tiny.start(layout(LAYOUTS["mics"], microbatches, {"data": 1}))

    def start():
        return jax.tree.map(lambda a: a.copy(), first)  # a step takes its state's memory

    batches = tiny.batches(run, STEPS)
    expected = run_steps(run, start(), batches)
    noise = [dict.fromkeys(e, 0.0) for e in expected]
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(16)
        turned = [{name: a[order] for name, a in batch.items()} for batch in batches]
        found = run_steps(run, start(), turned)
        for got, wanted, most in zip(found, expected, noise, strict=True):
            for path in wanted:
                most[path] = max(most[path], np.abs(got[path] - wanted[path]).max())
    return expected, noise


def near(found, expected, noise):
    unit = units(expected)
    assert set(found) >= {path for path in expected if "/" in path}
    for path in found:
        error = np.abs(found[path] - expected[path]).max()
        assert error <= 10 * max(noise[path], unit[path]), (path, error, noise[path])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_layout_takes_the_steps_of_one_device(name):
    scopes, microbatches = CASES[name]
    run, state = tiny.start(layout(scopes, microbatches), jax.devices())
    found = run_steps(run, state, tiny.batches(run, STEPS))
    expected, noise = one_device(microbatches)
    for got, wanted, most in zip(found, expected, noise, strict=True):
        near(got, wanted, most)
    kernel = "params/blocks/0/mixer/q/kernel"
    assert np.abs(expected[1][kernel] - expected[0][kernel]).max() > 1e4 * noise[1][kernel]


# What one device of data=2 x fsdp=4 holds of an array, by its scope.
SHARDS = {
    "blocks/0/mixer/q/kernel": {"replicated": (32, 32), "group": (8, 32), "global": (4, 32)},
    "blocks/0/channel/down/kernel": {
        "replicated": (128, 32),
        "group": (128, 8),
        "global": (128, 4),
    },
    "blocks/1-2/channel/up/kernel": {
        "replicated": (2, 32, 128),
        "group": (2, 8, 128),
        "global": (2, 4, 128),
    },
    "embed/table": {"replicated": (16, 32), "group": (16, 8), "global": (16, 4)},
    # No rule speaks of it: the largest dimension that all eight devices divide.
    "position/table": {"replicated": (36, 32), "group": (36, 8), "global": (36, 4)},
    "final_norm/scale": dict.fromkeys(("replicated", "group", "global"), (32,)),
}


@pytest.mark.parametrize("name", marked(["zero_1", "zero_3 by blocks", FAST]))
def test_arrays_lie_as_asked(name):
    scopes = CASES[name][0]
    run, state = tiny.start(layout(scopes, model={"max_length": 36}), jax.devices())
    phase = run.phases[0]
    asked = flatten(step_lib.abstract_state(phase, run.placement))
    arrays = flatten(state)
    assert {p: a.sharding for p, a in arrays.items()} == {p: a.sharding for p, a in asked.items()}
    for path, shards in SHARDS.items():
        moments = [p for p in arrays if p.startswith("opt") and p.endswith(f"u/{path}")]
        assert len(moments) == 2
        kinds = {f"params/{path}": scopes.parameters, f"ema/{path}": scopes.optimizer}
        for where, scope in (kinds | dict.fromkeys(moments, scopes.optimizer)).items():
            found = {shard.data.shape for shard in arrays[where].addressable_shards}
            assert found == {shards[scope]}, where


@pytest.mark.slow
def test_the_first_two_stages_differ_with_microbatches_only():
    def program(name, microbatches):
        run, _ = tiny.start(layout(LAYOUTS[name], microbatches), jax.devices())
        state = step_lib.abstract_state(run.phases[0], run.placement)
        return run.train_step(run.phases[0]).lower(state, run.abstract_batch()).as_text()

    assert program("zero_1", 1) == program("zero_2", 1)
    assert program("zero_1", 2) != program("zero_2", 2)


@pytest.mark.slow
def test_gradients_that_wait_lie_as_asked():
    """The sums over microbatches, which a loop carries, are whole or an eighth."""

    def carried(scope):
        config = layout(Scopes("replicated", scope, "global"), 2)
        run, _ = tiny.start(config, jax.devices())
        phase = run.phases[0]
        state = step_lib.abstract_state(phase, run.placement)
        lowered = run.train_step(phase).lower(state, run.abstract_batch())
        loops = [line for line in lowered.compile().as_text().splitlines() if " while(" in line]
        return max(loops, key=len).partition(" while(")[0]

    whole, part = "f32[2,128,32]", "f32[2,128,4]"  # the scanned down projections
    kept, split = carried("replicated"), carried("global")
    # Parameters and sums; under `global` the loop still reads whole parameters.
    assert (kept.count(whole), kept.count(part)) == (2, 0)
    assert (split.count(whole), split.count(part)) == (1, 1)


@pytest.mark.slow
def test_a_state_is_restored_into_other_scopes_and_meshes(tmp_path):
    run, state = tiny.start(layout(CASES["redundant parameters"][0]), jax.devices())
    batches = tiny.batches(run, 4)
    step = run.train_step(run.phases[0])
    for batch in batches[:2]:
        state, _ = step(state, batch)
    saved = tiny.host(state)
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(2, flatten(state), {}, wait=True)
        other, _ = tiny.start(layout(LAYOUTS["zero_1"], mesh={"fsdp": 8}), jax.devices())
        abstract = step_lib.abstract_state(other.phases[0], other.placement)
        arrays, _ = checkpoints.restore(flatten(abstract))
    state = unflatten(abstract, arrays)
    tiny.same(tiny.host(state), saved)
    shard = state["ema"]["embed/table"].addressable_shards[0].data.shape
    assert shard == (16, 4) and state["params"]["embed/table"].sharding.is_fully_replicated
    batch = tiny.batches(other, 3)[2]
    state, metrics = other.train_step(other.phases[0])(state, batch)
    assert np.isfinite(metrics["loss"]) and int(state["step"]) == 3


@pytest.mark.parametrize(
    ("scopes", "message"),
    [
        ({"parameters": "globl"}, "scopes.parameters='globl' is no scope; did you mean 'global'"),
        ({"gradient": "group"}, "scopes has no field 'gradient'; did you mean 'gradients'"),
        ({"gather": "blocks"}, "gather='blocks' is unknown; did you mean 'block'"),
        ({"parameters": "global"}, "optimizer='group' is coarser than parameters='global'"),
    ],
)
def test_scopes_that_are_refused(scopes, message):
    config = layout(LAYOUTS["mics"])
    config.scopes = scopes
    with pytest.raises(UserError, match=message) as error:
        tiny.start(config, jax.devices())
    assert "\n" not in str(error.value)


def test_blocks_that_keep_everything_do_not_gather_by_themselves():
    config = layout(CASES["zero_3 by blocks"][0], model={"remat": "none"})
    with pytest.raises(UserError, match="'blocks' would keep every block's gathered parameters"):
        tiny.start(config, jax.devices())


# The search.


def brute_force(job, memory, ratio):
    """(traffic, states, scopes) of what fits, from what a device lacks of each array.

    A device that has 1/a of an array and needs 1/b of it is sent size (1/b - 1/a); a sum over n
    devices is one 1 - 1/n into parts, and what it is sent of the parts it lacks. What it is sent
    within its group is so up to the group's share.
    """
    n, parts = job.group * job.groups, {"replicated": 1, "group": job.group}
    parts["global"] = n

    def sent(size, have, need):
        """Bytes (within, between) from 1/have to 1/need of an array."""
        if have <= need:
            return np.zeros(2)
        middle = min(max(job.group, need), have)
        return size * np.array([1 / need - 1 / middle, 1 / middle - 1 / have])

    small, whole = job.compute_bytes * job.parameters, 4 * job.parameters
    found = []
    for p, g, o in itertools.product(parts, repeat=3):
        if (p, o) in (("group", "replicated"), ("global", "replicated"), ("global", "group")):
            continue
        once = job.microbatches == 1
        at = max(parts[g], parts[o]) if once else parts[g]
        scatter = small * np.array([1 - 1 / job.group, 1 / job.group - 1 / n])
        bytes_ = job.passes * job.microbatches * sent(small, parts[p], 1)
        bytes_ = bytes_ + job.microbatches * (scatter + sent(small, n, at))
        bytes_ = bytes_ + sent(whole, at, parts[o]) + sent(whole, parts[o], parts[p])
        states = (4 + job.compute_bytes) * job.parameters / parts[p]
        states += 4 * job.moments * job.parameters / parts[o]
        states += (small if once else whole) / at
        if states <= memory:
            found.append((bytes_[0] + ratio * bytes_[1], states, (p, g, o)))
    return sorted(found)


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(("group", "groups"), [(8, 4), (1, 16), (16, 1)])
def test_the_search_is_the_best_of_all_layouts(group, groups, microbatches):
    job = Job(7e9, group, groups, microbatches=microbatches)
    least = min(states for _, states, _ in brute_force(job, math.inf, 1))
    for memory, ratio in itertools.product((least, 20e9, 60e9, 200e9), (0.25, 1, 12)):
        wanted = brute_force(job, max(memory, least * (1 + 1e-9)), ratio)
        found = search(job, max(memory, least * (1 + 1e-9)), ratio)
        keys = [(c.scopes.parameters, c.scopes.gradients, c.scopes.optimizer) for c in found]
        assert sorted(keys) == sorted(scopes for *_, scopes in wanted)
        figures = [[c.traffic(ratio), c.total] for c in found]
        np.testing.assert_allclose(figures, [w[:2] for w in wanted], rtol=1e-12)
        by_scopes = {scopes: figures for *figures, scopes in wanted}
        for key, figure in zip(keys, figures, strict=True):
            np.testing.assert_allclose(figure, by_scopes[key], rtol=1e-12)


def test_a_limit_that_nothing_meets_is_refused(capsys):
    flags = ["--parameters", "7e9", "--group", "8", "--groups", "4", "--memory"]
    with pytest.raises(SystemExit):
        scope_costs.main([*flags, "3"])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "error: no layout fits: states take 3.26 GiB" in err
    scope_costs.main([*flags, "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 and "zero_3" in "".join(lines)


# What the TPU compiler makes of a step on sixteen chips, four groups of four.

WIDTH, DEPTH, LENGTH, BATCH, HEADS, VOCABULARY = 512, 6, 256, 64, 8, 4096
GROUP = GROUPS = 4
BLOCKS = DEPTH * (4 * WIDTH**2 + 3 * 4 * WIDTH**2)  # parameters of attention and of a GLU
TABLE = HEAD = VOCABULARY * WIDTH
NORMS = (2 * DEPTH + 1) * WIDTH
SMALL = 2**16  # bytes sent in a step: sums of norms' gradients and of metrics are less


@functools.cache
def planned(scopes, microbatches=1):
    """The plan of a step of six scanned Llama blocks with Adam in bfloat16."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    optimizer = {"name": "adamw", "learning_rate": 1e-2}
    rules = common.llama(HEADS, HEADS, hidden=4 * WIDTH)
    mesh = {"data": GROUPS, "fsdp": GROUP}
    config = tiny.config(common.phase(1, optimizer=optimizer), rules=rules, mesh=mesh)
    sizes = {"width": WIDTH, "depth": DEPTH, "max_length": LENGTH, "vocab_size": VOCABULARY}
    config.model = {**config.model, **sizes, "tied": False, "remat": "full"}
    config.data = {**config.data, "length": LENGTH}
    config.batch_size, config.accumulate = microbatches * BATCH, microbatches
    config.compute_dtype = "bfloat16"
    config.placement = [FIRST_DIMENSION]
    config.scopes = scopes.to_config()
    return plan_config(config, "v5e:4x4")


def sent(scopes, microbatches=1):
    """(kind, axes) -> bytes that a device sends; small collectives left out."""
    found = collections.Counter()
    for one in planned(scopes, microbatches).collectives:
        if one.wire >= SMALL:
            found[one.kind, one.axes] += one.wire
    return dict(found)


def within(size):
    return size * (GROUP - 1) // GROUP


def between(size):
    return size // GROUP * (GROUPS - 1) // GROUPS


ALL = BLOCKS + TABLE + HEAD
READ = 2 * (2 * BLOCKS + TABLE + HEAD)  # bytes in bfloat16; blocks are read forward and backward
SUMMED = 2 * (BLOCKS + HEAD)
OF_TABLE = {("all-reduce", ("data", "fsdp")): 2 * (within(2 * TABLE) + between(2 * TABLE))}
IN, OUT = ("fsdp",), ("data",)
EXPECTED = {
    "zero_1": {
        ("reduce-scatter", IN): within(SUMMED),
        ("reduce-scatter", OUT): between(SUMMED),
        ("all-gather", OUT): between(4 * ALL),
        ("all-gather", IN): within(4 * ALL),
    },
    "zero_3": {
        ("all-gather", OUT): between(READ),
        ("all-gather", IN): within(READ),
        ("reduce-scatter", IN): within(SUMMED),
        ("reduce-scatter", OUT): between(SUMMED),
    },
    "mics": {
        ("all-gather", IN): within(READ),
        ("reduce-scatter", IN): within(SUMMED),
        ("all-reduce", OUT): 2 * between(SUMMED),
    },
}


def by_blocks(name):
    scopes = MIXED if name == "mixed" else LAYOUTS[name]
    return Scopes(**{**scopes.to_config(), **BLOCK})


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_collectives_are_those_of_the_formula(name):
    scopes = by_blocks(name)
    found = sent(scopes)
    assert found == EXPECTED[name] | OF_TABLE
    # The same from the cost model; of the table's gradient it knows the layout's own collectives.
    costs = [
        cost(scopes, Job(BLOCKS, GROUP, GROUPS)),
        cost(scopes, Job(HEAD, GROUP, GROUPS, passes=1)),
        cost(scopes, Job(TABLE, GROUP, GROUPS, passes=1)),
    ]
    spared = within(2 * TABLE) + between(2 * TABLE) * (2 if scopes.reduced == "group" else 1)
    expected = sum(c.within + c.between for c in costs) - spared + sum(OF_TABLE.values())
    assert sum(found.values()) == expected
    small = sum(c.wire for c in planned(scopes).collectives if c.wire < SMALL)
    assert small < sum(found.values()) / 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_states_take_the_memory_of_the_formula(name):
    scopes = by_blocks(name)
    memory = planned(scopes).memory.labelled
    formula = cost(scopes, Job(ALL, GROUP, GROUPS)).memory
    counts = 4  # bytes of Adam's step
    assert memory["parameters"] == formula["parameters"] + 4 * NORMS
    assert memory["optimizer"] == formula["optimizer"] + 8 * NORMS + counts


@pytest.mark.slow
def test_what_the_compiler_does_by_itself():
    """More bytes than by blocks, and other collectives."""
    alone, blocks = sent(LAYOUTS["zero_3"]), sent(by_blocks("zero_3"))
    assert sum(alone.values()) > 1.15 * sum(blocks.values())
    assert any(kind == "collective-permute" for kind, _ in alone)
    assert not any(kind == "reduce-scatter" for kind, _ in alone)
