"""The four structured products under JAX's transformations and settings, at sizes of their kernels.

On a CPU the TPU's branch of a call is traced too, whatever runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, tpu_chip
from pallas_kernels.block_diagonal_matmul import block_diagonal_matmul
from pallas_kernels.block_sparse_matmul import BlockMask, block_sparse_matmul
from pallas_kernels.butterfly_matmul import butterfly_matmul
from pallas_kernels.monarch_matmul import monarch_matmul, tpu_plan

M = 128
MASK = BlockMask(np.array([[True, False], [True, True]]))
OPS = {  # a function of x [M, 256] and weights, and the shapes of these
    "monarch": (monarch_matmul, (2, 128, 128), (2, 128, 128)),
    "block_diagonal": (block_diagonal_matmul, (2, 128, 128)),
    "block_sparse": (functools.partial(block_sparse_matmul, mask=MASK), (3, 128, 128)),
    "butterfly": (butterfly_matmul, (8, 128, 2, 2)),
    "butterfly of blocks": (butterfly_matmul, (1, 1, 2, 2, 128, 128)),
}
every_op = pytest.mark.parametrize("name", OPS)


def case(name, dtype=jnp.float32):
    """The op, and arrays for it whose products are about 1."""
    op, *shapes = OPS[name]
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=shape) * shape[-1] ** -0.5 for shape in shapes)
    return op, [jnp.asarray(a, dtype) for a in (rng.normal(size=(M, 256)), *weights)]


def loss_of(op):
    return lambda *arrays: (op(*arrays).astype(jnp.float32) ** 3).sum()


def gradients_of(op, count):
    return jax.grad(loss_of(op), tuple(range(count)))


def close(found, wanted, tolerance=1e-5):
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(found) == len(wanted) > 0
    for got, expected in zip(found, wanted, strict=True):
        largest = np.abs(expected).max()
        assert largest > 1e-3
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * largest)


@every_op
def test_with_64_bits_enabled(name):
    op, arrays = case(name)
    run = jax.value_and_grad(loss_of(op), tuple(range(len(arrays))))
    with jax.enable_x64(True):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
        found = run(*arrays) if name == "block_diagonal" else None
    assert "tpu_custom_call" in text
    if found is not None:
        close(found, run(*arrays))


@every_op
def test_second_derivatives(name):
    """Reverse over reverse and forward over reverse; of one op those of the reference."""
    op, arrays = case(name)
    direction = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in arrays)

    def along(op):
        return jax.jvp(gradients_of(op, len(arrays)), tuple(arrays), direction)[1]

    def both():
        loss = lambda *a: sum((g**2).sum() for g in gradients_of(op, len(arrays))(*a))  # noqa: E731
        return jax.grad(loss)(*arrays), along(op)

    assert jax.eval_shape(both)[0].shape == (M, 256)
    if name == "block_diagonal":
        reference = functools.partial(op, implementation="reference")
        close(*(jax.jit(functools.partial(along, f))() for f in (op, reference)))


def products(jaxpr):
    """Precisions of the products in the kernels of a traced program."""
    found = []

    def walk(jaxpr, inside):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general" and inside:
                found.append(eqn.params["precision"])
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner, inside or eqn.primitive.name == "pallas_call")

    walk(jaxpr.jaxpr, False)
    return found


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, "high") for name in OPS), ("monarch", "highest"), ("monarch", None)],
)
def test_precision_of_kernels_under_a_setting_of_all_products(name, setting):
    """Mosaic has one pass and the highest, the latter for float32 alone."""
    default, highest = ((p, p) for p in (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST))
    for dtype in (jnp.bfloat16, jnp.float32):
        op, arrays = case(name, dtype)
        with jax.default_matmul_precision(setting):
            traced = jax.jit(gradients_of(op, len(arrays))).trace(*arrays)
        found = set(products(traced.jaxpr))
        wanted = {default} if dtype == jnp.bfloat16 or setting is None else {default, highest}
        assert found and found <= wanted and wanted - {default} <= found


@every_op
def test_batched_kernels_lower_for_a_tpu(name):
    """Gradients of batches of x and weights, of x alone, and of weights that a batch shares."""
    op, (x, *weights) = case(name, jnp.bfloat16)
    xs, batch = jnp.stack([x, 2 * x, 3 * x]), [jnp.stack([w, w, w]) for w in weights]
    gradients, alone = gradients_of(op, 1 + len(weights)), (None,) * len(weights)

    def shared(*weights):
        return loss_of(jax.vmap(op, (0, *alone)))(xs, *weights)

    for run, arrays in (
        (jax.vmap(gradients), (xs, *batch)),
        (jax.vmap(gradients, (0, *alone)), (xs, *weights)),
        (jax.grad(shared, tuple(range(len(weights)))), weights),
    ):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text


def test_example_by_example():
    """As vmap of the plain function does, whatever is batched; rows at once where they can be."""
    calls = []

    def plain(x, w, bias):
        calls.append(x.shape)
        y = x @ w
        return (y if bias is None else y + bias), {"sum": x.sum()}

    rng = np.random.default_rng(0)
    x, w, bias = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 2))
    wrapped = dispatch.by_example(plain)
    for axes in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, 0, None)):
        arrays = [a if axis == 0 else a[0] for a, axis in zip((x, w, bias), axes, strict=True)]
        close(jax.vmap(wrapped, axes)(*arrays), jax.vmap(plain, axes)(*arrays))
        twice = (*(None if axis is None else 1 for axis in axes[:2]), None)
        pairs = [
            np.stack([a, -a]) if t is not None else a for a, t in zip(arrays, twice, strict=True)
        ]
        if any(t is not None for t in twice):
            nested = jax.vmap(
                jax.vmap(wrapped, axes), tuple(None if t is None else 0 for t in twice)
            )
            other = jax.vmap(jax.vmap(plain, axes), tuple(None if t is None else 0 for t in twice))
            close(nested(*pairs), other(*pairs))
    assert close(wrapped(x[0], w[0], None), plain(x[0], w[0], None)) is None

    calls.clear()
    rows = dispatch.by_example(lambda x, w: plain(x, w, None)[0], rows=True)
    close(jax.vmap(rows, (0, None))(x, w[0]), x @ w[0])
    assert (4, 5, 3) in calls
    close(jax.vmap(rows)(x, w), x @ w)


@every_op
def test_gradients_of_weights_that_all_devices_have(name):
    """In a `shard_map` that checks what varies over devices."""
    op, (x, *weights) = case(name)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    alone = (P(),) * len(weights)
    over = jax.shard_map(op, mesh=mesh, in_specs=(P("data"), *alone), out_specs=P("data"))
    found, wanted = (gradients_of(f, 1 + len(weights))(x, *weights) for f in (over, op))
    close(found, wanted)


@pytest.mark.parametrize("rows", [512, 1536, 2560, 8704])
def test_both_cores_of_a_chip_have_steps(rows, monkeypatch):
    monkeypatch.setattr(tpu_plan, "chip", lambda: tpu_chip.Chip(cores=2))
    right = left = jnp.zeros((16, 256, 256), jnp.bfloat16)
    for backward in (False, True):
        assert tpu_plan.plan(rows, right, left, 2, backward).cores == 2


def test_bias_and_activation_of_what_was_rounded_once():
    """In float32 where x is bfloat16; in bfloat16 errors would be 1.3 times as great."""
    op, arrays = case("monarch", jnp.bfloat16)
    bias = jnp.linspace(-3, 3, 256, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (*arrays, bias)]

    def finished(y):
        return np.asarray(jax.nn.gelu(y + wide[-1], approximate=True))

    exact = finished(op(*wide[:-1], precision="highest"))
    once = finished(op(*arrays).astype(jnp.float32)).astype(jnp.bfloat16)
    error, wanted = (
        np.square(np.asarray(y, np.float32) - exact).mean() ** 0.5
        for y in (op(*arrays, bias=bias, activation="gelu"), once)
    )
    assert 0 < error < 1.05 * wanted
