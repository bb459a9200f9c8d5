"""Monarch products: every implementation against explicit matrices in float64, and the TPU kernels.

The kernels run in Pallas' TPU interpreter with race detection and memory that starts as NaN.
"""

import contextlib
import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from races import no_races
from test_block_sparse_matmul import ACTIVATIONS

from pallas_kernels import interleave
from pallas_kernels.compat import on_device
from pallas_kernels.lab import traffic
from pallas_kernels.lab.tpu import on_target
from pallas_kernels.monarch_matmul import blockwise, cases, monarch_matmul, tpu, tpu_plan
from pallas_kernels.monarch_matmul.tpu_forward import over
from pallas_kernels.tpu_chip import Chip

# K, p, q, L, r, s
SQUARE = (4, 4, 4, 4, 4, 4)
WIDE = (2, 3, 6, 4, 3, 5)
NARROW = (6, 5, 2, 3, 4, 2)


def make(sizes, lead=(7,), dtype=jnp.float32, seed=0):
    """x, right, left, bias, dy."""
    K, p, q, L, r, s = sizes
    random = np.random.default_rng(seed)
    shapes = (*lead, K * p), (K, p, q), (L, r, s), (L * s,), (*lead, L * s)
    scales = 1, p**-0.5, r**-0.5, 1, 1
    return [
        jnp.asarray(scale * random.normal(size=shape), dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def matrices(right, left):
    """The factors [K p, K q] and [L r, L s], and what stands between and behind them."""

    def diagonal(blocks):
        n, i, j = blocks.shape
        found = np.zeros((n * i, n * j))
        for b in range(n):
            found[b * i : (b + 1) * i, b * j : (b + 1) * j] = blocks[b]
        return found

    L, r, s = left.shape
    between, behind = np.zeros((L * r, L * r)), np.zeros((L * s, L * s))
    for feature in range(L * r):  # feature i L + l is row i of block l
        between[feature, feature % L * r + feature // L] = 1
    for feature in range(L * s):  # row f of block l comes to f L + l
        behind[feature, feature % s * L + feature // s] = 1
    return diagonal(right), between, diagonal(left), behind


def expected(x, right, left, dy):
    """y, dx, dright, dleft by dense matrices in float64."""
    x, right, left, dy = (np.asarray(a, np.float64) for a in (x, right, left, dy))
    R, between, L, behind = matrices(right, left)
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    z = x @ R @ between
    dz = dy @ behind.T @ L.T
    dR, dL = x.T @ (dz @ between.T), z.T @ (dy @ behind.T)

    def blocks(matrix, like):
        n, i, j = like.shape
        return np.stack([matrix[b * i : (b + 1) * i, b * j : (b + 1) * j] for b in range(n)])

    return z @ L @ behind, dz @ between.T @ R.T, blocks(dR, right), blocks(dL, left)


def run(x, right, left, bias=None, dy=None, **how):
    """y, dx, dright, dleft of an implementation."""
    y, pull = jax.vjp(functools.partial(monarch_matmul, **how), x, right, left)
    return y, *pull(dy)


def errors(found, right):
    """The greatest error of each array, as a part of its greatest element."""
    pairs = [(np.asarray(a, np.float64), b) for a, b in zip(found, right, strict=True)]
    assert all(np.isfinite(a).all() for a, _ in pairs)
    return [np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max() for a, b in pairs]


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("sizes", [SQUARE, WIDE, NARROW])
def test_equals_explicit_matrices(implementation, sizes):
    x, right, left, _, dy = make(sizes, (2, 3))
    found = run(x, right, left, dy=dy, implementation=implementation)
    assert found[0].shape == dy.shape and found[1].shape == x.shape
    assert max(errors(found, expected(x, right, left, dy))) < 1e-6


@settings(max_examples=8, deadline=None)
@given(
    strategies.tuples(*[strategies.integers(1, 5)] * 5), strategies.integers(0, 9)
)  # fmt: skip
def test_any_sizes(sizes, seed):
    K, p, L, half, s = sizes
    q, r = L * half, K * half
    arrays = make((K, p, q, L, r, s), (3,), seed=seed)
    x, right, left, _, dy = arrays
    found = run(x, right, left, dy=dy)
    assert max(errors(found, expected(x, right, left, dy))) < 2e-6


@pytest.mark.parametrize(
    ("activation", "dtype", "bound"),
    [
        ("gelu", jnp.float32, 2e-6),
        ("relu", jnp.float32, 2e-6),
        ("silu", jnp.float32, 2e-6),
        (None, jnp.float32, 2e-6),
        ("gelu", jnp.bfloat16, 2**-6),
    ],
)
def test_bias_and_activation_with_their_gradients(activation, dtype, bound):
    """All four arguments'. In bfloat16 y, the slope's product with dy, and z are rounded."""
    x, right, left, bias, dy = make(WIDE, dtype=dtype)
    product = functools.partial(monarch_matmul, activation=activation)
    y, pull = jax.vjp(lambda *a: product(*a[:3], bias=a[3]), x, right, left, bias)
    found = y, *pull(dy)
    assert {a.dtype for a in found} == {jnp.dtype(dtype)}
    linear = expected(x, right, left, dy)[0] + np.asarray(bias, np.float64)
    after, slope = ACTIVATIONS[activation](linear)
    dh = slope * np.asarray(dy, np.float64)
    _, *gradients = expected(x, right, left, dh)
    assert max(errors(found, [after, *gradients, dh.sum(0)])) < bound


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_bfloat16(platform):
    """No worse than twice two products that round to bfloat16 in between."""
    x, right, left, _, dy = make((4, 16, 16, 4, 16, 16), (64,), jnp.bfloat16)
    exact = expected(x, right, left, dy)

    def naive(x, right, left):
        R, between, L, behind = (jnp.asarray(a, jnp.bfloat16) for a in matrices(right, left))
        return ((x @ R) @ between @ L) @ behind

    found = blockwise.forward(x, right, left, None, None, None, platform)
    assert found.dtype == jnp.bfloat16
    (most,) = errors([naive(x, np.asarray(right), np.asarray(left))], exact[:1])
    assert errors([found], exact[:1])[0] <= 2 * most
    dx, *weights = blockwise.backward(x, right, left, dy, None, platform)
    assert dx.dtype == jnp.bfloat16 and {w.dtype for w in weights} == {jnp.dtype(jnp.float32)}
    assert max(errors([dx, *weights], exact[1:])) < 2**-6
    assert {g.dtype for g in run(x, right, left, dy=dy)} == {jnp.dtype(jnp.bfloat16)}


# ---- the TPU kernels


def params():
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )


@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_exchanges_of_lanes(blocks):
    """Against their definitions, on tiles that hold their own number and lane."""
    tiles = np.arange(blocks)[:, None, None] * 128 + np.arange(128)
    tiles = np.broadcast_to(tiles, (blocks, 8, 128)).astype(np.int32)

    def apply(how):
        def kernel(x, o):
            for i, tile in enumerate(how([x[i] for i in range(blocks)])):
                o[i] = tile

        call = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(tiles.shape, jnp.int32),
            interpret=pltpu.InterpretParams(),
        )
        return np.asarray(call(tiles))[:, 0]

    lane, tile, each = np.arange(128), np.arange(blocks)[:, None], 128 // blocks
    exchanged = (lane % blocks ^ tile) * 128 + lane
    np.testing.assert_array_equal(apply(interleave.exchange), exchanged)
    # Lane j L + l of tile t is feature t (128 / L) + j of block l, which stood in lane j L + l + t.
    block, j = lane % blocks, lane // blocks
    spread = block * 128 + (j * blocks + block + tile) % 128
    np.testing.assert_array_equal(apply(interleave.spread), spread)
    both = apply(lambda tiles: interleave.collect(interleave.spread(tiles)))
    np.testing.assert_array_equal(both, tiles[:, 0])
    # The orders of weights are those places.
    order, lanes = (
        np.asarray(of(jnp.int32(blocks - 1), blocks))[0]
        for of in (interleave.spread_order, interleave.spread_lane)
    )
    np.testing.assert_array_equal(order[lanes], lane)
    feature = each * np.arange(blocks)[:, None] + np.arange(each)
    place = (np.arange(each) * blocks + blocks - 1 + np.arange(blocks)[:, None]) % 128
    np.testing.assert_array_equal(order[place], feature)


def interpret(sizes, M, dtype, monkeypatch, straight=True, rows=tpu_plan.ROWS):
    monkeypatch.setattr(tpu_plan, "ROWS", rows)
    if not straight:
        monkeypatch.setattr(tpu_plan, "STRAIGHT_FLOPS", 0)
    x, right, left, bias, dy = make(sizes, (M,), dtype)
    for backward in (False, True):
        assert tpu.unsupported(x, right, left, backward) is None
    precision = jax.lax.Precision.HIGHEST
    with no_races():
        y = tpu.forward(x, right, left, None, None, precision, params())
        gradients = tpu.backward(x, right, left, dy, precision, params())
    exact = expected(x, right, left, dy)
    assert max(errors([y, *gradients], exact)) < (1e-6 if dtype == jnp.float32 else 6e-3)
    # bfloat16 weights' gradients are sums in float32 of products of z and dz rounded to it
    with no_races():
        final = tpu.forward(x, right, left, bias, "gelu", precision, params())
    wide = np.asarray(exact[0] + np.asarray(bias, np.float64), np.float32)
    (error,) = errors([final], [np.asarray(jax.nn.gelu(wide, approximate=True), np.float64)])
    assert error < (1e-6 if dtype == jnp.float32 else 6e-3)


def test_kernels(monkeypatch):
    interpret((2, 128, 256, 4, 128, 128), 200, jnp.bfloat16, monkeypatch)


KERNELS = {
    "steps": ((4, 128, 128, 4, 128, 128), 500, jnp.float32, True, (128,)),  # two on each core
    "two_tiles": ((2, 128, 256, 2, 256, 256), 512, jnp.bfloat16, True),
    "loops": ((4, 256, 128, 2, 256, 384), 256, jnp.bfloat16, False),
    "narrow": ((8, 128, 128, 2, 512, 128), 130, jnp.float32, False),
    "eight": ((8, 128, 128, 8, 128, 128), 512, jnp.bfloat16, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_numbers(name, monkeypatch):
    sizes, M, dtype, *how = KERNELS[name]
    interpret(sizes, M, dtype, monkeypatch, *how)


WAYS = ("one kernel", "stages", "lent")


@pytest.fixture
def keeping(monkeypatch):
    """A chip on which z is kept, two parts of rows a step; the backward pass in a way of `WAYS`."""

    def set_up(way, cores=1):
        monkeypatch.setattr(tpu_plan, "chip", lambda: Chip(128 * 2**20, cores, ridge=1.0))
        monkeypatch.setattr(tpu_plan, "ROWS", (256, 128))
        monkeypatch.setattr(tpu_plan, "CHUNK", 128)
        if way == "stages":
            staged = lambda *args: tpu_plan.plan(*args, False, transposed=True, kept=True)  # noqa: E731
            monkeypatch.setattr(tpu_plan, "kept_backward", staged)
        if way == "lent":
            lent = lambda *args: tpu_plan.plan(*args, True, kept=True)._replace(lent=True)  # noqa: E731
            monkeypatch.setattr(tpu_plan, "kept_backward", lent)

    jax.clear_caches()
    yield set_up
    jax.clear_caches()


@pytest.mark.parametrize(
    ("sizes", "cores", "dtype"),
    [
        ((2, 128, 256, 2, 256, 128), 1, jnp.bfloat16),
        pytest.param((2, 128, 256, 4, 128, 256), 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param((2, 256, 256, 2, 256, 256), 2, jnp.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_kernels_that_keep_what_is_between_the_factors(way, sizes, cores, dtype, keeping):
    if way == "lent" and sizes[0] * sizes[1] != sizes[3] * sizes[5]:
        pytest.skip("dx is not as wide as dy")
    keeping(way, cores)
    x, right, left, _, dy = make(sizes, (512,), dtype)
    assert tpu.keeps(x, right, left)
    backward = tpu_plan.kept_backward(512, right, left, x.dtype.itemsize)
    assert backward.backward == (way != "stages") and backward.steps == 2
    precision = jax.lax.Precision.HIGHEST
    with no_races():
        y, z = tpu.forward(x, right, left, None, None, precision, params(), keep=True)
        gradients = tpu.backward(x, right, left, dy, precision, params(), z=z)
    assert (z.shape, z.dtype) == tpu.kept(x, right)
    found = errors([y, *gradients], expected(x, right, left, dy))
    assert max(found) < (1e-6 if dtype == jnp.float32 else 6e-3)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_goes_from_one_pass_to_the_other(way, keeping, capsys):
    """In a program for a TPU, and under `jax.checkpoint`; elsewhere nothing depends on it."""
    keeping(way)
    x, right, left, _, dy = make((2, 128, 128, 2, 128, 128), (512,))
    both = lambda *arrays: run(*arrays[:3], dy=arrays[3])  # noqa: E731
    program = jax.jit(both).trace(x, right, left, dy).lower(lowering_platforms=("tpu",)).as_text()
    backward = ["dx_kept", "sum_right", "sum_left"] if way == "stages" else ["bwd_kept"]
    names = set(re.findall(r'kernel_name = "(\w+)"', program))
    assert names == {f"monarch_{name}" for name in ("fwd_kept", *backward)}
    product = jax.checkpoint(lambda *arrays: monarch_matmul(*arrays))
    again = jax.jit(lambda *arrays: jax.vjp(product, *arrays[:3])[1](arrays[3]))
    assert "kept" in again.trace(x, right, left, dy).lower(lowering_platforms=("tpu",)).as_text()
    assert max(errors(both(x, right, left, dy), expected(x, right, left, dy))) < 1e-6
    jax.ad_checkpoint.print_saved_residuals(monarch_matmul, x, right, left)
    assert "monarch_z" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "least"), [("v5e", 512), ("v5p", 256), ("v6e", 1024), (None, 4096)]
)
def test_the_chip_says_from_which_blocks_on_what_is_between_is_kept(target, least):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    with on_target(target) if target else contextlib.nullcontext():
        for M, size in itertools.product((8192, 8192 + 256), (128, 256, 512, 1024)):
            weights = of((4, size, size))
            kept = tpu.keeps(of((2, M // 2, 4 * size)), weights, weights)
            assert kept == (size >= least and M == 8192), (M, size)


def test_dx_lends_its_place_where_a_chunk_would_not_fit(monkeypatch):
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    for chip, blocks, right in (
        (Chip(64 * 2**20, 2, 128, 166), 32, (256, True)),  # v5p
        (Chip(64 * 2**20, 2, 128, 166), 16, (512, False)),
        (Chip(128 * 2**20, 1, 128, 240), 32, (512, False)),  # v5e
    ):
        monkeypatch.setattr(tpu_plan, "chip", lambda chip=chip: chip)
        weights = of((blocks, 256, 256))
        plan = tpu_plan.plan(8192, weights, weights, 2, True, kept=True)
        assert (plan.rows, plan.lent) == right
        assert plan.vmem <= plan.chip.planned
    monkeypatch.setattr(tpu_plan, "chip", lambda: Chip(64 * 2**20, 2, 128, 166))
    narrow = tpu_plan.plan(8192, of((32, 192, 256)), weights, 2, True, kept=True)
    assert (narrow.rows, narrow.lent) == (128, False)  # dx has no place for the blocks of dy
    assert narrow._replace(rows=256, lent=True).vmem <= narrow.chip.planned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2048 by 8", "8192 by 8"])
def test_what_is_kept_crosses_memory_once_each_way(name):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    case = next(c for c in cases.CASES if c.name == name)
    with on_target("v5p"):
        rows = traffic(cases.backward, *case.args["backward"])
    for row in rows:
        right = case.hbm_bytes_of("backward", row.kernel)
        if "bwd" in row.kernel:  # in float32, of each of two cores
            right += (2 * 4 - 2) * case.flops["forward"] / (2 * 8192)
        assert row.moved == pytest.approx(right, rel=0.02), row.kernel
    assert len(rows) == (2 if name == "2048 by 8" else 4)


@pytest.mark.slow
def test_x_is_read_and_y_written_once():
    """By the windows of the grid, where the weights, which the kernels copy themselves, are one."""
    case = next(c for c in cases.CASES if c.name == "4096 by 16")
    (forward,) = traffic(cases.forward, *case.args["forward"])
    (backward,) = traffic(lambda *a: tpu.backward(*a, None), *case.args["backward"])
    plan = tpu_plan.plan(8192, *case.args["forward"][1:], 2, False)
    array, weights = 2 * 8192 * 4096, 2 * plan.weights
    assert (forward.read, forward.written) == (array + weights, array)
    assert (backward.read - weights, backward.written) == (2 * array, array + 4 * weights)
    moved = 2 * array + plan.cores * weights
    assert moved == pytest.approx(case.hbm_bytes["forward"], rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "M", "dtype", "reason"),
    [
        ((4, 64, 128, 4, 128, 128), 128, jnp.float32, "p = 64 of the blocks is no multiple of 128"),
        ((3, 128, 128, 3, 128, 128), 128, jnp.float32, "left has 3 blocks, no power of two"),
        ((4, 128, 128, 4, 128, 128), 127, jnp.float32, "M = 127 rows, fewer than 128"),
        ((4, 128, 128, 4, 128, 128), 128, jnp.float16, "dtype float16"),
        ((2, 4096, 4096, 2, 4096, 4096), 128, jnp.bfloat16, "MiB on chip"),
        ((4, 128, 128, 4, 128, 128), 128, jnp.bfloat16, None),
    ],
)
def test_unsupported_says_why(sizes, M, dtype, reason):
    K, p, q, L, r, s = sizes
    x, right, left = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((M, K * p), (K, p, q), (L, r, s))
    )
    found = tpu.unsupported(x, right, left, True)
    assert found is None if reason is None else reason in found


def test_on_a_tpu_the_kernels_are_in_the_program_and_a_fallback_is_said(recwarn):
    for sizes, inside in (((2, 128, 128, 2, 128, 128), True), ((2, 64, 64, 2, 64, 64), False)):
        x, right, left, _, dy = make(sizes, (128,))
        for fn, args in ((cases.forward, ()), (cases.backward, (dy,))):
            lowered = jax.jit(fn).trace(x, right, left, *args).lower(lowering_platforms=("tpu",))
            assert ("tpu_custom_call" in lowered.as_text()) == inside
    said = [str(w.message) for w in recwarn if "monarch_matmul" in str(w.message)]
    assert len(said) == 1 and "not the tpu kernel but blockwise: p = 64 of the blocks" in said[0]
    with pytest.raises(ValueError, match="needs a TPU; accepted elsewhere: None"):
        monarch_matmul(*make((2, 128, 128, 2, 128, 128), (128,))[:3], implementation="tpu")


def test_mosaic_has_two_precisions_of_float32_and_is_asked_for_one_of_them():
    x, right, left, _, dy = make((2, 128, 128, 2, 128, 128), (128,))
    how = functools.partial(run, precision="high", implementation="tpu")
    program = jax.jit(lambda *arrays: how(*arrays[:3], dy=arrays[3])).trace(x, right, left, dy)
    assert "tpu_custom_call" in program.lower(lowering_platforms=("tpu",)).as_text()


def test_loops_of_products_that_are_longer_than_a_turn(monkeypatch):
    monkeypatch.setattr(tpu_plan, "STRAIGHT_FLOPS", 0)
    plan, widths = tpu_plan.Plan(512, 2, 8192, 256, 2, 256, 128, 512, 4, False), []
    jax.make_jaxpr(lambda: over(plan, 2, 8192, 256, lambda *at: widths.append(at[2])))()
    assert widths == [128]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_without_memory_beside_its_arrays(target):
    """So z is nowhere but on the chip; the backward pass has the factors' sums by core.

    On a v5p the program of both passes keeps z between them, and y, which here nobody reads.
    """
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    case = next(c for c in cases.CASES if c.name == "2048 by 8")
    for role, program in case.kernels.items():
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.args[role]
        )
        with on_device(device):
            lowered = jax.jit(program.fn).trace(*args).lower(lowering_platforms=("tpu",))
        weights = case.args[role][1].size + case.args[role][2].size
        kept = 2 * 2 * 8192 * 2048 if role == "backward" and "v5p" in target else 0
        sums = 2 * 4 * weights if role == "backward" else 0
        used = lowered.compile().memory_analysis().temp_size_in_bytes
        assert kept <= used < kept + sums + 2**20, role


# ---- layout, wrong input


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_one(kind):
    x, right, left, bias, dy = make(SQUARE, (8, 3))
    mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(kind, kind))
    layout = NamedSharding(mesh, P("data", None, None))

    def both(x, dy, **how):
        y, pull = jax.vjp(lambda *a: monarch_matmul(*a, bias=bias, **how), x, right, left)
        return y, *pull(dy)

    expected = both(x, dy)
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, dy), layout)
        how = {"sharding": layout} if kind == AxisType.Auto else {}
        found = jax.jit(functools.partial(both, **how))(*placed)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)
    if kind == AxisType.Auto:
        for spec, words in (
            (P(None, "data"), r"must divide x \[8, 3, 16\]; mesh axes data have size 4"),
            (P(None, None, None, None), "of x's 3 axes or None"),
        ):
            with pytest.raises(ValueError, match=words):
                both(x, dy, sharding=NamedSharding(mesh, spec))


def bad(**changes):
    x, right, left, _, _ = make(SQUARE)
    return {"x": x, "right": right, "left": left, **changes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(x=jnp.zeros((2, 12))), r"x must be \[..., 16\], K p of right"),
        (bad(x=jnp.zeros((2, 16), int)), "x must be of dtype float32, bfloat16"),
        (bad(right=jnp.zeros((4, 4))), r"right must be an array \[K, p, q\]"),
        (bad(left=jnp.zeros((4, 5, 4))), r"left must be \[L, r, s\] with L r = 16, K q of right"),
        (bad(left=jnp.zeros((4, 4, 4), jnp.bfloat16)), "left must be of x's dtype float32"),
        (bad(bias=jnp.zeros(4)), r"bias must be \[16\] or None, got \[4\]"),
        (bad(activation="tanh"), "activation must be one of 'gelu', 'relu', 'silu', None"),
        (bad(implementation="cuda"), "implementation must be one of None, 'reference'"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=f"monarch_matmul: {words}"):
        monarch_matmul(**arguments)
