"""Attention over shared prefixes against NumPy in float64 over each sequence's concatenation."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import compat
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


def expected(q, levels, k_cache=None, v_cache=None, lengths=None, scale=H**-0.5, softcap=None):
    """out, lse in float64: a query's keys are listed one by one, then one softmax over them."""
    q = np.asarray(q, np.float64)
    out, lse = np.zeros_like(q), np.full((B, N, T), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        keys, values = [], []
        for one in levels:
            G = one.k.shape[0]
            group = b // (B // G) if one.groups is None else int(one.groups[b])
            if 0 <= group < G:
                end = one.k.shape[1] if one.lengths is None else int(one.lengths[group])
                keys += list(np.asarray(one.k[group, :end, n // (N // K)], np.float64))
                values += list(np.asarray(one.v[group, :end, n // (N // K)], np.float64))
        if k_cache is not None:
            end = max(int(lengths[b]) - T + t + 1, 0)
            keys += list(np.asarray(k_cache[b, :end, n // (N // K)], np.float64))
            values += list(np.asarray(v_cache[b, :end, n // (N // K)], np.float64))
        if keys:
            x = np.array(keys) @ q[b, t, n] * scale
            x = x if softcap is None else softcap * np.tanh(x / softcap)
            most = x.max()
            lse[b, n, t] = most + np.log(np.exp(x - most).sum())
            out[b, t, n] = np.exp(x - lse[b, n, t]) @ np.array(values)
    return out, lse


def check(found, right, out=2e-6, lse=4e-6):
    for value, exact, atol in zip(found, right, (out, lse), strict=True):
        value = np.asarray(value, np.float64)
        np.testing.assert_array_equal(np.isinf(value), np.isinf(exact))
        finite = np.isfinite(exact)
        np.testing.assert_allclose(value[finite], exact[finite], rtol=0, atol=atol)


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
    check(found, expected(q, levels, *own))


def test_scale_and_softcap_reach_every_part():
    q, how = normal(B, T, N, H), {"scale": 0.9, "softcap": 1.5}
    check(run(q, TREE[:2], *suffix(), **how), expected(q, TREE[:2], *suffix(), **how))


def test_paged_suffixes():
    q, (k, v, lengths) = normal(B, T, N, H), suffix(8, (2, 8, 4, 0, 5, 3))
    table = np.random.default_rng(0).permutation(2 * B).reshape(B, 2)
    paged = (jnp.zeros((2 * B, 4, K, H)).at[table].set(x.reshape(B, 2, 4, K, H)) for x in (k, v))
    found = run(q, TREE[:1], *paged, lengths, pages=jnp.asarray(table))
    check(found, expected(q, TREE[:1], k, v, lengths))


def test_bfloat16():
    """Two parts in bfloat16 and their weighted sum: three roundings of values of unit size."""
    dtype = jnp.bfloat16
    q, levels, own = (
        normal(B, T, N, H, dtype=dtype),
        [level(1, 10, dtype=dtype)],
        suffix(dtype=dtype),
    )
    found = run(q, levels, *own)
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32
    check(found, expected(q, levels, *own), out=2**-6, lse=1e-5)


def test_eight_devices_are_one():
    mesh = jax.make_mesh((3, 2), ("data", "heads"), (AxisType.Auto,) * 2, devices=jax.devices()[:6])
    layout = NamedSharding(mesh, P("data", None, "heads", None))
    q = normal(B, T, N, H)
    found = jax.jit(lambda q: run(q, TREE, *suffix(), sharding=layout))(jax.device_put(q, layout))
    check(found, expected(q, TREE, *suffix()))


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
        (bad(implementation="gpu"), "implementation must be one of None"),
        (bad(scale="x"), "scale must be a Python number"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        shared_prefix_attention(**arguments)
    assert "\n" not in str(error.value)
