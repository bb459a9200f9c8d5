"""FlashAttention: exactness, what it keeps, and HBM bytes counted from the TPU kernels."""

import functools
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient.mixers import flash_attention as paper
from efficient.planning import hlo, hlo_cost
from pallas_kernels.attention import BlockPattern, Full, attention, gpu_plan, tpu
from pallas_kernels.attention.settings import Settings
from pallas_kernels.lab import traffic


def recurrence(q, k, v, block):
    """The online softmax for one head in float64: O divided at every block, m and the sum."""
    out, m, total = np.zeros_like(q), np.full(len(q), -np.inf), np.zeros(len(q))
    for start in range(0, len(k), block):
        scores = q @ k[start : start + block].T / np.sqrt(q.shape[1])
        most = np.maximum(m, scores.max(1))
        p, shrink = np.exp(scores - most[:, None]), np.exp(m - most)
        old, total = shrink * total, shrink * total + p.sum(1)
        out = (old[:, None] * out + p @ v[start : start + block]) / total[:, None]
        m = most
    return out, m + np.log(total)


def naive_float32(q, k, v):
    scores = q @ k.T / np.float32(np.sqrt(q.shape[1]))
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ v


def test_blocks_are_exact():
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(n, 32)) for n in (300, 700, 700))
    q *= 3
    arrays = [jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k, v)]
    out, lse = attention(*arrays, return_lse=True)
    q, k, v = (np.asarray(x[0, :, 0]) for x in arrays)
    near = naive_float32(q, k, v)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    right, right_lse = recurrence(q, k, v, block=96)
    error = np.abs(np.asarray(out[0, :, 0], np.float64) - right).max()
    assert error <= 2 * np.abs(near - right).max()
    np.testing.assert_allclose(lse[0, 0], right_lse, rtol=1e-6)


def _kept(T, implementation):
    """Numbers that the backward pass keeps of one call."""
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)

    def pull(q, k, v):
        return jax.vjp(functools.partial(attention, implementation=implementation), q, k, v)[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pull, x, x, x)))


def test_what_backward_keeps_is_linear_in_length():
    """q, k, v, out and the log-sum-exp; standard attention keeps its T x T weights."""
    for T in (64, 1024):
        assert _kept(T, None) == 4 * T * 2 * 16 + 2 * T
        assert _kept(T, "reference") >= 2 * T * T


def _flash(T, mask=None, N=1, rows=None):
    x = jax.ShapeDtypeStruct((1, T, N, 128), jnp.bfloat16)
    mask = Full() if mask is None else mask
    settings = Settings(mask, 128**-0.5, block_q=rows, block_kv=2048)
    (found,) = traffic(lambda *qkv: tpu.forward(*qkv, *[None] * 4, settings), x, x, x)
    return found


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_hbm_bytes_are_those_of_the_theorem(rows):
    """Keys are read once for every `rows` queries: twice the length, four times the bytes."""
    for T in (4096, 8192):
        log_sum_exp = 4 * T  # float32, where the formula counts elements of 2 bytes
        elements = paper.flash_elements(T, 128, rows) - T
        assert _flash(T, rows=rows).moved == 2 * elements + log_sum_exp


def test_block_sparse_work_is_that_of_live_blocks():
    """Hopper's list names the live blocks; the TPU's steps of 2048 keys those that hold one."""
    random = np.random.default_rng(0)
    T, block = 8192, 512
    for density in (0.1, 0.3):
        live = random.random((16, 16)) < density
        live[np.arange(16), np.arange(16)] = True
        mask = BlockPattern(live, block)
        work = gpu_plan.work(mask, 1, T, T, block, block)
        assert work.tiles[:, gpu_plan.COUNT].sum() == live.sum()
        assert _flash(T, mask).steps == live.reshape(16, 4, 4).any(2).sum()
    diagonal = _flash(T, BlockPattern(np.eye(16, dtype=bool), block))
    assert diagonal.steps == _flash(T).steps / 4
    # The diagonal: each block of 2048 keys once, queries once.
    assert diagonal.moved == 2 * 4 * T * 128 + 4 * T


TOKENS, HEADS = 8192, 8  # of a batch; heads of 128
LENGTHS = (1024, 2048, 4096, 8192)


def _standard(q, k, v, *dout):
    attend = functools.partial(attention, implementation="reference")
    if not dout:
        return attend(q, k, v)
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(*dout)


def _kernels(q, k, v, *dout):
    given = q, k, v, *[None] * 4
    settings = Settings(Full(), 128**-0.5)
    out, lse = tpu.forward(*given, settings)
    if not dout:
        return out
    return out, tpu.backward(*given, out, lse, *dout, jnp.zeros_like(lse), settings)[:3]


def _hbm_bytes(fn, T, place, backward):
    """Of fn compiled for a TPU: XLA's own operations by the program's text, kernels by `traffic`.

    The text tells which arrays are in HBM, which XLA's `bytes accessed` does not.
    """
    x = jax.ShapeDtypeStruct((TOKENS // T, T, HEADS, 128), jnp.bfloat16, sharding=place)
    args = [x] * (4 if backward else 3)
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
    module = hlo.Module(lowered.compile().as_text())
    found = sum(
        times * hlo_cost.hbm_bytes(module, computation, instruction)
        for computation, instruction, times in module.scheduled()
        if "tpu_custom_call" not in instruction.attributes
    )
    assert not module.notes
    return found + sum(kernel.moved for kernel in traffic(fn, *args))


@pytest.mark.slow
def test_hbm_bytes_against_standard_attention():
    """Both compiled for v5e, forward and with gradients; nothing is run. `-s` prints the table."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    print("\n| length | pass | standard, MB | FlashAttention, MB | ratio |\n|---|---|---|---|---|")
    for T, backward in itertools.product(LENGTHS, (False, True)):
        standard, flash = (_hbm_bytes(fn, T, place, backward) for fn in (_standard, _kernels))
        what = "forward and backward" if backward else "forward"
        print(
            f"| {T:,} | {what} | {standard / 1e6:,.0f} | {flash / 1e6:,.0f} "
            f"| {standard / flash:.1f} |"
        )
        assert standard > 2 * HEADS * TOKENS // T * paper.standard_elements(T, 128)
        assert standard > (6 if T == 1024 else 10) * flash
