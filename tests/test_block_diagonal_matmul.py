"""block_diagonal_matmul against explicit matrices in float64: every implementation, TPU kernels.

The kernels run in Pallas' TPU interpreter with race detection and memory that starts as NaN.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from races import no_races

from pallas_kernels.block_diagonal_matmul import (
    Permutation,
    Stride,
    block_diagonal_matmul,
    blockwise,
    cases,
    tpu,
    tpu_plan,
)
from pallas_kernels.block_diagonal_matmul.layout import layout
from pallas_kernels.compat import on_device
from pallas_kernels.lab import traffic
from pallas_kernels.tpu_chip import Chip

NAMES = ("x", "blocks", "bias")


def make(K, p, q, lead=(7,), dtype=jnp.float32, bias=False, seed=0):
    """The arrays by name, and dy, of about unit variance but for the blocks."""
    random = np.random.default_rng(seed)
    arrays = {"x": random.normal(size=(*lead, K * p)), "blocks": random.normal(size=(K, p, q))}
    arrays["blocks"] *= p**-0.5
    if bias:
        arrays["bias"] = random.normal(size=K * q)
    dy = random.normal(size=(*lead, K * q))
    return {n: jnp.asarray(a, dtype) for n, a in arrays.items()}, jnp.asarray(dy, dtype)


def matrix_of(permutation, features):
    """v @ it is the permuted v, by the definitions in the docstrings of the two."""
    found = np.eye(features)
    if isinstance(permutation, Stride):
        found = np.zeros((features, features))
        for feature in range(features):
            i, line = divmod(feature, permutation.count)
            found[feature, line * (features // permutation.count) + i] = 1
    elif permutation is not None:
        found = found[:, np.frombuffer(permutation.packed, np.int32)]
    return found


def gelu(h):
    t = np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * h**2)
    return h * (1 + t) / 2, (1 + t) / 2 + h * (1 - t**2) * slope / 2


def silu(h):
    s = 1 / (1 + np.exp(-h))
    return h * s, s + h * s * (1 - s)


ACTIVATIONS = {
    None: lambda h: (h, np.ones_like(h)),
    "relu": lambda h: (np.maximum(h, 0), (h > 0) * 1.0),
    "gelu": gelu,
    "silu": silu,
}


def expected(arrays, dy, permute_inputs=None, permute_outputs=None, activation=None):
    """y and the gradients of sum(y * dy), by name, by dense matrices in float64."""
    a = {n: np.asarray(v, np.float64) for n, v in arrays.items()}
    K, p, q = a["blocks"].shape
    before, behind = matrix_of(permute_inputs, K * p), matrix_of(permute_outputs, K * q)
    x, diagonal = a["x"].reshape(-1, K * p), scipy.linalg.block_diag(*a["blocks"])
    h = x @ before @ diagonal @ behind + a.get("bias", 0.0)
    y, slope = ACTIVATIONS[activation](h)
    dh = np.asarray(dy, np.float64).reshape(h.shape) * slope
    whole = (x @ before).T @ (dh @ behind.T)
    blocks = np.stack([whole[k * p : (k + 1) * p, k * q : (k + 1) * q] for k in range(K)])
    dx = dh @ behind.T @ diagonal.T @ before.T
    return y, {n: v for n, v in (("x", dx), ("blocks", blocks), ("bias", dh.sum(0))) if n in a}


def run(arrays, dy, **how):
    """y and the gradients by name."""

    def compute(arrays):
        x, blocks, bias = (arrays.get(n) for n in NAMES)
        return block_diagonal_matmul(x, blocks, bias=bias, **how)

    @jax.jit
    def both(arrays, dy):
        y, pull = jax.vjp(compute, arrays)
        return y, pull(dy)[0]

    return both(arrays, dy)


def compare(found, right, bound):
    """Each array within `bound` of its greatest element."""
    pairs = {"y": (found[0], right[0]), **{n: (found[1][n], right[1][n]) for n in right[1]}}
    for name, (a, b) in pairs.items():
        a = np.asarray(a, np.float64).reshape(b.shape)
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= bound * np.abs(b).max(), name


def shuffled(features, seed=5):
    return Permutation(np.random.default_rng(seed).permutation(features))


VARIANTS = {
    "plain": (4, 3, 5, {}),
    "strides": (4, 6, 2, {"permute_inputs": Stride(4), "permute_outputs": Stride(2)}),
    "other_strides": (6, 2, 4, {"permute_inputs": Stride(3), "permute_outputs": Stride(12)}),
    "any": (3, 4, 4, {"permute_inputs": shuffled(12), "permute_outputs": shuffled(12, 6)}),
    "gelu": (2, 3, 4, {"activation": "gelu", "permute_outputs": Stride(4)}),
    "relu": (2, 3, 4, {"activation": "relu", "permute_outputs": shuffled(8)}),
    "silu": (2, 3, 4, {"activation": "silu", "permute_inputs": Stride(2)}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_equals_explicit_matrices(implementation, name):
    K, p, q, how = VARIANTS[name]
    arrays, dy = make(K, p, q, (2, 3), bias=name != "plain")
    found = run(arrays, dy, implementation=implementation, **how)
    assert found[0].shape == dy.shape
    compare(found, expected(arrays, dy, **how), 1e-6)


@settings(max_examples=10, deadline=None)
@given(
    sizes=strategies.tuples(*[strategies.integers(1, 4)] * 3),
    kinds=strategies.tuples(*[strategies.sampled_from(["none", "stride", "any"])] * 2),
    dtype=strategies.sampled_from(["float32", "bfloat16", "float16"]),
    platform=strategies.sampled_from(["cpu", "accelerator"]),
    seed=strategies.integers(0, 99),
)
def test_any_sizes_and_permutations(sizes, kinds, dtype, platform, seed):
    """The XLA forms of both platforms; sums are those of the arrays as they were rounded."""
    K, p, q = sizes
    arrays, dy = make(K, p, q, (3,), jnp.dtype(dtype), seed=seed)
    permutations = [
        {"none": None, "stride": Stride(K if side else size), "any": shuffled(K * size, seed)}[kind]
        for side, (kind, size) in enumerate(zip(kinds, (p, q), strict=True))
    ]
    x, blocks = arrays["x"], arrays["blocks"]

    @jax.jit
    def both(x, blocks, dy):
        how = *permutations, None, None, platform
        y = blockwise.forward(x, blocks, None, *how)
        return y, *blockwise.backward(x, blocks, None, dy, *how)[:2]

    y, dx, dblocks = both(x, blocks, dy)
    assert (y.dtype, dx.dtype, dblocks.dtype) == (x.dtype, x.dtype, jnp.float32)
    unit = float(jnp.finfo(dtype).eps)
    right = expected(arrays, dy, *permutations)
    compare((y, {"x": dx}), (right[0], {"x": right[1]["x"]}), 2 * unit)
    compare((dblocks, {}), (right[1]["blocks"], {}), 1e-6)


def test_leading_axes_and_float64():
    arrays, _ = make(2, 3, 4, (2, 3))
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(a), jnp.float64) for n, a in arrays.items()}
        dy = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)))
        how = {"permute_inputs": Stride(2), "activation": "gelu"}
        found = run(wide, dy, **how)
        assert found[0].dtype == jnp.float64 and found[0].shape == (2, 3, 8)
        compare(found, expected(wide, dy, **how), 1e-14)


def test_strides_are_those_of_monarch():
    """A Monarch product is two of these, and each stride undoes its counterpart."""
    from pallas_kernels.monarch_matmul import monarch_matmul

    arrays, _ = make(2, 3, 6)
    left = make(4, 3, 5)[0]["blocks"]
    z = block_diagonal_matmul(arrays["x"], arrays["blocks"])
    y = block_diagonal_matmul(z, left, permute_inputs=Stride(4), permute_outputs=Stride(5))
    np.testing.assert_allclose(y, monarch_matmul(arrays["x"], arrays["blocks"], left), atol=1e-6)
    np.testing.assert_array_equal(Stride(5).permute(Stride(4).permute(jnp.arange(20))), range(20))
    np.testing.assert_array_equal(Stride(4).restore(Stride(4).permute(jnp.arange(20))), range(20))


# ---- the TPU kernels

IN_BLOCKS = Permutation(
    np.concatenate([k * 128 + np.random.default_rng(k).permutation(128) for k in (2, 0, 3, 1)])
)
TILES = Permutation(np.arange(512).reshape(4, 128)[[3, 0, 2, 1]].reshape(-1))
FOLDED = {
    "none": (4, 128, None),
    "blocks_move_and_are_shuffled_within": (4, 128, IN_BLOCKS),
    "tiles_move": (2, 256, TILES),
    "stride": (4, 128, Stride(4)),
    "stride_of_fewer_than_blocks": (4, 128, Stride(2)),
    "stride_by_tiles": (2, 512, Stride(256)),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("outputs", [False, True])
def test_layouts_are_the_permutations(name, outputs):
    """Lanes that the layout names hold, for each block, its features in the layout's order."""
    K, p, permutation = FOLDED[name]
    if outputs and isinstance(permutation, Stride):  # the way back
        permutation = Stride(K * p // permutation.count)
    found = layout(permutation, K, p, outputs)
    features = np.arange(K * p)
    matrix = matrix_of(permutation, K * p)
    blocks = (features @ (matrix.T if outputs else matrix)).astype(int).reshape(K, p)
    if found.tiles is not None:
        lanes = np.array(found.tiles)[:, :, None] * 128 + np.arange(128)
    else:  # interleave.collect by its definition, windows of L p features
        L, lane = found.interleaved, np.arange(128)
        t, j = np.arange(L)[:, None], lane[: 128 // L]
        lanes = np.empty((K, p // 128, 128), int)
        for i in range(L):
            for window in range(K // L):
                for group in range(p // 128):
                    first = (window * (p // 128) + group) * L * 128
                    at = lanes[i * (K // L) + window, group]
                    at[(j * L + i + t) % 128] = first + t * 128 + j * L + i
    order = np.arange(p)[None].repeat(K, 0) if found.order is None else found.order
    np.testing.assert_array_equal(lanes.reshape(K, p), np.take_along_axis(blocks, order, 1))


def interpreted(arrays, dy, permute_inputs=None, permute_outputs=None, activation=None):
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )  # fmt: skip
    x, blocks, bias = (arrays.get(n) for n in NAMES)
    for backward in (False, True):
        reason = tpu.unsupported(x, blocks, permute_inputs, permute_outputs, activation, backward)
        assert reason is None
    how = permute_inputs, permute_outputs, activation, jax.lax.Precision.HIGHEST, params
    with no_races():
        y = tpu.forward(x, blocks, bias, *how)
        gradients = tpu.backward(x, blocks, bias, dy, *how)
    assert gradients[1].dtype == jnp.float32
    return y, dict(zip(NAMES, gradients, strict=True))


KERNELS = {
    "small": (
        (2, 128, 128), 130, jnp.bfloat16,
        {"permute_inputs": Stride(2), "permute_outputs": Stride(128), "activation": "gelu"},
    ),
    "strides_bfloat16": (
        (4, 128, 256), 200, jnp.bfloat16,
        {"permute_inputs": Stride(4), "permute_outputs": Stride(256), "activation": "gelu"},
    ),
    "strides_float32": (
        (4, 256, 128), 130, jnp.float32,
        {"permute_inputs": Stride(2), "permute_outputs": Stride(128)},
    ),
    "tiles": ((4, 128, 128), 128, jnp.float32, {"permute_inputs": IN_BLOCKS, "activation": "silu"}),
    "tiles_outputs": (
        (2, 128, 256), 256, jnp.bfloat16,
        {"permute_outputs": TILES, "activation": "relu"},
    ),
    "wide": ((2, 128, 640), 512, jnp.bfloat16, {}),
    "chunks": ((2, 128, 128), 600, jnp.bfloat16, {"permute_inputs": Stride(2)}),
}  # fmt: skip


def check_kernel(name):
    sizes, M, dtype, how = KERNELS[name]
    arrays, dy = make(*sizes, (M,), dtype, bias="activation" in how)
    right = expected(arrays, dy, **how)
    found = interpreted(arrays, dy, **how)
    single = dtype == jnp.float32
    # In bfloat16 dy is rounded once more after the activation's slope: two roundings of each term.
    compare(found, right, 2e-6 if single else 2**-7)
    if "activation" not in how:
        weights = {"blocks": right[1]["blocks"]}
        compare((found[0], {"blocks": found[1]["blocks"]}), (right[0], weights), 2**-8)
        compare((found[1]["blocks"], {}), (weights["blocks"], {}), 2e-6)


def test_kernels():
    check_kernel("small")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "small"])
def test_kernel_numbers(name):
    check_kernel(name)


def test_groups_of_blocks_and_shares_of_rows(monkeypatch):
    """Blocks that are not in a step together, and rows shared by two cores."""
    monkeypatch.setattr(tpu_plan, "ROWS", (128,))
    monkeypatch.setattr(tpu_plan, "STEP_BUNDLES", 0)
    arrays, dy = make(3, 128, 128, (256,))
    plan = tpu._plan(arrays["x"], arrays["blocks"], None, None, None, True)
    assert (plan.each, plan.groups, plan.shares) == (1, 3, 2)
    compare(interpreted(arrays, dy), expected(arrays, dy), 2e-6)


@pytest.mark.parametrize(("chip", "rows"), [(Chip(), 128), (Chip(128 * 2**20, 1, 256, 560), 512)])
def test_a_step_has_as_many_rows_as_a_matrix_unit_is_deep(chip, rows, monkeypatch):
    monkeypatch.setattr(tpu_plan, "chip", lambda: chip)
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, blocks = of((8192, 4096)), of((4, 1024, 1024))
    assert tpu._plan(x, blocks, Stride(4), Stride(1024), None, True).rows == rows


STRIDES = "4096 by 16 inputs Stride(count=16) outputs Stride(count=256)"


def kernel_dots(jaxpr, times=None):
    """FLOPs of the dot products inside TPU kernels, by the kernels' grids."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and times is not None:
            (contract, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += times * 2 * math.prod(out) * math.prod(left[a] for a in contract)
        mapping = eqn.params.get("grid_mapping")
        inside = None if mapping is None else math.prod(mapping.grid)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += kernel_dots(inner, inside if times is None else times)
    return total


@pytest.mark.parametrize(
    "name",
    ["4096 by 16", "8192 by 4", "1024 to 4096 by 8", pytest.param(STRIDES, marks=pytest.mark.slow)],
)
def test_bytes_and_flops_are_those_of_the_formula(name):
    case = next(c for c in cases.CASES if c.name == name)
    for role, fn in case.kernels.items():
        args = case.args_of(role)
        (*_, row) = traffic(fn, *args)  # a backward pass is traced behind a forward one
        assert row.moved == pytest.approx(case.hbm_bytes_of(role, row.kernel), rel=0.05)
        direction = tpu.forward if role == "forward" else tpu.backward
        x, blocks, *dy = args
        call = lambda *a: direction(*a[:2], None, *a[2:], None, None, None, None)  # noqa: B023, E731
        traced = jax.make_jaxpr(call)(x, blocks, *dy)
        assert kernel_dots(traced.jaxpr) == case.flops_of(role, row.kernel)


@pytest.mark.parametrize(
    ("sizes", "M", "dtype", "how", "reason"),
    [
        ((4, 64, 128), 128, jnp.float32, {}, "p = 64 of the blocks is no multiple of 128"),
        ((4, 128, 192), 128, jnp.float32, {}, "q = 192 of the blocks is no multiple of 128"),
        ((4, 128, 128), 127, jnp.float32, {}, "M = 127 rows, fewer than 128"),
        ((4, 128, 128), 128, jnp.float16, {}, "dtype float16"),
        ((1, 4096, 4096), 128, jnp.bfloat16, {}, r"it would hold \d+ of 61 MiB on chip"),
        (
            (3, 128, 128), 128, jnp.float32, {"permute_inputs": Stride(3)},
            r"permute_inputs Stride\(count=3\) moves between blocks neither tiles of 128",
        ),
        (
            (2, 128, 128), 128, jnp.float32, {"permute_outputs": shuffled(256)},
            r"permute_outputs Permutation\(\[.* moves between blocks",
        ),
    ],
)  # fmt: skip
def test_by_name_what_the_kernel_cannot_do_is_refused(sizes, M, dtype, how, reason):
    (K, p, q), zeros = sizes, functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    call = functools.partial(block_diagonal_matmul, implementation="tpu", **how)
    pull = lambda x, blocks: jax.grad(lambda x: call(x, blocks).astype(jnp.float32).sum())(x)  # noqa: E731
    with pytest.raises(ValueError, match=f"implementation='tpu' cannot do this: {reason}"):
        jax.eval_shape(pull, zeros((M, K * p)), zeros((K, p, q)))


def test_on_a_tpu_the_kernels_are_in_the_program_and_a_fallback_is_said(recwarn):
    for size, inside in ((128, 2), (64, 0)):
        arrays, dy = make(2, size, size, (128,), bias=True)
        how = {"permute_inputs": Stride(2), "permute_outputs": Stride(size), "activation": "gelu"}
        program = jax.jit(lambda arrays, dy, how=how: run(arrays, dy, **how)).trace(arrays, dy)
        text = program.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == inside
    said = [str(w.message) for w in recwarn if "block_diagonal_matmul" in str(w.message)]
    assert said == [
        "block_diagonal_matmul: not the tpu kernel but blockwise: p = 64 of the blocks is no "
        "multiple of 128"
    ]
    arrays, _ = make(2, 128, 128, (128,))
    with pytest.raises(ValueError, match="needs a TPU; accepted elsewhere: None"):
        block_diagonal_matmul(arrays["x"], arrays["blocks"], implementation="tpu")


def compile_cases(target, names):
    """The programs hold one kernel each and, but for weights in another order, no other arrays."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for case in cases.CASES:
        if case.name not in names:
            continue
        for role, program in case.kernels.items():
            args = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.args_of(role)
            )
            fn = getattr(program, "fn", program)
            with on_device(device):
                lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
            compiled = lowered.compile()
            assert compiled.as_text().count("tpu_custom_call") == 1, (case.name, role)
            weights = 4 * args[1].size
            beside = compiled.memory_analysis().temp_size_in_bytes
            assert beside <= 4 * weights + 2**20, (case.name, role)


def test_compiles():
    compile_cases("v5e:2x2", ["1024 by 4"])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "target"), enumerate(["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]))
def test_cases_compile(first, target):
    """Every second case for one of the chips; the laboratory compiles each for all of them."""
    names = [case.name for case in cases.CASES if target[:3] in case.targets]
    compile_cases(target, names[first::6])


# ---- layout, wrong input


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_one(kind):
    how = {"permute_inputs": Stride(4), "permute_outputs": Stride(5), "activation": "gelu"}
    arrays, dy = make(4, 3, 5, (8, 2), bias=True)
    right = run(arrays, dy, **how)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    placement = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        placed = arrays | {"x": jax.device_put(arrays["x"], placement)}
        more = {"sharding": placement} if kind == AxisType.Auto else {}
        found = jax.jit(functools.partial(run, **how, **more))(
            placed, jax.device_put(dy, placement)
        )
    assert {s.data.shape for s in found[0].addressable_shards} == {(1, 2, 20)}
    compare(found, (np.asarray(right[0]), {n: np.asarray(a) for n, a in right[1].items()}), 1e-6)
    with pytest.raises(ValueError, match="must leave the last axis of x whole"):
        run(arrays, dy, sharding=NamedSharding(mesh, P(None, None, "data")))


def bad(**changes):
    return make(4, 3, 5, bias=True)[0] | changes


zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(x=None), r"x must be an array \[..., K p\] .* NoneType"),
        (bad(x=zeros((2, 11))), r"x must be \[..., 12\], K p of blocks \[4, 3, 5\]; got \[2, 11\]"),
        (bad(x=jnp.zeros((2, 12), int)), "x must be of dtype float32, bfloat16"),
        (bad(blocks=zeros((12, 5))), r"blocks must be an array \[K, p, q\]"),
        (bad(blocks=zeros((4, 3, 5)).astype("bfloat16")), "blocks must be of x's dtype float32"),
        (bad(bias=zeros(5)), r"bias must be \[20\] or None, got \[5\]"),
        (bad(permute_inputs=4), r"permute_inputs must be Stride\(count\), .*; got int"),
        (bad(permute_inputs=Stride(5)), "permute_inputs must be a count that divides 12 features"),
        (bad(permute_outputs=shuffled(12)), "permute_outputs must be an order of 20 features"),
        (bad(activation="tanh"), "activation must be one of 'gelu', 'relu', 'silu', None"),
        (bad(implementation="cuda"), "implementation must be one of None, 'reference'"),
        (bad(sharding="data"), "sharding must be NamedSharding"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        block_diagonal_matmul(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", [[0, 0], [0.0, 1.0], [[0, 1]], [], [1, 2]])
def test_permutations_are_permutations(order):
    with pytest.raises(
        ValueError, match="Permutation: order must be the integers below its length"
    ):
        Permutation(order)
    assert Permutation([1, 0]) == Permutation(np.array([1, 0], np.int64)) != Permutation([0, 1])
    assert hash(Permutation([1, 0])) == hash(Permutation((1, 0)))
