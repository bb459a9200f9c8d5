"""butterfly_matmul against explicit matrices in float64: every implementation, TPU kernels.

The kernels run in Pallas' TPU interpreter with race detection and memory that starts as NaN.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from races import no_races

from pallas_kernels.butterfly_matmul import (
    as_monarch,
    blockwise,
    butterfly_matmul,
    cases,
    tpu,
    tpu_plan,
)
from pallas_kernels.compat import on_device
from pallas_kernels.lab import traffic
from pallas_kernels.monarch_matmul import monarch_matmul
from pallas_kernels.tpu_chip import Chip


def make(stages, b=0, lead=(5,), dtype=jnp.float32, seed=0):
    """x, twiddle (b = 0: without axes of blocks) and dy, such that y has unit variance too."""
    random, n = np.random.default_rng(seed), 2**stages
    kind = np.dtype(jnp.promote_types(dtype, jnp.float32))
    shape = (stages, n // 2, 2, 2, *((b, b) if b else ()))

    def draw(*shape):
        found = random.normal(size=shape)
        return found + 1j * random.normal(size=shape) if kind.kind == "c" else found

    x, dy = (draw(*lead, n * max(b, 1)) for _ in range(2))
    twiddle = draw(*shape) * (2 * max(b, 1)) ** -0.5
    return [jnp.asarray(a, dtype) for a in (x, twiddle, dy)]


def factors(twiddle, increasing):
    """The factors F of y = F x for column vectors, entry by entry by the definition."""
    twiddle = np.asarray(twiddle, np.complex128 if np.iscomplexobj(twiddle) else np.float64)
    if twiddle.ndim == 4:
        twiddle = twiddle[..., None, None]
    stages, pairs, b = twiddle.shape[0], twiddle.shape[1], twiddle.shape[-1]
    found = []
    for stage in range(stages):
        s = 2 ** (stage if increasing else stages - 1 - stage)
        factor = np.zeros((2 * pairs, b, 2 * pairs, b), twiddle.dtype)
        for d in range(pairs // s):
            for t in range(s):
                for i in (0, 1):
                    for j in (0, 1):
                        place = (2 * d + i) * s + t, slice(None), (2 * d + j) * s + t
                        factor[place] = twiddle[stage, d * s + t, i, j]
        found.append(factor.reshape(2 * pairs * b, 2 * pairs * b))
    return found


def expected(x, twiddle, dy, increasing):
    """y, dx and the gradient of twiddle, real, by the chain rule through the dense factors."""
    exact = np.complex128 if np.iscomplexobj(x) else np.float64
    values = [np.asarray(x, exact).reshape(-1, x.shape[-1])]
    dense = factors(twiddle, increasing)
    for factor in dense:
        values.append(values[-1] @ factor.T)
    g, gradients = np.asarray(dy, exact).reshape(values[0].shape), []
    for factor, value in zip(reversed(dense), reversed(values[:-1]), strict=True):
        gradients.insert(0, g.T @ value)  # of each entry of the factor
        g = g @ factor
    n, b = 2 * twiddle.shape[1], twiddle.shape[-1] if twiddle.ndim == 6 else 1
    entries = np.zeros((*twiddle.shape[:4], b, b), exact)
    for stage, gradient in enumerate(gradients):
        gradient = gradient.reshape(n, b, n, b)
        s = 2 ** (stage if increasing else len(gradients) - 1 - stage)
        for d in range(n // 2 // s):
            for t in range(s):
                for i in (0, 1):
                    for j in (0, 1):
                        place = (2 * d + i) * s + t, slice(None), (2 * d + j) * s + t
                        entries[stage, d * s + t, i, j] = gradient[place]
    return values[-1], g, entries.reshape(twiddle.shape)


def run(x, twiddle, dy, **how):
    """y, dx and the gradient of twiddle."""

    @jax.jit
    def both(x, twiddle, dy):
        y, pull = jax.vjp(functools.partial(butterfly_matmul, **how), x, twiddle)
        return y, *pull(dy)

    return both(x, twiddle, dy)


def compare(found, right, bound):
    """Each array within `bound` of its greatest element."""
    for a, b in zip(found, right, strict=True):
        a = np.asarray(a, b.dtype).reshape(b.shape)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize(("stages", "b"), [(1, 0), (4, 0), (3, 3)])
def test_equals_explicit_factors(implementation, increasing, stages, b):
    x, twiddle, dy = make(stages, b, (2, 3))
    found = run(x, twiddle, dy, increasing=increasing, implementation=implementation)
    assert found[0].shape == x.shape and found[2].shape == twiddle.shape
    compare(found, expected(x, twiddle, dy, increasing), 2e-6)


@settings(max_examples=6, deadline=None)
@given(
    stages=strategies.integers(1, 7),
    b=strategies.sampled_from([0, 1, 2, 5]),
    increasing=strategies.booleans(),
    dtype=strategies.sampled_from(["float32", "bfloat16", "float16"]),
    platform=strategies.sampled_from(["cpu", "accelerator"]),
    seed=strategies.integers(0, 99),
)
def test_any_size(stages, b, increasing, dtype, platform, seed):
    """The XLA forms of both platforms, of one and of several composed products."""
    stages = stages if b < 2 else min(stages, 4)
    x, twiddle, dy = make(stages, b, (3,), jnp.dtype(dtype), seed)
    full = twiddle if b else twiddle[..., None, None]

    @jax.jit
    def both(x, twiddle, dy):
        how = increasing, None, platform
        return blockwise.forward(x, twiddle, *how), *blockwise.backward(x, twiddle, dy, *how)

    found = both(x, full, dy)
    assert {a.dtype for a in found} == {x.dtype}
    # Roundings: of the composed weights, of each value between products, of the result.
    unit = float(jnp.finfo(dtype).eps)
    right = expected(x, twiddle, dy, increasing)
    compare(found, [*right[:2], right[2].reshape(full.shape)], 8 * unit)


def test_factors_shared_by_all_pairs_are_a_kronecker_product():
    """Bit i of a feature is its place in the pairs of stride 2^i, so the strides are the Kronecker
    product's factors, the largest first, in whatever order they are applied."""
    random = np.random.default_rng(0)
    small = [random.normal(size=(2, 2)) for _ in range(4)]
    dense = functools.reduce(np.kron, reversed(small))
    x = jnp.asarray(random.normal(size=(3, 16)), jnp.float32)
    for increasing in (True, False):
        applied = small if increasing else small[::-1]
        twiddle = jnp.asarray(np.stack([np.tile(t, (8, 1, 1)) for t in applied]), jnp.float32)
        found = butterfly_matmul(x, twiddle, increasing=increasing)
        np.testing.assert_allclose(found, x @ dense.T, rtol=1e-5, atol=1e-5)


def fourier(n):
    """Factors of the fast Fourier transform by decimation in time, of increasing stride."""
    found = []
    for s in [2**i for i in range(n.bit_length() - 1)]:
        turn = np.exp(-1j * np.pi * np.arange(s) / s)
        factor = np.stack([np.ones(s), turn, np.ones(s), -turn], 1).reshape(s, 2, 2)
        found.append(np.tile(factor, (n // (2 * s), 1, 1)))
    return np.stack(found)


def test_complex_factors_make_the_fourier_transform():
    n = 64
    reversal = [int(f"{i:06b}"[::-1], 2) for i in range(n)]
    random = np.random.default_rng(0)
    x = random.normal(size=(3, n)) + 1j * random.normal(size=(3, n))
    twiddle = jnp.asarray(fourier(n), jnp.complex64)
    found = butterfly_matmul(jnp.asarray(x[:, reversal], jnp.complex64), twiddle)
    np.testing.assert_allclose(found, np.fft.fft(x), rtol=1e-5, atol=2e-5)
    # Its transpose is decimation in frequency: the factors the other way, the reversal behind.
    back = twiddle[::-1].swapaxes(-1, -2)
    found = butterfly_matmul(jnp.asarray(x, jnp.complex64), back, increasing=False)
    np.testing.assert_allclose(np.asarray(found)[:, reversal], np.fft.fft(x), rtol=1e-5, atol=2e-5)


def test_complex_gradients_and_float64():
    x, twiddle, dy = make(3, 2, dtype=jnp.complex64)
    right = run(x, twiddle, dy, implementation="reference")
    compare(run(x, twiddle, dy), [np.asarray(a) for a in right], 2e-6)
    y, dx, dt = expected(x, twiddle, dy, True)  # JAX's cotangents are linear, not conjugate
    compare(run(x, twiddle, dy), (y, dx, dt), 2e-6)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(a), jnp.float64) for a in make(4, 0)]
        found = run(*arrays, increasing=False)
        assert found[0].dtype == jnp.float64
        compare(found, expected(*arrays, False), 1e-14)


@pytest.mark.slow
def test_bfloat16_error_is_at_most_twice_that_of_rounded_stages():
    x, twiddle, dy = make(6, 0, (64,), jnp.bfloat16)
    y = x.reshape(64, -1)
    for factor in factors(twiddle, True):
        y = y @ jnp.asarray(factor.T, jnp.bfloat16)
    right, *_ = expected(x, twiddle, dy, True)
    rms = lambda a: np.sqrt(np.mean((np.asarray(a, np.float64) - right) ** 2))  # noqa: E731
    for platform in ("cpu", "accelerator"):
        found = blockwise.forward(x, twiddle[..., None, None], True, None, platform)
        assert 0 < rms(found) <= 2 * rms(y)


def total(of, jaxpr, times=1):
    """The sum of of(equation), in kernels by their grids; of a choice by platform, the CPU's."""
    found = 0
    for eqn in jaxpr.eqns:
        found += times * of(eqn)
        if eqn.params.get("branches_platforms"):
            here = [i for i, p in enumerate(eqn.params["branches_platforms"]) if p and "cpu" in p]
            found += total(of, eqn.params["branches"][here[0]].jaxpr, times)
            continue
        mapping = eqn.params.get("grid_mapping")
        inside = times if mapping is None else math.prod(mapping.grid)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += total(of, inner, inside) if hasattr(inner, "eqns") else 0
    return found


def of_product(eqn):
    """FLOPs of a product of matrices."""
    if eqn.primitive.name != "dot_general":
        return 0
    (contract, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[a] for a in contract)


def of_elements(eqn):
    """Elements that are multiplied, or added up."""
    of = {"mul": eqn.outvars, "reduce_sum": eqn.invars}.get(eqn.primitive.name)
    return math.prod(of[0].aval.shape) if of else 0


dots = functools.partial(total, of_product)


@pytest.mark.parametrize(
    ("stages", "b", "flops"),
    [  # of a row: 2 n b features times the columns of a block, for each product
        (3, 0, 2 * 8 * 8),
        (7, 0, 2 * 128 * (32 + 4)),
        (4, 4, 2 * 64 * (32 + 8)),
        (2, 64, 2 * 256 * (128 + 128)),
    ],
)
def test_flops_of_the_products(stages, b, flops):
    """And of nothing else: factors are multiplied with each other by sums."""
    x, twiddle, _ = make(stages, b, (3,))
    program = jax.make_jaxpr(butterfly_matmul)(x, twiddle).jaxpr
    assert dots(program) == 3 * flops
    assert blockwise.flops(stages, max(b, 1)) == flops


@pytest.mark.parametrize("b", [32, 64])
def test_a_factor_alone_costs_its_product_alone(b):
    """Forward and backward: beside the products no more is multiplied, or added up, than it has
    entries."""
    x, twiddle, dy = make(2, b, (3,))
    program = jax.make_jaxpr(run)(x, twiddle, dy).jaxpr
    assert dots(program) > 0
    assert total(of_elements, program) <= twiddle.size


# ---- the TPU kernels


def interpreted(x, twiddle, dy, increasing):
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )  # fmt: skip
    full = twiddle if twiddle.ndim == 6 else twiddle[..., None, None]
    for backward in (False, True):
        assert tpu.unsupported(x, full, increasing, backward) is None
    how = increasing, jax.lax.Precision.HIGHEST, params
    with no_races():
        y, (dx, gradient) = tpu.forward(x, full, *how), tpu.backward(x, full, dy, *how)
    return y, dx, gradient.reshape(twiddle.shape)


KERNELS = {
    "numbers": (8, 0, True, 128, jnp.float32),
    "numbers_bfloat16": (9, 0, True, 130, jnp.bfloat16),
    "numbers_decreasing": (8, 0, False, 130, jnp.float32),
    "numbers_decreasing_bfloat16": (9, 0, False, 128, jnp.bfloat16),
    "blocks_in_lanes": (4, 32, True, 128, jnp.float32),
    "blocks_in_lanes_decreasing": (4, 32, False, 128, jnp.bfloat16),
    "blocks": (2, 128, False, 128, jnp.bfloat16),
    "blocks_in_steps": (2, 128, True, 500, jnp.float32),
    "large_blocks": (1, 256, True, 128, jnp.float32),
}
FAST = ("blocks",)


def check_kernel(name, monkeypatch):
    if name.endswith("steps"):
        monkeypatch.setattr(tpu_plan, "ROWS", (128,))
    stages, b, increasing, M, dtype = KERNELS[name]
    x, twiddle, dy = make(stages, b, (M,), dtype)
    # bfloat16: weights, values between products and results are rounded.
    bound = 3e-6 if dtype == jnp.float32 else 2**-7
    compare(
        interpreted(x, twiddle, dy, increasing), expected(x, twiddle, dy, increasing), bound
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KERNELS]
)
def test_kernel_numbers(name, monkeypatch):
    check_kernel(name, monkeypatch)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize(("stages", "width"), [(4, 4), (5, 8), (7, 64)])
def test_numbers_are_a_monarch_matrix(stages, width, increasing):
    x, twiddle, dy = make(stages)
    right, left = as_monarch.factors(twiddle[..., None, None], increasing, width)
    assert right.shape == left.shape == (2**stages // width, width, width)
    dense = monarch_matmul(jnp.eye(2**stages), right, left, precision="highest")
    y, dx, _ = expected(x, twiddle, dy, increasing)
    compare((x @ dense, dy @ dense.T) if increasing else (x @ dense.T, dy @ dense), (y, dx), 2e-6)


@pytest.mark.parametrize(("chip", "rows"), [(Chip(), 128), (Chip(128 * 2**20, 1, 256, 560), 256)])
def test_a_step_has_as_many_rows_as_a_matrix_unit_is_deep(chip, rows, monkeypatch):
    monkeypatch.setattr(tpu_plan, "chip", lambda: chip)
    x, twiddle, _ = next(c for c in cases.CASES if c.name == "16 blocks of 256").args["backward"]
    assert tpu_plan.plan(x, twiddle, True, True).rows == rows


SLOW = ("4096", "4096 decreasing", "128 blocks of 32", "32 blocks of 128")


@pytest.mark.parametrize(
    "name",
    ["1024", "8 blocks of 128", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_bytes_and_flops_are_those_of_the_formula(name):
    """The backward pass makes again the product within lanes where it is first, and all stages of
    blocks but a last one behind which nothing is. What is of numbers has Monarch's kernels, which
    order the weights by products too."""
    case = next(c for c in cases.CASES if c.name == name)
    x, twiddle = case.args["forward"]
    full = jax.ShapeDtypeStruct((*twiddle.shape[:4], *(twiddle.shape[4:] or (1, 1))), x.dtype)
    increasing, b = "decreasing" not in name, full.shape[-1]
    stages = full.shape[0]
    lanes = 128 * x.shape[1] * (b < 128)
    outer = stages - max(0, (128 // b).bit_length() - 1)
    of_stage = 2 * max(b, 128) * x.shape[1] * (b > 1)
    again = lanes * increasing + of_stage * (outer if lanes and not increasing else outer - 1)
    for role, fn in case.kernels.items():
        args = case.args_of(role)
        (*_, row) = traffic(fn, *args)  # a backward pass is traced behind a forward one
        right = case.hbm_bytes_of(role, row.kernel)
        if role == "backward":  # each core has sums of its own, of as many weights as FLOPs / 4 M
            right += (Chip().cores - 1) * case.flops_of(role, row.kernel) / x.shape[0]
        assert row.moved == pytest.approx(right, rel=0.05)
        if b == 1:
            name = "monarch" if increasing else "monarch_t"
            assert row.kernel.startswith(f"{name}_{'fwd' if role == 'forward' else 'bwd'}")
            continue
        if role == "forward":
            call = lambda x, t: tpu.forward(x, t, increasing, None)  # noqa: E731
            extra = 0
        else:
            call = lambda x, t: tpu.backward(x, t, x, increasing, None)  # noqa: E731
            extra = 2 * x.shape[0] * again
        counted = jax.make_jaxpr(call)(x, full).jaxpr
        plan = tpu_plan.plan(x, full, increasing, role == "backward")
        in_kernel = [e for e in all_equations(counted) if e.primitive.name == "pallas_call"]
        found = dots(in_kernel[0].params["jaxpr"], plan.steps)
        assert found == case.flops_of(role, row.kernel) + extra == plan.flops


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and eqn.primitive.name != "pallas_call":
                yield from all_equations(inner)


@pytest.mark.parametrize(
    ("stages", "b", "M", "dtype", "reason"),
    [
        (7, 0, 128, jnp.float32, "128 features, not 256 to 16384 of them"),
        (7, 3, 128, jnp.float32, "384 features in blocks of 3, no power of two"),
        (8, 0, 127, jnp.float32, "M = 127 rows, fewer than 128"),
        (4, 32, 127, jnp.float32, "M = 127 rows, fewer than 128"),
        (8, 0, 128, jnp.complex64, "dtype complex64"),
        (2, 1024, 128, jnp.float32, "MiB on chip"),
    ],
)
def test_by_name_what_the_kernel_cannot_do_is_refused(stages, b, M, dtype, reason):
    n, blocks = 2**stages, (b, b) if b else ()
    x = jax.ShapeDtypeStruct((M, n * max(b, 1)), dtype)
    twiddle = jax.ShapeDtypeStruct((stages, n // 2, 2, 2, *blocks), dtype)
    call = functools.partial(butterfly_matmul, implementation="tpu")
    with pytest.raises(ValueError, match=f"implementation='tpu' cannot do this: .*{reason}"):
        jax.eval_shape(call, x, twiddle)


def test_on_a_tpu_the_kernels_are_in_the_program_and_a_fallback_is_said(recwarn):
    for stages, inside in ((8, 2), (7, 0)):
        x, twiddle, dy = make(stages, 0, (128,))
        program = jax.jit(run).trace(x, twiddle, dy)
        text = program.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == inside
    said = [str(w.message) for w in recwarn if "butterfly_matmul" in str(w.message)]
    assert said == [
        "butterfly_matmul: not the tpu kernel but blockwise: 128 features, not 256 to 16384 of them"
    ]
    x, twiddle, _ = make(8, 0, (128,))
    with pytest.raises(ValueError, match="needs a TPU; accepted elsewhere: None"):
        butterfly_matmul(x, twiddle, implementation="tpu")


def compile_cases(target, names):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for case in cases.CASES:
        if case.name not in names:
            continue
        for role, fn in case.kernels.items():
            args = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.args_of(role)
            )
            with on_device(device):
                lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
            compiled = lowered.compile()
            assert compiled.as_text().count("tpu_custom_call") == 1, (case.name, role)


def test_compiles():
    compile_cases("v5e:2x2", ["1024"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("v5e:2x2", ["128 blocks of 32"]),
        ("v5p:2x2x1", ["2048", "32 blocks of 128 decreasing"]),
        ("v6e:2x2", ["1024 decreasing", "8 blocks of 128"]),
    ],
)
def test_cases_compile(target, names):
    """Each form for one of the chips; the laboratory compiles every case for all of them."""
    compile_cases(target, names)


# ---- layout, wrong input


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_one(kind):
    x, twiddle, dy = make(3, 2, (8, 2))
    right = [np.asarray(a) for a in run(x, twiddle, dy)]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    placement = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        how = {"sharding": placement} if kind == AxisType.Auto else {}
        placed, spread = (jax.device_put(a, placement) for a in (x, dy))
        found = run(placed, twiddle, spread, **how)
    assert {s.data.shape for s in found[0].addressable_shards} == {(1, 2, 16)}
    compare(found, right, 1e-6)
    with pytest.raises(ValueError, match="must leave the last axis of x whole"):
        butterfly_matmul(x, twiddle, sharding=NamedSharding(mesh, P(None, None, "data")))


def bad(**changes):
    x, twiddle, _ = make(3, 2)
    return {"x": x, "twiddle": twiddle, **changes}


zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(x=None), r"x must be an array \[..., n b\] .* NoneType"),
        (bad(x=zeros((2, 15))), r"x must be \[..., 16\], n b of twiddle .*; got \[2, 15\]"),
        (bad(x=jnp.zeros((2, 16), int)), "x must be of dtype float32, bfloat16"),
        (bad(twiddle=zeros((3, 4, 2))), r"twiddle must be an array \[log2\(n\), n / 2, 2, 2\] or"),
        (bad(twiddle=zeros((3, 4, 2, 2, 2, 3))), "twiddle must be an array"),
        (
            bad(twiddle=zeros((2, 4, 2, 2))),
            "2 factors are for n = 4, got n = 8; 8 blocks take 3",
        ),
        (bad(twiddle=zeros((3, 4, 2, 2, 2, 2)).astype("bfloat16")), "twiddle must be of x's dtype"),
        (bad(increasing=1), "increasing must be True or False, got 1"),
        (bad(implementation="cuda"), "implementation must be one of None, 'reference'"),
        (bad(sharding="data"), "sharding must be NamedSharding"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        butterfly_matmul(**arguments)
    assert "\n" not in str(error.value)
