"""FlashAttention-2: both passes against its algorithms, and how the work is divided."""

import attention_numpy
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Causal, Full, attention, gpu_plan
from pallas_kernels.lab import traffic

NAMES = ("out", "lse", "dq", "dk", "dv")


def forward(q, k, v, block):
    """Forward, one head, float64: O is divided once, and L = m + log l alone is kept."""
    out, m, total = np.zeros_like(q), np.full(len(q), -np.inf), np.zeros(len(q))
    for start in range(0, len(k), block):
        rows = np.arange(start, min(start + block, len(k)))
        scores = np.where(rows <= np.arange(len(q))[:, None], q @ k[rows].T, -np.inf)
        most = np.maximum(m, scores.max(1))
        p, shrink = np.exp(scores - most[:, None]), np.exp(m - most)
        total, out, m = shrink * total + p.sum(1), shrink[:, None] * out + p @ v[rows], most
    return out / total[:, None], m + np.log(total)


def backward(q, k, v, out, lse, dout, block):
    """Backward: P from L, block of keys by block of keys."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    delta = (dout * out).sum(1, keepdims=True)
    for start in range(0, len(k), block):
        rows = np.arange(start, min(start + block, len(k)))
        seen = rows <= np.arange(len(q))[:, None]
        p = np.where(seen, np.exp(q @ k[rows].T - lse[:, None]), 0)
        dv[rows] = p.T @ dout
        ds = p * (dout @ v[rows].T - delta)
        dq += ds @ k[rows]
        dk[rows] = ds.T @ q
    return dq, dk, dv


def test_both_passes_against_the_algorithm():
    random = np.random.default_rng(0)
    T = 200
    q, k, v, dout = (np.float32(random.normal(size=(T, 32))) for _ in range(4))
    arrays = [jnp.asarray(x)[None, :, None] for x in (q, k, v)]

    def attend(q, k, v):
        return attention(q, k, v, mask=Causal(), scale=1.0, return_lse=True)

    (out, lse), pull = jax.vjp(attend, *arrays)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept == 4 * T * 32 + T, "q, k, v, out and a number a row"
    batched = jnp.asarray(dout)[None, :, None]
    found = dict(zip(NAMES, (out, lse, *pull((batched, jnp.zeros_like(lse)))), strict=True))
    naive = attention_numpy.attention(
        *(np.asarray(x) for x in (*arrays, batched, jnp.zeros_like(lse))), scale=1.0,
        seen=np.tri(T, dtype=bool), arithmetic=attention_numpy.Naive(np.float32),
    )  # fmt: skip
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    right, right_lse = forward(q, k, v, block=48)
    gradients = backward(q, k, v, right, right_lse, dout, block=48)
    expected = dict(zip(NAMES, (right, right_lse, *gradients), strict=True))
    for name in NAMES:
        expected[name] = expected[name].reshape(naive[name].shape)
    attention_numpy.check(found, expected, naive, np.float32)


def test_one_item_of_work_for_each_tile():
    """As many items as tiles of queries times heads: one long sequence fills the device."""
    found = gpu_plan.work(Full(), 16, 8192, 8192, 128, 128)
    assert len(found.tiles) == 16 * 8192 // 128
    assert (found.tiles[:, gpu_plan.COUNT] == 8192 // 128).all()
    pairs = {(head, row) for head, row in found.tiles[:, [gpu_plan.HEAD, gpu_plan.ROW]].tolist()}
    assert len(pairs) == len(found.tiles)


def test_causal_skips_half():
    blocks = 64
    full, causal = (
        gpu_plan.work(mask, 1, 128 * blocks, 128 * blocks, 128, 128).tiles[:, gpu_plan.COUNT].sum()
        for mask in (Full(), Causal())
    )
    assert (full, causal) == (blocks**2, blocks * (blocks + 1) // 2)


def test_grouped_queries_read_each_key_once_a_tile():
    """8 query heads: with one key head the windows read no more keys than 8 key heads hold."""

    def read(K):
        q, k = (jax.ShapeDtypeStruct((1, 2048, n, 128), jnp.bfloat16) for n in (8, K))
        (found,) = traffic(attention, q, k, k)
        return found.read

    query, key = 2048 * 8 * 128 * 2, 2048 * 128 * 2
    assert read(8) == query + 2 * 8 * key
    assert read(1) == query + 2 * key
