"""Hydragen: exactness in NumPy, and bytes by count in what TPU compilers make of the op."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient.decoding.hydragen import hydragen_attention, kv_bytes
from efficient.errors import UserError
from efficient.planning import hlo, hlo_cost
from pallas_kernels import compat
from pallas_kernels.decode_attention import cases as decode_cases
from pallas_kernels.decode_attention import tpu_plan
from pallas_kernels.decode_attention.settings import Settings
from pallas_kernels.shared_prefix_attention import Level
from pallas_kernels.shared_prefix_attention import cases as shared_cases

N, K, H = 4, 2, 8
BATCH, SUFFIX, LONG, SHORT = 256, 128, 16384, 1024
READS = 2  # of the prefix on a TPU: two tiles of 512 rows of queries


def softmax_attention(q, keys, values):
    """[T, N, H] to [s_t, K, H]: one softmax over all keys; T lists of keys."""
    out = np.zeros(q.shape)
    for t, n in np.ndindex(q.shape[:2]):
        k, v = (np.asarray(x[t], np.float64)[:, n // (N // K)] for x in (keys, values))
        x = k @ np.asarray(q[t, n], np.float64) / np.sqrt(H)
        weights = np.exp(x - x.max())
        out[t, n] = weights @ v / weights.sum()
    return out


def random(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def batch_of(kind):
    """levels, and for each sequence its prefix of each level as (level, group, length)."""
    root = Level(random(1, 12, K, H), random(1, 12, K, H) + 1)
    branch = Level(random(2, 6, K, H), random(2, 6, K, H) - 1)
    if kind == "flat":
        return [root], [[(0, 0, 12)]] * 4
    if kind == "tree":
        return [root, branch], [[(0, 0, 12), (1, b // 2, 6)] for b in range(4)]
    ends, groups = [2, 5], [1, 0, 1, 1]
    ragged = branch._replace(lengths=jnp.array(ends), groups=jnp.array(groups))
    return [root, ragged], [[(0, 0, 12), (1, g, ends[g])] for g in groups]


@pytest.mark.parametrize("kind", ["flat", "tree", "ragged"])
def test_decomposition_is_exact(kind):
    B, T, S = 4, 2, 9
    levels, prefixes = batch_of(kind)
    q, k, v = random(B, T, N, H), random(B, S, K, H), 2 * random(B, S, K, H)
    lengths = [9, 2, 5, 7]
    found = hydragen_attention(q, levels, k, v, jnp.array(lengths))
    for b in range(B):
        keys, values = (
            [
                np.concatenate([*(getattr(levels[i], part)[g, :n] for i, g, n in prefixes[b]), own])
                for own in (cache[b, : lengths[b] - T + t + 1] for t in range(T))
            ]
            for part, cache in (("k", k), ("v", v))
        )
        np.testing.assert_allclose(found[b], softmax_attention(q[b], keys, values), atol=2e-6)


def traced(cases, name):
    case = next(case for case in cases.CASES if case.name == name)
    program = jax.jit(cases.forward).trace(*case.args)
    return {call.name: call.grid for call in compat.pallas_calls(program.jaxpr)}, case


def test_prefix_is_one_product_of_all_queries():
    """The kernel's grid, key heads x tiles of queries x blocks of keys, knows no sequences."""
    grids, case = traced(shared_cases, "batch_256_prefix_16k")
    B, _, heads, size = case.args[0].shape
    kv_heads, prefix = case.args[1].shape[1:3]
    one, by_head, pairs = grids["attention_forward"]
    tiles = BATCH * heads // kv_heads // 512
    assert (one, by_head, pairs) == (1, kv_heads, tiles * prefix // 4096)
    read = 2 * 2 * by_head * pairs * 4096 * size
    assert read == kv_bytes(B, prefix, 0, kv_heads, size, reads=READS)


def test_bytes_by_count():
    """Blocks that the kernels of both programs copy, times their size, against the formula."""
    grids, case = traced(shared_cases, "batch_256_prefix_16k")
    kv_heads, prefix, size = case.args[1].shape[1:]
    of_prefix = 2 * 2 * np.prod(grids["attention_forward"]) * 4096 * size
    copied = []
    naive_case = traced(decode_cases, "batch_256_16k")[1]
    for suffix in (case.args[3], naive_case.args[1]):
        rows = jax.ShapeDtypeStruct((BATCH, 1, 32, size), jnp.bfloat16)
        plan = tpu_plan.plan(rows, suffix, None, Settings())
        full = tpu_plan.work(jnp.full(BATCH, suffix.shape[1]), plan)
        pages = sum(int(x & 0xFFFF) for x in np.asarray(full["live"]))
        copied.append(2 * 2 * pages * plan.page * plan.K * plan.H)
    own, naive = copied
    assert of_prefix + own == kv_bytes(BATCH, prefix, SUFFIX, kv_heads, size, reads=READS)
    assert naive == kv_bytes(BATCH, prefix, SUFFIX, kv_heads, size)
    assert naive / (of_prefix + own) > 64


@pytest.mark.slow
def test_compiled_programs_copy_no_cache():
    """What the kernels read is all: no cache is copied or transposed around them in HBM.

    Bytes are counted by the programs' text, in which an array is in HBM or in VMEM. XLA's `bytes
    accessed` counts both alike: here a cache of suffixes that is copied to VMEM ahead of its kernel
    three times (read, written, read by the kernel), and all of the merge, which is in VMEM.
    """
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    place = functools.partial(
        jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    counted = []
    for cases, name in (
        (shared_cases, "batch_256_prefix_16k"),
        (decode_cases, "batch_256_16k"),
    ):
        case = traced(cases, name)[1]
        args = [place(x.shape, x.dtype) for x in case.args]
        lowered = jax.jit(cases.forward).trace(*args).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**23, name
        module = hlo.Module(compiled.as_text())
        counted.append(
            sum(
                times * hlo_cost.hbm_bytes(module, computation, instruction)
                for computation, instruction, times in module.scheduled()
            )
        )
    _, kv_heads, prefix, size = traced(shared_cases, "batch_256_prefix_16k")[1].args[1].shape
    # The text has each operand of a kernel once.
    again = (READS - 1) * kv_bytes(1, prefix, 0, kv_heads, size)
    assert counted[1] / (counted[0] + again) > 60, counted


def test_growth_with_the_prefix():
    def growth(**how):
        long, short = (kv_bytes(BATCH, n, SUFFIX, 8, 128, **how) for n in (LONG, SHORT))
        return long / short

    assert growth() == pytest.approx((LONG + SUFFIX) / (SHORT + SUFFIX))
    assert growth() > 14
    assert growth(reads=READS) < 1.9
    assert growth(reads=1) < 1.5


def test_sizes_are_positive():
    with pytest.raises(UserError, match="kv_bytes takes positive sizes"):
        kv_bytes(0, 1, 1, 1, 1)
