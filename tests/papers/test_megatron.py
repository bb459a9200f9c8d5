"""Megatron-LM: the collectives of a step, and the split loss against NumPy."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import common
from efficient.objectives.likelihood import cross_entropy
from efficient.training.plan import plan_config

WIDTH, DEPTH, LENGTH, BATCH, HEADS, VOCABULARY = 512, 2, 256, 16, 8, 4096
DATA, TENSOR = 4, 4
ACTIVATION = 2 * BATCH // DATA * LENGTH * WIDTH  # bytes of [B, T, D] in bfloat16, a row of data
PLAIN = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]


def planned(placement):
    """Collectives of a step of two Llama blocks on sixteen v5e."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    phase = common.phase(1, optimizer={"name": "sgd", "learning_rate": 1.0}, clip=None)
    mesh = {"data": DATA, "tensor": TENSOR}
    rules = common.llama(HEADS, HEADS, hidden=4 * WIDTH)
    found = tiny.config(phase, rules=rules, mesh=mesh, placement=placement)
    sizes = {"width": WIDTH, "depth": DEPTH, "max_length": LENGTH, "vocab_size": VOCABULARY}
    found.model = {**found.model, **sizes, "tied": False}
    found.data = {**found.data, "length": LENGTH}
    found.batch_size, found.compute_dtype = BATCH, "bfloat16"
    return plan_config(found, "v5e:4x4").collectives


@pytest.fixture(scope="module")
def plain():
    return planned(PLAIN)


@pytest.fixture(scope="module")
def split():
    return planned([])


def counted(found, payload):
    """(kind, whether it is of the backward pass) -> runs, of the collectives of that payload."""
    runs = collections.Counter()
    for one in found:
        if one.axes == ("tensor",) and one.payload == payload:
            runs[one.kind, "transpose(jvp" in one.source] += one.runs
    return dict(runs)


@pytest.mark.slow
def test_sums_of_a_step(plain):
    """Two a block each way, one of the embedding forward, one of the head backward: no others."""
    sums = 2 * DEPTH + 1
    assert counted(plain, ACTIVATION) == {
        ("all-reduce", False): sums,
        ("all-reduce", True): sums,
    }
    for one in plain:
        tokens = BATCH // DATA * LENGTH
        # Numbers a token: maximum, sum of exponentials and logit at the target in float32, and of
        # the accuracy the largest logit of each device and its place.
        small = 4 * tokens * max(3, TENSOR)
        if one.axes == ("tensor",) and one.payload != ACTIVATION:
            assert one.payload <= small, one
        if "tensor" in one.axes and one.axes != ("tensor",):
            assert one.payload < 4 * WIDTH * (2 * DEPTH + 1) + 64, one  # scales of norms


@pytest.mark.slow
def test_a_split_residual_moves_as_many_bytes(plain, split):
    sums = 2 * DEPTH + 1
    assert counted(split, ACTIVATION) == {
        ("all-gather", False): sums,
        ("reduce-scatter", False): sums,
        ("reduce-scatter", True): sums,
        ("all-gather", True): sums,
    }
    wire = [
        sum(c.wire for c in found if c.axes == ("tensor",) and c.payload == ACTIVATION)
        for found in (plain, split)
    ]
    each = ACTIVATION * (TENSOR - 1) // TENSOR  # what a device sends to gather or to scatter
    assert wire == [2 * 2 * sums * each] * 2


@pytest.mark.parametrize("vocabulary", [64, 30])
def test_no_device_holds_the_logits(vocabulary):
    """Loss and gradient of split logits: NumPy's values, and parts alone in the program."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 6, 8)), rng.normal(size=(8, vocabulary)) * 3
    targets = rng.integers(0, vocabulary, size=(4, 6))
    axis = "tensor" if vocabulary % 4 == 0 else None

    def place(a, *spec):
        dtype = jnp.int32 if a.dtype.kind == "i" else jnp.float32
        return jax.device_put(jnp.asarray(a, dtype), NamedSharding(mesh, P(*spec)))

    def loss(x, w, targets):
        logits = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", None, axis)))
        return cross_entropy(logits, targets).mean()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    arguments = place(x, "data"), place(w, None, axis), place(targets, "data")
    compiled = step.lower(*arguments).compile()
    value, (dx, dw) = compiled(*arguments)

    logits = x @ w
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    at_target = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(value, -np.log(at_target).mean(), rtol=2e-6)
    d = (p - np.eye(vocabulary)[targets]) / targets.size
    np.testing.assert_allclose(dx, d @ w.T, rtol=0, atol=2e-6 * np.abs(d @ w.T).max())
    expected = np.einsum("btd,btv->dv", x, d)
    np.testing.assert_allclose(dw, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

    # [B / 2, T, V] in any array would be a gather.
    shapes = set(re.findall(r"f32\[(\d+,\d+,\d+)\]", compiled.as_text()))
    whole = f"2,6,{vocabulary}"
    assert (whole in shapes) == (axis is None)
    if axis:
        assert f"2,6,{vocabulary // 4}" in shapes
