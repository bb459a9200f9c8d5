"""Decode attention: every implementation against NumPy in float64, the TPU kernel's compiler.

The kernel runs in Pallas' TPU interpreter with race detection and memory that starts as NaN, and
what the cache holds beyond a row's length is NaN too.
"""

import functools
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

from pallas_kernels.decode_attention import cases, decode_attention, tpu, tpu_plan
from pallas_kernels.decode_attention.settings import Settings


def make(lengths, T=1, N=4, K=2, H=8, S=40, page=0, dtype=jnp.float32, seed=0):
    """q, k_cache, v_cache, lengths, pages; cache entries that no row holds are NaN."""
    random = np.random.default_rng(seed)
    B = len(lengths)
    q, k, v = (random.normal(size=size) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = np.nan
    pages = None
    if page:
        count = B * S // page
        table = random.permutation(count + 3)[:count].reshape(B, -1)
        paged = np.full((2, count + 3, page, K, H), np.nan)
        paged[0, table] = k.reshape(B, -1, page, K, H)
        paged[1, table] = v.reshape(B, -1, page, K, H)
        k, v = paged
        held = np.arange(S // page) * page < np.array(lengths)[:, None]
        pages = jnp.asarray(np.where(held, table, 10**6 * (-1) ** table), jnp.int32)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return q, k, v, jnp.asarray(lengths, jnp.int32), pages


def expected(
    q, k, v, lengths, pages, scale=None, softcap=None, window=None, sinks=None, naive=None
):
    """out, lse in float64, a query of a row at a time; only keys that it sees are touched.

    With naive, a dtype, in float32 with weights and results rounded to it.
    """
    wide = np.float64 if naive is None else np.float32
    keep = lambda x: x if naive is None else x.astype(naive).astype(wide)  # noqa: E731
    q, k, v = (np.asarray(x, wide) for x in (q, k, v))
    B, T, N, H = q.shape
    out, lse = np.zeros_like(q), np.full((B, N, T), -np.inf, wide)
    for b, t, n in np.ndindex(B, T, N):
        at = int(lengths[b]) - T + t
        keys = [s for s in range(at + 1) if window is None or s > at - window]
        head = n // (N // k.shape[2])
        if pages is None:
            places = [(b, s) for s in keys]
        else:
            page = k.shape[1]
            places = [(int(pages[b, s // page]), s % page) for s in keys]
        x = np.array([q[b, t, n] @ k[i, s, head] for i, s in places], wide).reshape(-1)
        x = x * wide(H**-0.5 if scale is None else scale)
        x = x if softcap is None else wide(softcap) * np.tanh(x / wide(softcap))
        values = np.array([v[i, s, head] for i, s in places], wide).reshape(-1, H)
        if sinks is not None:
            x = np.append(x, wide(sinks[n]))
            values = np.vstack([values, np.zeros((1, H), wide)])
        if len(x):
            most = x.max()
            lse[b, n, t] = most + np.log(np.exp(x - most).sum())
            out[b, t, n] = keep(keep(np.exp(x - lse[b, n, t])) @ values)
    return out, lse


def check(found, arrays, **how):
    """Errors are at most twice those of naive attention in the same dtype.

    Beyond it, four last bits of float32, of the greatest value or of the inputs' unit size: the
    naive form is exact where a query sees one key.
    """
    dtype = np.dtype(arrays[0].dtype)
    right, near = expected(*arrays, **how), expected(*arrays, **how, naive=dtype)
    for name, value, exact, naive in zip(("out", "lse"), found, right, near, strict=True):
        assert value.dtype == (dtype if name == "out" else np.float32)
        value = np.asarray(value, np.float64)
        np.testing.assert_array_equal(np.isinf(value), np.isinf(exact), err_msg=name)
        finite = np.isfinite(exact)
        value, exact, naive = value[finite], exact[finite], naive[finite]
        allowed = 2 * np.abs(naive - exact).max(initial=0)
        allowed += 2.0**-21 * np.abs(exact).max(initial=1)
        assert np.abs(value - exact).max(initial=0) <= allowed, (name, allowed)


def run(arrays, implementation, **how):
    q, k, v, lengths, pages = arrays
    return decode_attention(
        q, k, v, lengths=lengths, pages=pages, return_lse=True, implementation=implementation, **how
    )


VARIANTS = {
    "ragged": ({"lengths": [0, 1, 40, 23]}, {}),
    "tokens": ({"lengths": [2, 40, 17], "T": 3, "page": 8}, {"softcap": 2.0, "scale": 0.7}),
    "window": ({"lengths": [40, 5, 0], "T": 2, "page": 4}, {"window": 9}),
    "splits": ({"lengths": [40, 9], "K": 4}, {"splits": 3, "sinks": jnp.arange(4.0)}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_equals_numpy(implementation, name):
    given, how = VARIANTS[name]
    arrays = make(**given)
    check(run(arrays, implementation, **how), arrays, **{k: how[k] for k in how if k != "splits"})


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_blocks_end_within_the_cache_and_parts_merge(platform):
    """Blocks that do not divide the cache, in as many parts as an accelerator would take."""
    from pallas_kernels.decode_attention import blockwise

    for cache in ({"lengths": [40, 33, 3]}, {"lengths": [40, 3, 30], "page": 8}):
        arrays = make(**cache)
        how = Settings(scale=8**-0.5, block=16)
        check(jax.jit(blockwise.forward, static_argnums=(5, 6))(*arrays, how, platform), arrays)


def any_lengths(test):
    return given(
        lengths=strategies.lists(strategies.integers(0, 24), min_size=3, max_size=3),
        paged=strategies.booleans(),
        window=strategies.sampled_from([None, 5]),
        dtype=strategies.sampled_from([jnp.float32, jnp.bfloat16]),
        seed=strategies.integers(0, 99),
    )(test)


def check_lengths(lengths, paged, window, dtype, seed):
    arrays = make(lengths, T=2, S=24, page=4 * paged, dtype=dtype, seed=seed)
    check(run(arrays, None, window=window), arrays, window=window)


test_any_lengths = settings(max_examples=12, deadline=None)(any_lengths(check_lengths))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@any_lengths
def test_any_lengths_at_length(**drawn):
    check_lengths(**drawn)


def test_bfloat16():
    arrays = make([40, 0, 9], T=2, dtype=jnp.bfloat16)
    check(run(arrays, None), arrays)


def test_lengths_beyond_the_cache_count_as_what_it_holds():
    arrays = make([40, 9])
    many = (*arrays[:3], jnp.array([99, 9]), None)
    np.testing.assert_array_equal(run(many, None)[0], run(arrays, None)[0])


# ---- the TPU kernel


def interpret(arrays, **static):
    how = Settings(**{"scale": arrays[0].shape[-1] ** -0.5, **static})
    assert tpu.unsupported(*arrays, how) is None
    params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )
    with no_races():
        return tpu.forward(*arrays, how, interpret=params)


def test_kernel_pages_and_splits():
    arrays = make([0, 40, 23], T=2, H=128, S=48, page=8)
    check(interpret(arrays, splits=2, block=16, window=20), arrays, window=20)


KERNEL = {
    "contiguous": ({"lengths": [64, 1, 0, 33], "S": 64}, {"block": 32}),
    "many_pages": ({"lengths": [64, 17], "S": 64, "page": 4}, {"block": 32}),
    "one_block": ({"lengths": [5, 64], "S": 64}, {}),
    "tokens": ({"lengths": [64, 2, 31], "T": 3, "S": 64}, {"block": 16, "softcap": 2.0}),
    "multi_query": ({"lengths": [64, 20], "K": 1, "S": 64}, {"block": 32}),
    "window": ({"lengths": [64, 9], "T": 2, "S": 64, "page": 8}, {"block": 16, "window": 11}),
    "splits": ({"lengths": [64, 0, 30], "S": 64}, {"block": 8, "splits": 3}),
    "head_256": ({"lengths": [64, 30], "S": 64, "H": 256}, {"block": 32}),
    "bfloat16": ({"lengths": [64, 30], "S": 64, "dtype": jnp.bfloat16}, {"block": 32}),
    "empty": ({"lengths": [0, 0, 0], "S": 16}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL)
def test_kernel_numbers(name):
    given, static = KERNEL[name]
    arrays = make(**{"H": 128, **given})
    how = {k: static[k] for k in ("softcap", "window") if k in static}
    check(interpret(arrays, **static), arrays, **how)


@pytest.mark.parametrize("splits", [None, 3])
def test_work_is_what_the_rows_hold(splits):
    """Every live page is in one unit of its row, and no page before the window or beyond it."""
    lengths = jnp.array([0, 70, 256, 1])
    q, k, pages = jnp.zeros((4, 2, 4, 128)), jnp.zeros((99, 8, 2, 128)), jnp.zeros((4, 32), int)
    plan = tpu_plan.plan(q, k, pages, Settings(block=32, window=100, splits=splits))
    assert (plan.page, plan.pages, plan.blocks) == (8, 4, 8)
    found = {name: np.asarray(x) for name, x in tpu_plan.work(lengths, plan).items()}
    pages, rows = set(), []
    for core in range(plan.cores):
        for u in range(int(found["count"][core])):
            row, packed, live = (found[n][core * plan.units + u] for n in ("row", "block", "live"))
            assert bool(packed & 1) == (not rows or rows[-1] != row), "the first of its row"
            rows.append(row)
            for page in range(live >> 16, live & 0xFFFF):
                at = (row // plan.splits, (packed >> 2) * 4 + page)
                assert at not in pages
                pages.add(at)
    right = {
        (b, page)
        for b, n in enumerate(lengths.tolist())
        for page in range(32)
        if page * 8 < n and page * 8 + 7 > n - 2 - 100
    }
    assert pages == right
    assert sorted(set(rows)) == list(range(4 * plan.splits)), "every row writes its result"
    assert plan.splits > 1 or len(rows) == 1 + 3 + 4 + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"H": 64}, "head size 64"),
        ({"dtype": jnp.float16}, "dtype float16"),
        ({"N": 512}, "512 heads of 1 queries"),
        ({"S": 33}, "a cache of 33 x 2 heads"),
        ({"page": 2, "S": 32}, "pages of 2 x 2 heads"),
        ({}, None),
    ],
)
def test_unsupported_says_why(change, reason):
    arrays = make(**{"lengths": [3, 3], "H": 128, "S": 32, **change})
    found = tpu.unsupported(*arrays, Settings())
    assert found is None if reason is None else reason in found


def test_on_a_tpu_the_kernel_is_in_the_program_and_a_fallback_is_said(recwarn):
    for H, inside in ((128, True), (64, False)):
        q, k, v, lengths, _ = make([3, 3], H=H, S=32)
        lowered = jax.jit(decode_attention).trace(q, k, v, lengths=lengths)
        text = lowered.lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == inside
    said = [str(w.message) for w in recwarn if "decode_attention" in str(w.message)]
    assert len(said) == 1 and "not the tpu kernel but blockwise: head size 64" in said[0]
    with pytest.raises(ValueError, match="needs a TPU; accepted elsewhere: None"):
        run(make([3, 3], H=128, S=32), "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_without_a_copy_of_the_cache(target):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for case in cases.CASES:
        if target.partition(":")[0] not in case.targets:
            continue
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), case.args
        )
        lowered = jax.jit(cases.forward).trace(*args).lower(lowering_platforms=("tpu",))
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 2**22, case.name


# ---- layout, derivatives, wrong input


@pytest.mark.parametrize("page", [0, 8])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_one(kind, page):
    arrays = make([0, 40, 7, 21, 33, 1, 2, 40], page=page)
    right = run(arrays, None)
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(kind, kind))
    layout = NamedSharding(mesh, P("data", None, "heads", None))
    with jax.set_mesh(mesh):
        placed = (jax.device_put(arrays[0], layout), *arrays[1:])
        how = {"sharding": layout} if kind == AxisType.Auto else {}
        found = jax.jit(lambda *x: run(x, None, **how))(*placed)
    for one, other in zip(right, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
    with pytest.raises(ValueError, match="sharding must divide q's batch 8 and the cache's heads"):
        run(arrays, None, sharding=NamedSharding(mesh, P(None, None, ("data", "heads"))))


def test_derivatives_are_the_references_alone():
    q, k, v, lengths, _ = make([40, 12])
    k, v = (jnp.nan_to_num(x) for x in (k, v))
    loss = lambda q, how: decode_attention(q, k, v, lengths=lengths, implementation=how).sum()  # noqa: E731
    for how in (None, "blockwise"):
        with pytest.raises(ValueError, match="for inference and has no derivative"):
            jax.grad(loss)(q, how)
    gradient = jax.grad(loss)(q, "reference")
    step = 1e-2 * jnp.sign(gradient)
    rise = loss(q + step, "reference") - loss(q - step, "reference")
    np.testing.assert_allclose(rise, 2 * (gradient * step).sum(), rtol=1e-2)


def bad(**changes):
    q, k = jnp.zeros((2, 1, 4, 8)), jnp.zeros((2, 16, 2, 8))
    return {"q": q, "k_cache": k, "v_cache": k, "lengths": jnp.array([3, 4])} | changes


zeros = functools.partial(jnp.zeros, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(q=zeros((2, 4, 8))), r"q must be an array \[B, T, N, H\]"),
        (bad(k_cache=None), r"k_cache must be an array \[B, S, K, H\] .* NoneType"),
        (bad(v_cache=zeros((2, 16, 1, 8))), r"v_cache must be of k_cache's shape \[2, 16, 2, 8\]"),
        (bad(k_cache=zeros((2, 16, 2, 8)).astype("bfloat16")), "k_cache must be of q's dtype"),
        (bad(q=zeros((2, 1, 4, 16))), "k_cache must be of q's head size H, 16; got 8"),
        (bad(q=zeros((2, 1, 3, 8))), "K a divisor of q's 3 heads, got K 2"),
        (bad(q=zeros((3, 1, 4, 8))), "k_cache must be of q's batch B, 3; got 2; or give pages"),
        (bad(lengths=jnp.array([3])), r"lengths must be integers \[2\], got \[1\]"),
        (bad(lengths=zeros(2)), r"lengths must be integers \[2\], got dtype float32"),
        (bad(pages=jnp.zeros((3, 4), int)), r"pages must be integers \[2, max_pages\]"),
        (bad(sinks=zeros(3)), r"sinks must be floating \[4\]"),
        (bad(softcap=-1.0), "softcap must be a positive Python number"),
        (bad(scale=zeros(())), "scale must be a Python number"),
        (bad(q=zeros((2, 1, 4, 8)).astype("int8")), "q must be of dtype float32, .* got int8"),
        (bad(window=0), "window must be a positive integer"),
        (bad(window=float("inf")), "window must be a positive integer or None, got inf"),
        (bad(splits=float("nan")), "splits must be a positive integer or None, got nan"),
        (bad(splits=1.5), "splits must be a positive integer"),
        (bad(implementation="gpu"), "implementation must be one of None, 'reference'"),
        (bad(sharding="data"), "sharding must be NamedSharding"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        decode_attention(**arguments)
    assert "\n" not in str(error.value)
