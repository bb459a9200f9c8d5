"""block_sparse_matmul: every implementation against NumPy in float64, the TPU kernels' compiler.

The kernels run in Pallas' TPU interpreter with race detection and memory that starts as NaN.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from races import no_races

from pallas_kernels.block_sparse_matmul import (
    BlockMask,
    block_sparse_matmul,
    blockwise,
    cases,
    tpu,
    tpu_plan,
)
from pallas_kernels.block_sparse_matmul.mask import flat_butterfly
from pallas_kernels.block_sparse_matmul.settings import Settings
from pallas_kernels.compat import on_device
from pallas_kernels.lab import traffic
from pallas_kernels.tpu_chip import Chip

NAMES = ("x", "blocks", "u", "v", "gamma", "bias")
# Rows without a block, columns without one, columns of many degrees.
RAGGED = BlockMask(np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]], bool))


def make(mask, bi, bo, M=6, rank=0, gamma=True, bias=False, dtype=np.float32, seed=0):
    """The arrays by name, of unit variance but for outputs, which have about that too."""
    rng = np.random.default_rng(seed)
    (rows, columns), gain = mask.shape, (bi * mask.shape[0]) ** -0.5
    shapes = {"x": (M, rows * bi), "blocks": (mask.count, bi, bo)}
    if rank:
        shapes |= {"u": (rows * bi, rank), "v": (rank, columns * bo)}
    if bias:
        shapes["bias"] = (columns * bo,)
    scale = {"x": 1.0, "v": rank**-0.5 if rank else 1.0, "bias": 1.0}
    made = {n: scale.get(n, gain) * rng.normal(size=s) for n, s in shapes.items()}
    arrays = {n: jnp.asarray(a, dtype) for n, a in made.items()}
    if rank and gamma:
        arrays["gamma"] = jnp.asarray(0.3, jnp.float32)
    return arrays


def dense(blocks, mask):
    """B in float64, a block at a time in row-major order."""
    _, bi, bo = blocks.shape
    b = np.zeros((mask.shape[0] * bi, mask.shape[1] * bo))
    places = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask.live[i, j]]
    for (i, j), block in zip(places, np.asarray(blocks, np.float64), strict=True):
        b[i * bi : (i + 1) * bi, j * bo : (j + 1) * bo] = block
    return b


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


def expected(arrays, mask, activation, weight):
    """y and the gradients of sum(y * weight), by name, in float64 and written out."""
    a = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
    b, x = dense(arrays["blocks"], mask), a["x"]
    keep = a.get("gamma", 1.0)
    low = 1 - keep if "gamma" in a else 1.0
    h = keep * x @ b + a.get("bias", 0.0)
    if "u" in a:
        h = h + low * (x @ a["u"]) @ a["v"]
    y, slope = ACTIVATIONS[activation](h)
    dy = slope * weight
    db = keep * x.T @ dy
    bi, bo = arrays["blocks"].shape[1:]
    cut = db.reshape(mask.shape[0], bi, mask.shape[1], bo).swapaxes(1, 2)
    found = {"x": keep * dy @ b.T, "blocks": cut[mask.live], "bias": dy.sum(0)}
    if "u" in a:
        found["x"] = found["x"] + low * dy @ a["v"].T @ a["u"].T
        found["u"], found["v"] = low * x.T @ (dy @ a["v"].T), low * (x @ a["u"]).T @ dy
        found["gamma"] = np.sum(dy * (x @ b - x @ a["u"] @ a["v"]))
    return y, {n: found[n] for n in arrays}


def run(arrays, mask, implementation, weight, **how):
    """y and the gradients of sum(y * weight), by name."""

    def value(arrays):
        x, blocks, *rest = (arrays.get(n) for n in NAMES)
        low = dict(zip(NAMES[2:], rest, strict=True))
        y = block_sparse_matmul(x, blocks, mask=mask, implementation=implementation, **low, **how)
        return jnp.sum(y * weight.astype(y.dtype), dtype=jnp.float32), y

    gradients, y = jax.jit(jax.grad(value, has_aux=True))(arrays)
    return y, gradients


def compare(found, right, bound):
    for name in right[1]:
        exact = right[1][name]
        size = bound * max(1.0, np.abs(exact).max())
        value = np.asarray(found[1][name], np.float64)
        np.testing.assert_allclose(value, exact, rtol=0, atol=size, err_msg=name)
    size = bound * max(1.0, np.abs(right[0]).max())
    np.testing.assert_allclose(np.asarray(found[0], np.float64), right[0], rtol=0, atol=size)


def weight_of(mask, bo, M, seed=9):
    return np.random.default_rng(seed).normal(size=(M, mask.shape[1] * bo))


VARIANTS = {
    "plain": ({}, None),
    "low_rank": ({"rank": 5, "bias": True}, "gelu"),
    "plain_sum": ({"rank": 2, "gamma": False}, "silu"),
    "bias": ({"bias": True}, "relu"),
}


# Of the XLA form on a CPU: (UNROLL, WRITTEN_OUT).
WAYS = {"straight": (10**9, 10**9), "loop": (-1, 10**9), "written out": (-1, -1.0)}


def go(monkeypatch, way):
    for name, value in zip(("UNROLL", "WRITTEN_OUT"), WAYS[way], strict=True):
        monkeypatch.setattr(blockwise, name, value)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("way", "M"),
    [
        ("reference", 6),
        ("straight", 6),
        ("loop", 6),
        ("loop", 2 * blockwise.CHUNK),
        ("written out", 6),
    ],
)
def test_equals_numpy(way, M, name, monkeypatch):
    if way in WAYS:
        go(monkeypatch, way)
    implementation = None if way in WAYS else way
    given, activation = VARIANTS[name]
    arrays, weight = make(RAGGED, 4, 8, M, **given), weight_of(RAGGED, 8, M)
    jax.clear_caches()
    found = run(arrays, RAGGED, implementation, jnp.asarray(weight), activation=activation)
    compare(found, expected(arrays, RAGGED, activation, weight), 3e-6)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    shape=strategies.tuples(strategies.integers(1, 5), strategies.integers(1, 5)),
    block=strategies.sampled_from([(2, 3), (4, 4), (1, 5)]),
    density=strategies.sampled_from([0.0, 0.3, 1.0]),
    way=strategies.sampled_from([*WAYS, "accelerator"]),
    seed=strategies.integers(0, 99),
)
def test_any_mask(shape, block, density, way, seed):
    """All XLA forms; where a column has no block the output is zero, exactly."""
    platform = "cpu" if way in WAYS else way
    mask = BlockMask(np.random.default_rng(seed).random(shape) < density)
    arrays, weight = make(mask, *block, seed=seed), weight_of(mask, block[1], 6)
    with pytest.MonkeyPatch.context() as patch:
        if way in WAYS:
            go(patch, way)
        y, _, _ = blockwise.forward(
            arrays["x"], arrays["blocks"], None, None, None, None, Settings(mask), save=False,
            platform=platform,
        )  # fmt: skip
        dx, d_blocks, *_ = blockwise.backward(
            arrays["x"], jnp.asarray(weight, jnp.float32), None, arrays["blocks"], None, None,
            None, False, Settings(mask), platform=platform,
        )  # fmt: skip
    right, gradients = expected(arrays, mask, None, weight)
    np.testing.assert_allclose(y, right, atol=1e-5)
    empty = np.repeat(~mask.live.any(0), block[1])
    assert not np.any(np.asarray(y)[:, empty])
    np.testing.assert_allclose(dx, gradients["x"], atol=1e-5)
    np.testing.assert_allclose(d_blocks, gradients["blocks"], atol=1e-5)


def test_leading_axes_and_float64():
    arrays = make(RAGGED, 4, 8, rank=3, bias=True)
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(np.asarray(a), jnp.float64) for n, a in arrays.items()}
        weight = weight_of(RAGGED, 8, 6)
        found = run(wide, RAGGED, None, jnp.asarray(weight), activation="gelu")
        assert found[0].dtype == jnp.float64
        compare(found, expected(wide, RAGGED, "gelu", weight), 1e-13)
    x = arrays["x"].reshape(2, 3, 12)
    y = block_sparse_matmul(x, arrays["blocks"], mask=RAGGED)
    assert y.shape == (2, 3, 32)
    flat = block_sparse_matmul(arrays["x"], arrays["blocks"], mask=RAGGED)
    np.testing.assert_array_equal(y.reshape(6, 32), flat)


def naive(arrays, mask):
    """A dense product in bfloat16 of the dense matrix, the terms rounded one by one."""
    b = jnp.asarray(dense(arrays["blocks"], mask), jnp.bfloat16)
    gamma = arrays["gamma"].astype(jnp.bfloat16)
    low = (arrays["x"] @ arrays["u"]) @ arrays["v"]
    return gamma * (arrays["x"] @ b) + (1 - gamma) * low + arrays["bias"]


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "kernel"])
def test_bfloat16_error_is_at_most_twice_the_naive_one(implementation):
    kernel = implementation == "kernel"
    size = 128 if kernel else 16
    arrays = make(RAGGED, size, size, M=128, rank=16, bias=True, dtype=jnp.bfloat16)
    weight = weight_of(RAGGED, size, 128)
    right, gradients = expected(arrays, RAGGED, None, weight)
    if kernel:
        y = interpreted(arrays, RAGGED, None, weight)[0]
    else:
        y, found = run(arrays, RAGGED, implementation, jnp.asarray(weight))
        assert {n: found[n].dtype for n in found} == {n: arrays[n].dtype for n in found}
        for name in gradients:
            error = np.abs(np.asarray(found[name], np.float64) - gradients[name]).max()
            assert error < 2**-6 * np.abs(gradients[name]).max(), name
    assert y.dtype == jnp.bfloat16
    rms = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - right) ** 2))  # noqa: E731
    assert 0 < rms(y) <= 2 * rms(naive(arrays, RAGGED))


def dots(jaxpr):
    """FLOPs of all dot products outside kernels; of a choice by platform, those of the CPU's."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[a] for a in contract]))
        if eqn.primitive.name == "cond":
            here = [i for i, p in enumerate(eqn.params["branches_platforms"]) if p and "cpu" in p]
            total += dots(eqn.params["branches"][here[0]].jaxpr)
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += dots(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("rank", [0, 3])
def test_flops_are_those_of_live_blocks(rank):
    """Forward, and forward and backward: three products of each, and none of a dense matrix."""
    cases = (
        (RAGGED, 128, 160),
        (flat_butterfly(16, 8, 8, 2), 96, 128),
        (BlockMask(np.eye(70) > 0), 4, 6),
    )
    for mask, bi, bo in cases:
        arrays = make(mask, bi, bo, rank=rank)
        I, O = bi * mask.shape[0], bo * mask.shape[1]  # noqa: E741
        one = 2 * 6 * (bi * bo * mask.count + rank * (I + O))
        weight = jnp.asarray(weight_of(mask, bo, 6))
        x, blocks, u, v, gamma, _ = (arrays.get(n) for n in NAMES)
        forward = functools.partial(block_sparse_matmul, mask=mask, u=u, v=v, gamma=gamma)
        assert dots(jax.make_jaxpr(forward)(x, blocks).jaxpr) == one
        both = jax.make_jaxpr(lambda a, m=mask, w=weight: run(a, m, None, w))(arrays)
        # gamma's gradient takes the product of blocks and their gradient, and that of V and its.
        scalars = 2 * bi * bo * mask.count + 2 * O * rank if rank else 0
        assert dots(both.jaxpr) == 3 * one + scalars


# ---- the TPU kernels


def interpreted(arrays, mask, activation, weight):
    """y and raw gradients of the kernels for dy = weight, which are what `api` scales."""
    how = Settings(mask, activation, jax.lax.Precision.HIGHEST)
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )  # fmt: skip
    x, blocks, u, v, gamma, bias = (arrays.get(n) for n in NAMES)
    dy = jnp.asarray(weight, x.dtype)
    with no_races():
        y, before, z = tpu.forward(x, blocks, u, v, gamma, bias, how, save=True, interpret=params)
        raw = tpu.backward(
            x, dy, z, blocks, u, v, gamma, bias is not None, how, interpret=params
        )  # fmt: skip
    return y, raw, before


def check_kernels(mask, bi, bo, activation=None, bound=3e-5, **given):
    arrays = make(mask, bi, bo, **given)
    weight = weight_of(mask, bo, len(arrays["x"]))
    y, raw, before = interpreted(arrays, mask, activation, weight)
    right, _ = expected(arrays, mask, activation, weight)
    linear, gradients = expected(arrays, mask, None, weight)
    keep = float(arrays.get("gamma", 1.0))
    low = 1 - keep if "gamma" in arrays else 1.0
    scales = {"x": 1.0, "blocks": keep, "u": low, "v": low, "bias": 1.0}
    found = dict(zip(scales, raw, strict=True))
    found = {n: scales[n] * np.asarray(found[n]) for n in gradients if n != "gamma"}
    gradients = {n: gradients[n] for n in found}
    compare((y, found), (right, gradients), bound)
    if activation:
        np.testing.assert_allclose(before, linear, atol=bound * np.abs(linear).max())


def test_kernels_of_ragged_masks():
    """A tile of rows that is not full; neighbours that share rows and a column alone."""
    mask = BlockMask(np.array([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool))
    check_kernels(mask, 128, 128, "gelu", M=130, rank=5, bias=True)


KERNELS = {
    "plain": (flat_butterfly(8, 8, 8, 2), 128, 128, None, {"M": 24}),
    "stretched": (flat_butterfly(2, 8, 2, 1), 128, 128, "relu", {"rank": 3, "gamma": False}),
    "wide_blocks": (RAGGED, 128, 256, None, {"rank": 130}),
    "tall_blocks": (RAGGED, 256, 128, "silu", {"M": 200, "bias": True}),
    "dense_in_steps": (BlockMask(np.ones((3, 3), bool)), 128, 128, None, {"M": 500}),
    "bfloat16": (RAGGED, 128, 128, None, {"rank": 8, "dtype": jnp.bfloat16, "bound": 2e-2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_numbers(name, monkeypatch):
    if name.endswith("steps"):  # two on each of two cores
        monkeypatch.setattr(tpu_plan, "TILES", (128,))
    mask, bi, bo, activation, given = KERNELS[name]
    check_kernels(mask, bi, bo, activation, **given)


@pytest.mark.parametrize("name", ["n1024", "n4096_r128", "up_1024_4096_r128"])
def test_bytes_are_those_of_the_formula(name):
    """M (I + O) + n^2 d + r (I + O) entries, weights' gradients in float32, once for each core."""
    case = next(c for c in cases.CASES if c.name == name)
    for role, program in case.kernels.items():
        rows = traffic(program, *case.args_of(role))
        assert len(rows) == {"forward": 1, "backward": 2}[role]
        for row in rows:
            right = case.hbm_bytes_of(role, row.kernel)
            if row.kernel.endswith("_dw"):
                weights = [a for a in case.args_of(role)[3:6] if a is not None]
                right += (Chip().cores - 1) * 4 * sum(a.size for a in weights)
            assert row.moved == pytest.approx(right, rel=0.05), row


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bi": 64}, "blocks of 64 x 128; accepted: multiples of 128"),
        ({"dtype": jnp.float16}, "dtype float16"),
        ({"mask": BlockMask(np.zeros((2, 2), bool))}, "no live block"),
        ({"mask": BlockMask(np.ones((64, 32), bool))}, "2048 blocks of 128 x 128 and the tiles"),
    ],
)
def test_by_name_what_the_kernel_cannot_do_is_refused(change, reason):
    mask = change.get("mask", RAGGED)
    bi, dtype = change.get("bi", 128), change.get("dtype", jnp.float32)
    x = jnp.zeros((8, mask.shape[0] * bi), dtype)
    blocks = jnp.zeros((mask.count, bi, 128), dtype)
    with pytest.raises(ValueError, match=f"implementation='tpu' cannot do this: {reason}"):
        block_sparse_matmul(x, blocks, mask=mask, implementation="tpu")


def test_on_a_tpu_the_kernels_are_in_the_program_and_a_fallback_is_said(recwarn):
    for size, inside in ((128, 3), (64, 0)):
        arrays = make(RAGGED, size, size, rank=4, bias=True)
        weight = jnp.asarray(weight_of(RAGGED, size, 6))
        gradient = jax.jit(lambda a, w=weight: run(a, RAGGED, None, w)).trace(arrays)
        text = gradient.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == inside
    said = {str(w.message) for w in recwarn if "block_sparse_matmul" in str(w.message)}
    assert said == {
        "block_sparse_matmul: not the tpu kernel but blockwise: blocks of 64 x 64; accepted: "
        "multiples of 128"
    }
    arrays = make(RAGGED, 128, 128)
    with pytest.raises(ValueError, match="needs a TPU; accepted elsewhere: None"):
        block_sparse_matmul(arrays["x"], arrays["blocks"], mask=RAGGED, implementation="tpu")


def compile_cases(target, names):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for case in cases.CASES:
        if names is not None and case.name not in names:
            continue
        for role, program in case.kernels.items():
            args = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.args_of(role)
            )
            fn = getattr(program, "fn", program)
            with on_device(device):
                lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
            assert "tpu_custom_call" in lowered.compile().as_text(), case.name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles(target):
    """The largest case on the chip of the least memory for a core."""
    compile_cases(target, ("n1024", "n4096_r128", *(["n8192_r128"] if "v5p" in target else [])))


# ---- layout, wrong input


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_one(kind):
    arrays = make(RAGGED, 4, 8, M=16, rank=3, bias=True)
    arrays["x"] = arrays["x"].reshape(8, 2, 12)
    weight = jnp.asarray(weight_of(RAGGED, 8, 16), jnp.float32).reshape(8, 2, 32)
    right = run(arrays, RAGGED, None, weight)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    layout = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        placed = arrays | {"x": jax.device_put(arrays["x"], layout)}
        spread = jax.device_put(weight, layout)
        how = {"sharding": layout} if kind == AxisType.Auto else {}
        found = run(placed, RAGGED, None, spread, **how)
    compare(found, (np.asarray(right[0]), {n: np.asarray(a) for n, a in right[1].items()}), 1e-6)
    assert {s.data.shape for s in found[0].addressable_shards} == {(1, 2, 32)}
    with pytest.raises(ValueError, match="sharding must divide x"):
        run(arrays, RAGGED, None, weight, sharding=NamedSharding(mesh, P(None, "data")))


def bad(**changes):
    arrays = make(RAGGED, 4, 8, rank=3, bias=True)
    return {"mask": RAGGED} | arrays | changes


zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(x=None), r"x must be an array \[..., I\] .* NoneType"),
        (bad(x=jnp.zeros((2, 12), int)), "x must be of dtype float32, bfloat16"),
        (bad(mask=RAGGED.live), r"mask must be a BlockMask, got ndarray; BlockMask\(live\)"),
        (
            bad(x=zeros((2, 16))),
            r"mask must be \[I / bi, O / bo\] with I 16 and bi 4; got \[3, 4\]",
        ),
        (bad(blocks=zeros((4, 4, 8))), r"blocks must be \[5, bi, bo\], the live blocks"),
        (bad(blocks=zeros((5, 4, 8)).astype("bfloat16")), "blocks must be of x's dtype float32"),
        (bad(u=None), "u and v must be given together"),
        (bad(u=zeros((11, 3))), r"u must be \[12, r\], got \[11, 3\]"),
        (bad(v=zeros((4, 32))), r"v must be \[3, 32\], got \[4, 32\]"),
        (bad(gamma=0.5), r"gamma must be a floating array \[\] beside u and v, or None; got float"),
        (bad(bias=zeros((31,))), r"bias must be floating \[32\] or None, got \[31\]"),
        (bad(activation="tanh"), "activation must be one of 'gelu', 'relu', 'silu', None"),
        (
            bad(precision="float32"),
            "precision must be one of None, 'default', 'high', 'highest', or a jax.lax.Precision;"
            " got 'float32'",
        ),
        (bad(precision="a jax.lax.Precision"), "precision must be .* got 'a jax.lax.Precision'"),
        (bad(precision=("high", "high")), r"precision must be .* got \('high', 'high'\)"),
        (bad(implementation="cuda"), "implementation must be one of None, 'reference'"),
        (bad(sharding="data"), "sharding must be NamedSharding"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        block_sparse_matmul(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", [None, "default", "high", "highest", *jax.lax.Precision])
def test_every_documented_precision_is_that_of_the_products(precision):
    arrays = make(RAGGED, 4, 8)
    product = functools.partial(block_sparse_matmul, mask=RAGGED, precision=precision)
    text = str(jax.make_jaxpr(product)(arrays["x"], arrays["blocks"]))
    name = getattr(precision, "name", precision)
    found = set(re.findall(r"precision=\(Precision\.(\w+)", text))  # nothing is printed of None
    assert found == (set() if precision is None else {name.upper()})


@pytest.mark.parametrize("live", [np.ones((2, 2)), np.ones(3, bool), np.ones((0, 2), bool)])
def test_masks_are_boolean_matrices(live):
    with pytest.raises(ValueError, match="BlockMask: live must be a bool matrix"):
        BlockMask(live)


def test_masks_are_equal_by_value():
    mask = BlockMask(RAGGED.live.tolist())
    assert mask == RAGGED and hash(mask) == hash(RAGGED) and mask != BlockMask(RAGGED.live.T)
    assert (mask.count, mask.density) == (5, 5 / 12)
    assert mask.columns == (((0, 0), (2, 3)), (), ((0, 1),), ((0, 2), (2, 4)))
