"""Checkpoints: bitwise, on any mesh, strict about what fits, and asynchronous."""

import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import P, assert_bitwise, mesh_of, place, save_three, sharded, structs, tree
from jax.sharding import NamedSharding, SingleDeviceSharding

from efficient.checkpoints import checkpoint, layout
from efficient.checkpoints.checkpoint import Checkpointer
from efficient.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_three(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    """A copy of them to write to."""
    return shutil.copytree(saved, tmp_path / "run")


# What is saved


def test_round_trip_is_bitwise_and_keeps_metadata(saved):
    arrays, metadata = Checkpointer(saved).restore(structs(tree()))
    assert_bitwise(arrays, tree(300))
    assert metadata["step"] == 300 and metadata["phase"] == 1
    assert metadata["config"] == {"width": 300} and metadata["versions"]["jax"] == jax.__version__
    arrays, metadata = Checkpointer(saved).restore(structs(tree()), 100)
    assert_bitwise(arrays, tree(100))
    assert metadata["step"] == 100


def test_nan_payloads_infinities_and_negative_zero_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 1], np.uint32)
    arrays = {"x": jnp.asarray(bits.view(np.float32)), "zeros": jnp.zeros((3, 4), jnp.bfloat16)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, arrays, {}, wait=True)
        found, _ = checkpoints.restore(structs(arrays))
    assert np.asarray(found["x"]).view(np.uint32).tolist() == bits.tolist()
    assert_bitwise(found, arrays)


def test_read_lists_single_layers(saved):
    found = checkpoint.read(saved)
    assert found["params/blocks/2/mixer/q/kernel"] == ((16, 64), np.float32)
    assert found["params/blocks/0/norm/scale"] == ((16,), jnp.bfloat16)
    assert found["optimizer/0/count"] == ((), np.int32)
    assert len(found) == 3 * 3 + 7 and not any("-" in path for path in found)
    assert checkpoint.read_metadata(saved, 200)["config"] == {"width": 200}


def test_layers_saved_stacked_are_restored_single_and_the_other_way(saved, tmp_path):
    kernel = "params/blocks/{}/mixer/q/kernel"
    single = {kernel.format(i): jax.ShapeDtypeStruct((16, 64), jnp.float32) for i in range(3)}
    arrays, _ = Checkpointer(saved).restore(single, allow_extra=[".*"])
    for i in range(3):
        expected = tree(300)[kernel.format("0-2")][i]
        assert np.array_equal(arrays[kernel.format(i)], expected)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {}, wait=True)
    pair = {kernel.format("0-1"): jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)}
    arrays, _ = Checkpointer(tmp_path).restore(pair, allow_extra=[kernel.format("2")])
    assert_bitwise(arrays, {kernel.format("0-1"): tree(300)[kernel.format("0-2")][:2]})


def test_opens_without_this_project_as_the_docstring_says(tmp_path):
    arrays = place(tree(7), sharded(mesh_of(4, 2), ("data", "model")))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(300, arrays, {"phase": 2})
    recipe = checkpoint.__doc__.split("project:\n")[1].split("\n\nThe JSON")[0]
    recipe = "\n".join(line[4:] for line in recipe.splitlines()).replace("/...", str(tmp_path))
    recipe += "\nassert metadata['phase'] == 2\nnp.savez('all.npz', **{k.replace('/', '|'):"
    recipe += " np.frombuffer(v.tobytes(), np.uint8) for k, v in arrays.items()})"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", recipe], check=True, cwd=tmp_path, env=env)
    found = {k.replace("|", "/"): v.tobytes() for k, v in np.load(tmp_path / "all.npz").items()}
    expected = {}
    for key, value in tree(7).items():
        for i, path in enumerate(layout.layers(key)):
            expected[path] = np.asarray(value[i] if "0-2" in key else value).tobytes()
    assert found == expected


# Meshes


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((8,), ("data", None)), ((2, 4), ("model", "data")), ((2,), (None, "data"))],
)
def test_restores_on_another_mesh(tmp_path, shape, spec):
    arrays = place(tree(5), sharded(mesh_of(4, 2), ("data", "model")))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {})
        target = structs(tree(), sharded(mesh_of(*shape), spec))
        found, _ = checkpoints.restore(target)
        one, _ = checkpoints.restore(structs(tree()))
    assert_bitwise(found, tree(5))
    assert_bitwise(one, tree(5))
    for key, struct in target.items():
        assert found[key].sharding == struct.sharding, key
        assert one[key].sharding == SingleDeviceSharding(jax.devices()[0])


def test_unstack_and_stack_keep_shardings_and_compile_once():
    arrays = {}
    mesh = mesh_of(4, 2)
    for name in range(12):
        kernel = np.arange(12 * 8 * 4, dtype=np.float32).reshape(12, 8, 4) + name
        spec = NamedSharding(mesh, P(None, "data", "model"))
        arrays[f"blocks/0-11/w{name}"] = jax.device_put(kernel, spec)
    counter = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: counter.append(name)
    )

    def programs(run):
        del counter[:]
        return run(), sum("backend_compile" in name for name in counter)

    single, compiled = programs(lambda: layout.unstack(arrays))
    assert compiled == 1 and len(single) == 144
    assert np.array_equal(single["blocks/7/w3"], np.asarray(arrays["blocks/0-11/w3"])[7])
    assert single["blocks/7/w3"].sharding == NamedSharding(mesh, P("data", "model"))
    stacked, compiled = programs(lambda: layout.stack(single, arrays, donate=True))
    assert compiled == 1
    assert_bitwise(stacked, arrays)
    assert stacked["blocks/0-11/w3"].sharding == arrays["blocks/0-11/w3"].sharding
    assert all(array.is_deleted() for array in single.values())


def test_large_states_are_taken_in_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(layout, "GROUP_BYTES", 4000)
    arrays = place(tree(3), sharded(mesh_of(2, 2), ("data", "model")))
    arrays["elsewhere"] = jax.device_put(np.arange(4.0, dtype=np.float32), jax.devices()[5])
    assert len(list(layout.groups(arrays))) >= 3
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {})
        found, _ = checkpoints.restore(structs(arrays, lambda k, v: v.sharding))
    assert_bitwise(found, arrays)


def test_the_way_through_pinned_host_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "_on_cpu", lambda arrays: False)
    arrays = place(tree(3), sharded(mesh_of(4, 2), ("data", "model")))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, arrays, {})
        for array in arrays.values():
            array.delete()
        found, _ = checkpoints.restore(structs(tree(), sharded(mesh_of(8), ("data", None))))
    assert_bitwise(found, tree(3))


# Checksums


def checksum_reference(x):
    """Sum of MurmurHash3 finalizers in Python integers."""
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    total = 0
    for place_, word in enumerate(np.ascontiguousarray(x).reshape(-1).view(words).tolist()):
        h = (word + (place_ + 1) * 0x9E3779B9) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += h ^ (h >> 16)
    return total % 2**32


def test_checksums_equal_an_independent_reference_on_any_mesh():
    arrays = tree(11)
    expected = {}
    for key, value in arrays.items():
        for i, path in enumerate(layout.layers(key)):
            expected[path] = checksum_reference(np.asarray(value[i] if "0-2" in key else value))
    assert layout.Checksums(place(arrays)).result() == expected
    placed = place(arrays, sharded(mesh_of(4, 2), ("data", "model")))
    assert layout.Checksums(placed).result() == expected
    assert layout.Checksums(layout.unstack(placed)).result() == expected


def test_checksums_see_one_bit_a_swap_and_a_shift():
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    changed = [x]
    for bit in (0, 13, 31):
        flipped = x.copy().view(np.uint32)
        flipped[3, 2] ^= np.uint32(1 << bit)
        changed.append(flipped.view(np.float32))
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed += [swapped, np.roll(x.reshape(-1), 1).reshape(6, 5), np.zeros_like(x)]
    sums = {layout.Checksums({"x": jnp.asarray(c)}).result()["x"] for c in changed}
    assert len(sums) == len(changed)


# Saving while training


def test_arrays_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda s: {k: v + jnp.ones((), v.dtype) for k, v in s.items()}, donate_argnums=0)
    rng = np.random.default_rng(0)
    start = {"w/0-3/k": rng.normal(size=(4, 256, 512)), "scalar": np.float32(1)}
    start = {k: v.astype(np.float32) for k, v in start.items()}
    with Checkpointer(tmp_path, keep=9) as checkpoints:
        state, expected = place(start), start
        for i in range(4):
            given = state
            checkpoints.save(i, given, {})
            state = step(given)
            assert given["w/0-3/k"].is_deleted() and given["scalar"].is_deleted()
            restored, _ = checkpoints.restore(structs(start), i)
            assert_bitwise(restored, expected)
            expected = {k: v + np.float32(1) for k, v in expected.items()}


def test_save_returns_before_the_checkpoint_is_written(tmp_path, monkeypatch):
    go, started = threading.Event(), Checkpointer._start

    def held(self, *args):
        assert go.wait(30)
        started(self, *args)

    monkeypatch.setattr(Checkpointer, "_start", held)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(5, place(tree(5)), {})
        assert checkpoints.latest() is None
        go.set()
        checkpoints.wait()
        assert checkpoints.latest() == 5


def test_keep_and_keep_every(tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6", "7"]
    assert Checkpointer(tmp_path).restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})[0]["x"] == 7


def test_going_back_sets_later_steps_aside(run, capsys):
    with Checkpointer(run, keep=2) as checkpoints:
        checkpoints.restore(structs(tree()), 100)
        checkpoints.save(150, place(tree(150)), {}, wait=True)
        assert checkpoints.latest() == 150
        assert_bitwise(checkpoints.restore(structs(tree()))[0], tree(150))
    assert {p.name for p in run.iterdir()} == {"100", "150", "200.superseded", "300.superseded"}
    assert "checkpoint 300 is now 300.superseded" in capsys.readouterr().out


def test_a_failed_write_is_told_by_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, place(tree(1)), {}, wait=True)
    monkeypatch.setattr(Checkpointer, "_start", lambda *_: os.fspath(os.open("/no/such", 0)))
    checkpoints.save(2, place(tree(2)), {})
    with pytest.raises(UserError, match="checkpoint 2 could not be written: FileNotFoundError"):
        checkpoints.wait()
    checkpoints.wait()
    assert checkpoints.latest() == 1
    checkpoints.close()


# Strictness


def test_misfits_are_named_in_one_line(saved):
    target = structs(tree())
    target["params/new/kernel"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    target["params/blocks/0-2/norm/scale"] = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    target["params/embed/table"] = jax.ShapeDtypeStruct((24, 65), jnp.float32)
    del target["state/rng"]
    with pytest.raises(UserError) as error:
        Checkpointer(saved).restore(target)
    scale = "params/blocks/{}/norm/scale (expected float32[16], found bfloat16[16])"
    assert str(error.value) == (
        "checkpoint 300 does not fit: 1 missing: params/new/kernel; 1 extra: state/rng; "
        f"4 misshapen: {', '.join(scale.format(i) for i in range(3))}, "
        "params/embed/table (expected float32[24,65], found float32[24,64])"
    )


def test_only_five_names_are_given(saved):
    target = {f"new/{i}": jax.ShapeDtypeStruct((), jnp.float32) for i in range(12)}
    with pytest.raises(UserError, match=r"12 missing: new/0, .*, new/4 and 7 more; 16 extra: "):
        Checkpointer(saved).restore(target)


def test_what_matches_is_loaded_where_not_strict(saved):
    target = structs(tree())
    target["params/embed/table"] = jax.ShapeDtypeStruct((25, 64), jnp.float32)
    target["params/blocks/0-3/norm/scale"] = jax.ShapeDtypeStruct((4, 16), jnp.bfloat16)
    del target["params/blocks/0-2/norm/scale"]
    arrays, metadata, fit = Checkpointer(saved).restore(target, strict=False)
    expected = tree(300)
    for left_out in ("params/embed/table", "params/blocks/0-2/norm/scale"):
        del expected[left_out]
    assert_bitwise(arrays, expected)
    assert metadata["step"] == 300
    assert fit.missing == ("params/blocks/3/norm/scale",) and not fit.extra
    assert fit.misshapen == (("params/embed/table", "float32[25,64]", "float32[24,64]"),)


def test_allowed_misfits(saved):
    target = {"params/embed/table": jax.ShapeDtypeStruct((24, 64), jnp.float32)}
    target["params/lora/a"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    options = {
        "allow_missing": [r".*/lora/.*"],
        "allow_extra": [r"(params|optimizer|state|ema)/.*"],
    }
    arrays, _ = Checkpointer(saved).restore(target, **options)
    assert_bitwise(arrays, {"params/embed/table": tree(300)["params/embed/table"]})
    with pytest.raises(UserError, match=r"1 missing: params/lora/a$"):
        Checkpointer(saved).restore(target, allow_extra=options["allow_extra"])


# Bad input


def test_a_stack_may_be_split_over_its_layers(tmp_path):
    """As the stages of a pipeline hold it; restored so, and as single layers."""
    stack = jnp.arange(32.0).reshape(4, 8)
    split = NamedSharding(mesh_of(4, 2), P("data", "model"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"a/0-3/b": jax.device_put(stack, split)}, {})
        target = {"a/0-3/b": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=split)}
        found = checkpoints.restore(target)[0]["a/0-3/b"]
        assert found.sharding == split and found.addressable_shards[0].data.shape == (1, 4)
        np.testing.assert_array_equal(found, stack)
        layer = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=one)
        target = {f"a/{i}/b": layer for i in range(4)}
        layers = checkpoints.restore(target)[0]
    for i in range(4):
        np.testing.assert_array_equal(layers[f"a/{i}/b"], stack[i])


def test_bad_input_is_one_clear_line(tmp_path):
    x, data = jnp.zeros((4, 8)), NamedSharding(mesh_of(4, 2), P("data"))
    cases = [
        ({"a/0-1/b/0-1/c": x}, {}, "two ranges"),
        ({"a/3-1/b": x}, {}, "does not ascend"),
        ({"a/0-2/b": x}, {}, r"names 3 layers, but its array has the shape \(4, 8\)"),
        ({"a/0-3/b": x, "a/1/b": x[0]}, {}, "two keys name the layer 'a/1/b'"),
        ({"key": jax.random.key(0)}, {}, "typed key"),
        ({"a": np.zeros(3)}, {}, "is a ndarray, no jax.Array"),
        ({"a": jnp.zeros((0, 3))}, {}, "nothing to save"),
        ({}, {}, "nothing to save"),
        ({"a": x}, {"array": x}, "cannot be written as JSON"),
    ]
    with Checkpointer(tmp_path) as checkpoints:
        for arrays, metadata, message in cases:
            with pytest.raises(UserError, match=message):
                checkpoints.save(1, arrays, metadata)
        with pytest.raises(UserError, match="step -1"):
            checkpoints.save(-1, {"a": x}, {})
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoints.restore(structs({"a": x}))
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.read(tmp_path / "nowhere")
        uneven = {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=data)}
        with pytest.raises(UserError, match="cannot be placed"):
            checkpoints.restore(uneven)
    with pytest.raises(UserError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []
