"""Attention over shared prefixes against NumPy in float64 over each sequence's concatenation."""

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

from pallas_kernels import compat
from pallas_kernels.attention import api as attention_api
from pallas_kernels.attention import attention, merge
from pallas_kernels.attention import gpu as attention_gpu
from pallas_kernels.attention import settings as attention_settings
from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.decode_attention import api as decode
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention import settings as decode_settings
from pallas_kernels.decode_attention import tpu as decode_tpu
from pallas_kernels.shared_prefix_attention import Level, cases, shared_prefix_attention

B, T, N, K, H = 6, 2, 4, 2, 8


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def level(G, length, lengths=None, groups=None, seed=1, dtype=jnp.float32):
    k, v = (normal(G, length, K, H, seed=seed + i, dtype=dtype) for i in (0, 50))
    as_array = lambda x: None if x is None else jnp.array(x)  # noqa: E731
    return Level(k, v, as_array(lengths), as_array(groups))


def suffix(size=9, lengths=(2, 9, 4, 0, 5, 3), dtype=jnp.float32):
    k, v = (normal(B, size, K, H, seed=seed, dtype=dtype) for seed in (80, 81))
    return k, v, jnp.array(lengths)


def expected(
    q, levels, k_cache=None, v_cache=None, lengths=None, scale=H**-0.5, softcap=None, naive=None
):
    """out, lse in float64: a query's keys are listed one by one, then one softmax over them.

    With naive, a dtype, in float32 with weights and results rounded to it.
    """
    wide = np.float64 if naive is None else np.float32
    keep = lambda x: x if naive is None else x.astype(naive).astype(wide)  # noqa: E731
    q = np.asarray(q, wide)
    out, lse = np.zeros_like(q), np.full((B, N, T), -np.inf, wide)
    for b, t, n in np.ndindex(B, T, N):
        keys, values = [], []
        for one in levels:
            G = one.k.shape[0]
            group = b // (B // G) if one.groups is None else int(one.groups[b])
            if 0 <= group < G:
                end = one.k.shape[1] if one.lengths is None else int(one.lengths[group])
                keys += list(np.asarray(one.k[group, :end, n // (N // K)], wide))
                values += list(np.asarray(one.v[group, :end, n // (N // K)], wide))
        if k_cache is not None:
            end = max(int(lengths[b]) - T + t + 1, 0)
            keys += list(np.asarray(k_cache[b, :end, n // (N // K)], wide))
            values += list(np.asarray(v_cache[b, :end, n // (N // K)], wide))
        if keys:
            x = np.array(keys) @ q[b, t, n] * wide(scale)
            x = x if softcap is None else wide(softcap) * np.tanh(x / wide(softcap))
            most = x.max()
            lse[b, n, t] = most + np.log(np.exp(x - most).sum())
            out[b, t, n] = keep(keep(np.exp(x - lse[b, n, t])) @ np.array(values))
    return out, lse


def check(found, q, *given, **how):
    """Errors are at most twice those of naive attention in q's dtype, all keys at once.

    Beyond it, four last bits of float32, of the greatest value or of the inputs' unit size: the
    naive form is exact where a query sees one key.
    """
    dtype = np.dtype(q.dtype)
    right, near = expected(q, *given, **how), expected(q, *given, **how, naive=dtype)
    for name, value, exact, naive in zip(("out", "lse"), found, right, near, strict=True):
        assert value.dtype == (dtype if name == "out" else np.float32)
        value = np.asarray(value, np.float64)
        np.testing.assert_array_equal(np.isinf(value), np.isinf(exact))
        finite = np.isfinite(exact)
        value, exact, naive = value[finite], exact[finite], naive[finite]
        allowed = 2 * np.abs(naive - exact).max(initial=0)
        allowed += 2.0**-21 * np.abs(exact).max(initial=1)
        assert np.abs(value - exact).max(initial=0) <= allowed, (name, allowed)


def run(q, levels, k_cache=None, v_cache=None, lengths=None, **how):
    return shared_prefix_attention(
        q, levels, k_cache, v_cache, lengths=lengths, return_lse=True, **how
    )


TREE = [
    level(1, 10),
    level(3, 5, lengths=[5, 0, 3], seed=2),
    level(2, 7, groups=[1, 0, -1, 1, 1, 0], seed=3),
    level(2, 6, lengths=[2, 6], groups=[1, 0, 0, 2, 1, 0], seed=4),
]
SHAPES = {
    "flat": (TREE[:1], suffix()),
    "tree": (TREE, suffix()),
    "prefixes alone": (TREE[1:3], ()),
    "suffixes alone": ([], suffix()),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_equals_numpy(implementation, name):
    levels, own = SHAPES[name]
    q = normal(B, T, N, H)
    found = run(q, levels, *own, implementation=implementation)
    check(found, q, levels, *own)


def test_scale_and_softcap_reach_every_part():
    q, how = normal(B, T, N, H), {"scale": 0.9, "softcap": 1.5}
    check(run(q, TREE[:2], *suffix(), **how), q, TREE[:2], *suffix(), **how)


def test_paged_suffixes():
    q, (k, v, lengths) = normal(B, T, N, H), suffix(8, (2, 8, 4, 0, 5, 3))
    table = np.random.default_rng(0).permutation(2 * B).reshape(B, 2)
    paged = (jnp.zeros((2 * B, 4, K, H)).at[table].set(x.reshape(B, 2, 4, K, H)) for x in (k, v))
    found = run(q, TREE[:1], *paged, lengths, pages=jnp.asarray(table))
    check(found, q, TREE[:1], k, v, lengths)


def test_bfloat16_parts_are_merged_before_they_are_rounded():
    """Of means 8 and -8, whose roundings are far above those of what is left of their sum."""
    dtype = jnp.bfloat16
    q, one = 0.1 * normal(B, T, N, H, dtype=dtype), level(1, 40, dtype=dtype)
    k, v, lengths = suffix(40, [40] * B, dtype)
    levels, own = [one._replace(v=one.v + 8)], (k, v - 8, lengths)
    found = run(q, levels, *own)
    check(found, q, levels, *own)

    parts = attention_of(q, levels[0]), decode_attention(
        q, *own[:2], lengths=lengths, return_lse=True
    )  # fmt: skip
    assert all(out.dtype == dtype for out, _ in parts)
    right = expected(q, levels, *own)[0]
    error, rounded = (
        np.abs(np.asarray(out, np.float64) - right).max() for out in (found[0], merge(parts)[0])
    )
    assert error < rounded / 3


def attention_of(q, one):
    """(out, lse) over a level of one prefix, in q's dtype."""
    k, v = (jnp.repeat(x, B, axis=0) for x in one[:2])
    return attention(q, k, v, return_lse=True)


def any_batch(test):
    return given(
        lengths=strategies.lists(strategies.integers(0, 6), min_size=2, max_size=2),
        groups=strategies.lists(strategies.integers(-1, 2), min_size=B, max_size=B),
        own=strategies.lists(strategies.integers(0, 9), min_size=B, max_size=B),
        suffixes=strategies.booleans(),
        dtype=strategies.sampled_from([jnp.float32, jnp.bfloat16]),
        seed=strategies.integers(0, 99),
    )(test)


def check_batch(lengths, groups, own, suffixes, dtype, seed):
    q = normal(B, T, N, H, seed=seed, dtype=dtype)
    levels = [
        level(1, 10, seed=seed + 100, dtype=dtype),
        level(2, 6, lengths, groups, seed=seed + 200, dtype=dtype),
    ]
    own = suffix(lengths=own, dtype=dtype) if suffixes else ()
    check(run(q, levels, *own), q, levels, *own)


test_any_batch = settings(max_examples=6, deadline=None)(any_batch(check_batch))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@any_batch
def test_any_batch_at_length(**drawn):
    check_batch(**drawn)


def check_part(part, whole):
    """A part in float32, rounded, is what the op gives, and holds more than that."""
    (out, lse), (rounded, same) = part, whole
    assert (out.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(out.astype(jnp.bfloat16), rounded)
    np.testing.assert_array_equal(lse, same)
    assert (out != rounded.astype(jnp.float32)).mean() > 0.9


def test_parts_in_xla():
    q, k, v = (normal(B, n, K, H, seed=n, dtype=jnp.bfloat16) for n in (3, 40, 41))
    v, lengths = v[:, 1:], jnp.full(B, 40)
    how = {"scale": None, "softcap": None, "implementation": None}
    own = {"lengths": lengths, "pages": None, "splits": None}
    check_part(
        decode.part(q, k, v, **own, **how),
        decode_attention(q, k, v, lengths=lengths, return_lse=True),
    )
    check_part(
        attention_api.part(q, k, v, segment_ids=None, **how),
        attention(q, k, v, return_lse=True),
    )
    static, q = attention_settings.Settings(part=True), jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    assert "a part in float32" in attention_gpu.unsupported(q, q, q, *[None] * 4, static)
    assert attention_gpu.unsupported(q, q, q, *[None] * 4, static._replace(part=False)) is None


@pytest.mark.slow
@pytest.mark.parametrize("splits", [None, 2])
def test_parts_of_the_tpu_kernels(splits):
    """In Pallas' TPU interpreter; attention has no splits."""
    q, k, v = (normal(2, n, 1, 128, seed=n, dtype=jnp.bfloat16) for n in (2, 256, 257))
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    decoded, attended = [], []
    for part in (True, False):
        how = decode_settings.Settings(128**-0.5, splits=splits, part=part)
        lengths = jnp.array([256, 40])
        decoded.append(decode_tpu.forward(q, k, v[:, 1:], lengths, None, how, interpret))
        how = attention_settings.Settings(scale=128**-0.5, part=part)
        attended.append(
            attention_tpu.forward(q, k, v[:, 1:], *[None] * 4, how, interpret=interpret)
        )
    check_part(*decoded)
    check_part(*attended)


def test_parts_are_float32_in_the_tpus_program():
    case = cases.CASES[0]
    lowered = jax.jit(cases.forward).trace(*case.args).lower(lowering_platforms=("tpu",))
    written = re.findall(r"@tpu_custom_call\(.* -> \((.*)\)", lowered.as_text())
    assert len(written) == 2
    for results in written:
        assert re.findall(r"tensor<[\dx]+x(\w+)>", results) == ["f32", "f32"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_derivatives_where_there_are_no_suffixes(dtype):
    q, weights = normal(B, T, N, H, dtype=dtype), normal(B, T, N, H, seed=7)
    levels = [level(1, 10, dtype=dtype), level(3, 5, lengths=[5, 0, 3], seed=2, dtype=dtype)]

    def loss(arrays, how, *own):
        q, keys = arrays
        given = [x._replace(k=k, v=v) for x, (k, v) in zip(levels, keys, strict=True)]
        return (weights * run(q, given, *own, implementation=how)[0].astype(jnp.float32)).sum()

    arrays = q, [x[:2] for x in levels]
    right, found = (
        jax.jit(jax.grad(loss), static_argnums=1)(arrays, h) for h in ("reference", None)
    )
    for one, other in zip(jax.tree.leaves(right), jax.tree.leaves(found), strict=True):
        assert one.dtype == other.dtype == dtype
        # float32 sums; bfloat16 gradients are rounded once by either.
        bound = 4e-6 if dtype == jnp.float32 else 2.0**-7 * float(abs(one).max())
        np.testing.assert_allclose(other.astype(jnp.float32), one.astype(jnp.float32), atol=bound)
    with pytest.raises(ValueError, match="decode_attention: it is for inference"):
        jax.grad(loss)(arrays, None, *suffix(dtype=dtype))


def test_eight_devices_are_one():
    mesh = jax.make_mesh((3, 2), ("data", "heads"), (AxisType.Auto,) * 2, devices=jax.devices()[:6])
    layout = NamedSharding(mesh, P("data", None, "heads", None))
    q = normal(B, T, N, H)
    found = jax.jit(lambda q: run(q, TREE, *suffix(), sharding=layout))(jax.device_put(q, layout))
    check(found, q, TREE, *suffix())


def test_a_prefix_is_one_product_for_the_queries_of_all_sequences():
    """By the grid: the prefix's keys are read for each tile of queries, not for each sequence."""
    case = cases.CASES[0]
    program = jax.jit(cases.forward).trace(*case.args)
    calls = {call.name: call for call in compat.pallas_calls(program.jaxpr)}
    batch, keys, group = 256, 16384, 32 // 8
    # key heads x tiles of 512 queries x blocks of 4096 keys: the rows are 256 sequences x 4 heads.
    assert calls["attention_forward"].grid == (1, 8, batch * group // 512 * keys // 4096)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v6e:2x2"])
def test_compiles(target):
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    for case in cases.CASES:
        args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in case.args]
        lowered = jax.jit(cases.forward).trace(*args).lower(lowering_platforms=("tpu",))
        text = lowered.compile().as_text()
        assert "attention_forward" in text and "decode_attention" in text


def bad(**changes):
    k, v, lengths = suffix()
    given = {"q": normal(B, T, N, H), "prefixes": TREE[:1], "k_cache": k, "v_cache": v}
    return given | {"lengths": lengths} | changes


PREFIX = normal(1, 5, K, H)
ALONE = {"k_cache": None, "v_cache": None, "lengths": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(prefixes=TREE[0]), "prefixes must be a list of Level, got Level"),
        (bad(prefixes=[(PREFIX, PREFIX)]), r"prefixes\[0\] must be a Level, got tuple"),
        (bad(prefixes=[Level(PREFIX[0], PREFIX)]), r"prefixes\[0\].k must be an array \[G, P, K"),
        (bad(prefixes=[Level(PREFIX, PREFIX[:, 1:])]), r"\[0\].v must be of k's shape"),
        (bad(prefixes=[Level(*2 * [normal(1, 5, 3, H)])]), "K a divisor of q's 4 heads"),
        (bad(prefixes=[level(4, 3)]), "4 prefixes do not divide a batch of 6"),
        (bad(prefixes=[level(2, 3, lengths=[1])]), r"\[0\].lengths must be integers \[2\]"),
        (bad(prefixes=[level(2, 3, groups=[0.0] * 6)]), r"\[0\].groups must be .* float32"),
        (bad(lengths=None), "k_cache, v_cache and lengths must be given together"),
        (bad(prefixes=[], k_cache=None, v_cache=None, lengths=None), "at least one Level"),
        (bad(q=normal(B, N, H)), r"q must be an array \[B, T, N, H\]"),
        (bad(q=normal(B, T, N, H).astype("int8")), "q must be of dtype float32, .* got int8"),
        (bad(implementation="gpu"), "implementation must be one of None"),
        (bad(scale="x"), "shared_prefix_attention: scale must be a Python number"),
        (bad(softcap=0.0), "shared_prefix_attention: softcap must be a positive Python number"),
        (bad(**ALONE, pages=jnp.zeros((B, 2), int)), "pages must be None without k_cache"),
        (bad(**ALONE, splits=2), "splits must be None without k_cache"),
        (bad(splits=0), "splits must be a positive integer"),
        (bad(k_cache=jnp.zeros((B, 9, K, H), "int8")), "k_cache must be of dtype float32, "),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        shared_prefix_attention(**arguments)
    assert "\n" not in str(error.value)
