"""Structured linears whose features are split over devices: one device's step, few collectives."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import common
from efficient.training.plan import plan_config
from pallas_kernels.monarch_matmul import monarch_matmul

AUTO = (AxisType.Auto,) * 2
WIDTH, DEPTH, LENGTH, BATCH, BLOCKS, RANK = 64, 1, 32, 8, 4, 16
LINEARS = {
    "monarch": {"use": "monarch", "blocks": BLOCKS, "split": "features", "bias": True},
    "low_rank": {"use": "low_rank", "rank": RANK, "bias": True},
    "pixelfly": {"use": "pixelfly", "density": 0.5, "block": 8, "bias": True},
    "tensor_train": {"use": "tensor_train", "rank": 8, "bias": True},
}
MESH = {"data": 2, "fsdp": 1, "tensor": 4}


def config(name: str, mesh: dict, **model):
    """A decoder of four heads and one block, all linears of the block of one technique."""
    rules = [{"at": r"blocks/\d+/(mixer|channel)/.*", **LINEARS[name]}]
    phase = common.phase(1, optimizer={"name": "sgd", "learning_rate": 1.0}, clip=None)
    found = tiny.config(phase, rules=[*rules, *common.gpt2(WIDTH, DEPTH, 4)], mesh=mesh)
    found.model = {**found.model, "width": WIDTH, "depth": DEPTH, **model}
    return found


@pytest.mark.parametrize("split", ["inputs", "outputs"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_and_its_gradients_are_those_of_one_device(split, dtype):
    """Eight blocks, then four; 24 rows over two devices, features over four."""
    rng, mesh = np.random.default_rng(0), jax.make_mesh((2, 4), ("data", "tensor"), AUTO)
    x, right, left, bias, dy = (
        jnp.asarray(rng.normal(size=s) * s[-2 if len(s) == 3 else 0] ** -0.5, dtype)
        for s in ((6, 4, 64), (8, 8, 4), (4, 8, 12), (48,), (6, 4, 48))
    )
    how = {"sharding": NamedSharding(mesh, P("data", None, None)), "outputs": "tensor"}
    if split == "inputs":
        how = {"sharding": NamedSharding(mesh, P("data", None, "tensor"))}

    def results(how):
        def run(*arrays):
            return monarch_matmul(*arrays[:3], bias=arrays[3], activation="silu", **how)

        y, pull = jax.vjp(run, x, right, left, bias)
        return y, *pull(dy)

    found = jax.jit(lambda: results(how))()
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, right, left, bias)]
        y, pull = jax.vjp(explicit, *wide)
        expected = y, *pull(jnp.asarray(np.asarray(dy, np.float64)))
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-6  # roundings of z, of four sums, of y
    for got, wanted in zip(found, expected, strict=True):
        largest = np.abs(wanted).max()
        assert largest > 0.1 and got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float64), wanted, rtol=0, atol=tolerance * largest
        )


def explicit(x, right, left, bias):
    """silu(x W + bias), feature by feature of what is between the factors."""
    (blocks, rows, _), (others, _, columns) = right.shape, left.shape
    z = [x[..., k * rows : (k + 1) * rows] @ right[k] for k in range(blocks)]
    z = jnp.concatenate(z, axis=-1)
    parts = [z[..., i::others] @ left[i] for i in range(others)]
    y = jnp.stack(parts, axis=-1).reshape(*x.shape[:-1], columns * others) + bias
    return y / (1 + jnp.exp(-y))


def test_splits_that_are_refused():
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), AUTO)
    x, right, left = jnp.ones((2, 16)), jnp.ones((4, 4, 4)), jnp.ones((4, 4, 8))
    rows, both = (NamedSharding(mesh, P(None, axis)) for axis in (None, "tensor"))
    small = jax.make_mesh((1, 2), ("data", "tensor"), AUTO, devices=jax.devices()[:2])
    taken = NamedSharding(small, P("tensor", None))
    axes = (AxisType.Explicit,) * 2
    explicit_rows = NamedSharding(jax.make_mesh((1, 8), ("data", "tensor"), axes), P(None, None))
    for how, message in (
        ({"sharding": rows, "outputs": "tensor"}, "K, blocks of right, 4 must be a multiple of"),
        ({"sharding": both}, "the 8 devices of tensor"),
        ({"sharding": both, "outputs": "tensor"}, "outputs must be None where sharding splits"),
        ({"outputs": "tensor"}, "outputs must be None where sharding"),
        ({"sharding": "data", "outputs": "tensor"}, "outputs must be None where sharding"),
        (
            {"sharding": rows, "outputs": "model"},
            "'model', .* is none of the mesh; .* data, tensor",
        ),
        ({"sharding": taken, "outputs": "tensor"}, "'tensor', .* splits rows"),
        ({"sharding": NamedSharding(mesh, P("tensor")), "outputs": "data"}, "must divide x"),
        ({"sharding": NamedSharding(mesh, P(None, None, None)), "outputs": "data"}, "2 axes"),
        ({"sharding": explicit_rows, "outputs": "tensor"}, "type Auto, not Explicit"),
        ({"sharding": rows, "outputs": "data", "implementation": "tpu"}, "cannot do this"),
    ):
        with pytest.raises(ValueError, match=message):
            monarch_matmul(x, right, left, **how)


OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in LINEARS if n != "monarch"]


@pytest.mark.parametrize("name", ["monarch", *OTHERS])
def test_a_step_of_eight_devices_is_that_of_one(name):
    found = []
    for mesh, devices in (({"data": 1}, jax.devices()[:1]), (MESH, jax.devices())):
        run, state = tiny.start(config(name, mesh), devices)
        batch = tiny.batches(run, 1)[0]
        if mesh is MESH:
            shards = {p: a.addressable_shards[0].data.shape for p, a in state["params"].items()}
        before = tiny.host(state["params"])
        state, metrics = run.train_step(run.phases[0])(state, batch)
        after = tiny.host(state["params"])
        found.append((float(metrics["loss"]), {p: before[p] - after[p] for p in before}))
    (loss, gradients), (other, others) = found
    assert abs(loss - other) < 1e-5 * loss
    for path, gradient in gradients.items():
        largest = np.abs(gradient).max()
        if not path.endswith("k/bias"):  # zero but for rounding
            assert largest > 1e-4
        # Gradients are differences of float32 parameters of order one.
        np.testing.assert_allclose(others[path], gradient, atol=1e-4 * largest + 3e-7, rtol=0)
    for path, shape in shards.items():  # every factor is held once by the devices of a row of data
        whole = gradients[path].shape
        split = np.prod(whole) // np.prod(shape)
        factor = re.search(r"/(right|left|blocks)$|/(q|k|v|up)/up$|/(out|down)/down$", path)
        assert split == 4 if factor else split in (1, 4), path


@pytest.mark.slow
@pytest.mark.filterwarnings("error:monarch_matmul|block_diagonal_matmul")  # not their kernels
def test_a_tpu_moves_what_is_between_the_factors_and_nothing_else():
    """Kinds and bytes of the collectives of one block on four chips, as split.py has them."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    width, length = 2048, 64  # every factor of a chip is a multiple of 128
    found = config("monarch", {"data": 1, "tensor": 4}, width=width, max_length=length)
    found.rules = [found.rules[0], *common.gpt2(width, DEPTH, 4)]
    # Of a residual that is split along the sequence, features come by a cheaper all-to-all.
    found.placement = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]
    found.data, found.compute_dtype = {**found.data, "length": length}, "bfloat16"
    activation = 2 * BATCH * length * width
    plan = plan_config(found, "v5e:2x2")
    assert {c.axes for c in plan.collectives} == {("tensor",)}
    runs = dict.fromkeys(("all_gather", "reduce_scatter", "psum", "shard_map"), 0)
    for one in plan.collectives:
        by = one.source.rsplit("/", 1)[-1]
        if "shard_map" in one.source:
            kinds = {"all_gather": ["all-gather"], "reduce_scatter": ["reduce-scatter"]}
            kinds["shard_map"] = ["all-gather"]  # of what it takes or gives
            # A sum may leave its result split, for a norm goes on with that.
            assert one.kind in kinds.get(by, ["all-reduce", "reduce-scatter"]), one
            assert one.payload == activation, one
            runs[by] += one.runs
        # Features that a product wants elsewhere would be an all-to-all; rows of the embedding
        # change places too, which is another matter.
        assert one.kind not in ("all-to-all", "collective-permute") or "_take" in one.source, one
    # Before q, k, v and up; of their inputs' gradients; after out and down; and one gather, of a
    # gradient that is split along features, which XLA ascribes to the product that gives it.
    assert runs == {"all_gather": 4, "reduce_scatter": 4, "psum": 2, "shard_map": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:block_sparse_matmul")  # not its kernels
def test_a_tpu_gathers_few_weights_where_features_would_travel():
    """Of Pixelfly's layers no features are gathered or summed; heads come by all-to-alls.

    What is left of a dense block's twelve gathers and scatters are those of embedding and head.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    width, length = 1024, 256
    linear = {"use": "pixelfly", "density": 0.5, "block": 128}
    rules = [{"at": r"blocks/\d+/(mixer|channel)/.*", **linear}]
    found = config("pixelfly", {"data": 1, "tensor": 4}, width=width, max_length=length)
    found.rules = [*rules, *common.gpt2(width, DEPTH, 8)]
    found.data, found.compute_dtype = {**found.data, "length": length}, "bfloat16"
    activation = 2 * BATCH * length * width
    plan = plan_config(found, "v5e:2x2")
    of_features = collections.Counter()
    weights = 0
    for one in plan.collectives:
        if one.payload == activation:
            of_features[one.kind] += one.runs
        elif "blocks" in one.source or "shard_map" in one.source:
            weights += one.wire
    # q, k, v and what attention gives, forward and backward
    assert of_features == {"all-to-all": 8, "all-gather": 2, "reduce-scatter": 2}
    assert weights > 0
    # Blocks are gathered, and their gradients scattered: of the 12 n^2 weights of a dense block
    # a half at most, and none else of any size.
    rest = sum(c.wire for c in plan.collectives if c.payload != activation)
    assert rest < 3 * 2 * 12 * width**2 / 2
