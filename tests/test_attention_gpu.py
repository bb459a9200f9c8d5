"""The Hopper kernels of attention: numbers in the Mosaic GPU interpreter, and the real compiler.

The interpreter detects races between copies and reads; memory starts as NaN.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import attention_numpy
import hopper_checks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_hopper import (
    BY_HEAD,
    COMPILED,
    HEADS,
    LAMBDA,
    MANY,
    PATTERN,
    S2_FINE,
    WINDOWS,
)

from pallas_kernels.attention import dispatch, gpu, gpu_plan, patterns
from pallas_kernels.attention.gpu_ops import Machine
from pallas_kernels.attention.masks import (
    BlockPattern,
    Causal,
    Full,
    Heads,
    Prefix,
    Window,
)
from pallas_kernels.attention.settings import Settings
from pallas_kernels.lab.gpu import INSTALL, SHARED_LIMIT, interpreter

# ---- what is visited


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize(
    "mask",
    [
        Full(),
        Causal(),
        Causal(-200),
        HEADS,
        patterns.s2_attention(4, stride=2),
        Heads(S2_FINE.masks[::2]),
        Heads(MANY.masks[:4]),
        Heads(WINDOWS.masks[1].masks[:4]),
    ],
)
def test_lists_cover_what_is_seen_once(mask, group):
    """Every element seen is in one listed block, whose remaining mask agrees with the mask."""
    N, T, S, block_q, block_kv = 4, 300, 420, 128, 64
    work = gpu_plan.work(mask, N, T, S, block_q, block_kv, group)
    found = np.zeros((N, T, S), int)
    for head, row, start, count in work.tiles:
        for word in work.blocks[start : start + count]:
            column, within, kind, mixed = (int(x) for x in gpu_plan.unpack(word))
            n = head * max(group, 1) + within
            q, kv = (column, row) if group else (row, column)
            t = q * block_q + np.arange(block_q)[:, None]
            s = kv * block_kv + np.arange(block_kv)
            seen = np.broadcast_to(work.masks[kind].element(n, t, s), (block_q, block_kv))
            assert not mixed
            assert not seen[:, (s >= S)].any()
            seen = seen[: max(T - t[0, 0], 0), : max(S - s[0], 0)]
            found[n, t[0, 0] : t[0, 0] + len(seen), s[0] : s[0] + seen.shape[1]] += seen
    n, t, s = np.arange(N)[:, None, None], np.arange(T)[:, None], np.arange(S)
    np.testing.assert_array_equal(found, np.broadcast_to(mask.element(n, t, s), (N, T, S)))
    assert len(work.masks) <= gpu_plan.KINDS
    assert (np.diff(work.tiles[:, gpu_plan.COUNT]) <= 0).all()


def test_empty_blocks_are_not_listed():
    work = gpu_plan.work(Causal() & Window(128), 2, 1024, 1024, 128, 128)
    assert len(work.blocks) == 8 + 7


def test_segments_leave_out_blocks_which_have_none_in_common():
    rng = np.random.default_rng(0)
    B, T, block = 3, 512, 64
    ids = np.sort(rng.integers(0, 6, (B, T)), axis=1)
    work = gpu_plan.work(Heads([Causal(), Full()]), 2, T, T, block, block)
    ranges = [ids.reshape(B, -1, block).min(2), ids.reshape(B, -1, block).max(2)]
    ranges = [jnp.asarray(x) for x in ranges]
    tiles, blocks = (np.asarray(x) for x in gpu_plan.lists(work, ranges, ranges))
    for b in range(B):
        same = ids[b][:, None] == ids[b]
        same = same.reshape(T // block, block, T // block, block).swapaxes(1, 2)
        for (_, row, start, count), (*_, every) in zip(tiles[b], work.tiles, strict=True):
            got = [gpu_plan.unpack(x) for x in blocks[b, start : start + count]]
            listed = gpu_plan.unpack(work.blocks[start : start + every])[0]
            assert [x[0] for x in got] == [c for c in listed if same[row, c].any()]
            assert [bool(x[3]) for x in got] == [not same[row, x[0]].all() for x in got]


# ---- what is supported


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"H": 80}, None),
        ({"H": 24}, "head size 24"),
        ({"H": 512}, "head size 512"),
        ({"dtype": np.float32}, "dtype float32"),
        ({"scale": -1.0}, "scale -1"),
        ({"mask": LAMBDA}, None),
        ({"mask": Window(3, block=48)}, None),
        ({"mask": BlockPattern(np.eye(2, dtype=int), 128)}, None),
        ({"mask": BlockPattern(np.eye(32, dtype=int), 8)}, "BlockPattern"),
        ({"bias": True}, "bias"),
        ({"alibi": True}, "alibi"),
        ({"dropout": True}, "dropout"),
    ],
)
def test_unsupported_says_why(change, reason):
    given = {"H": 64, "dtype": jnp.bfloat16, "mask": Full(), "scale": 1.0, **change}
    q = jax.ShapeDtypeStruct((1, 256, 2, given["H"]), given["dtype"])
    rest = (change.get("bias"), change.get("alibi"), None, change.get("dropout"))
    found = gpu.unsupported(q, q, q, *rest, Settings(given["mask"], given["scale"]))
    assert found is None if reason is None else reason in found


# ---- numbers


def _machine():
    interpret = hopper_checks.interpreted()
    return Machine() if interpret is None else Machine(interpret, cores=2)


def _compare(
    *, B=1, T=128, S=None, N=1, K=None, H=64, dtype=jnp.bfloat16, mask=Full(), segments=False,
    softcap=None,
):  # fmt: skip
    S, K = S or T, K or N
    rng = np.random.default_rng(0)
    sizes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    q, k, v, dout = (jnp.asarray(rng.normal(size=size), dtype) for size in sizes)
    dlse = jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)
    ids = None
    if segments:
        ids = tuple(jnp.asarray(np.sort(rng.integers(0, 4, (B, n))), jnp.int32) for n in (T, S))
    settings = Settings(mask, H**-0.5, softcap)
    given = (q, k, v, None, None, ids, None)
    assert gpu.unsupported(*given, settings) is None
    machine = _machine()
    step = jax.jit(lambda *given: gpu.backward(*given, settings, machine)[:3])
    with hopper_checks.no_races():
        out, lse = jax.jit(lambda *given: gpu.forward(*given, settings, machine))(*given)
        dq, dk, dv = step(*given, out, lse, dout, dlse)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    n, t, s = np.arange(N)[:, None, None], np.arange(T)[:, None], np.arange(S)
    seen = np.broadcast_to(mask.element(n, t, s), (B, N, T, S))
    if segments:
        seen = seen & (np.asarray(ids[0])[:, None, :, None] == np.asarray(ids[1])[:, None, None])
    right, naive = (
        attention_numpy.attention(
            *(np.asarray(x) for x in (q, k, v, dout, dlse)),
            seen=seen, scale=H**-0.5, softcap=softcap, arithmetic=math,
        )
        for math in (attention_numpy.Exact(), attention_numpy.Naive(dtype))
    )  # fmt: skip
    assert all(found[name].dtype == dtype for name in ("out", "dq", "dk", "dv"))
    attention_numpy.check(found, right, naive, dtype)


def test_grouped_causal():
    _compare(mask=Causal(), N=2, K=1)


SLOW = {
    "full": {"T": 256},
    "causal_ring_goes_round": {"T": 512, "mask": Causal(), "H": 128},
    "ragged": {"mask": Causal(-30), "T": 140, "S": 200, "B": 2},
    "float16": {"dtype": jnp.float16, "mask": Causal()},
    "head_80": {"H": 80, "mask": Causal()},
    "head_192": {"H": 192, "mask": Causal()},
    "head_256": {"H": 256, "mask": Causal()},
    "multi_query": {"N": 4, "K": 1, "mask": Causal()},
    "lambda": {"mask": LAMBDA, "T": 384},
    "prefix": {"mask": Causal() | Prefix(70), "T": 256},
    "heads": {"mask": HEADS, "T": 256, "N": 4, "K": 2},
    "pattern": {"mask": PATTERN, "T": 256},
    "pattern_heads": {"mask": BY_HEAD & Causal(), "T": 256, "N": 2, "K": 1},
    "s2": {"mask": patterns.s2_attention(4, stride=2, local_blocks=1), "T": 384, "N": 4, "K": 2},
    "s2_fine_ragged": {"mask": S2_FINE, "T": 200, "N": 8, "K": 2},
    "many_kinds": {"mask": MANY, "T": 256, "N": 8, "K": 4},
    "segments": {"segments": True, "mask": Causal(), "T": 256, "B": 2},
    "segments_full": {"segments": True, "T": 200, "S": 300},
    "softcap": {"softcap": 2.0, "mask": Causal()},
}


# The interpreter takes some 15 s a case: these, whose code others run too, are left to the chip.
ON_CHIP = {"full", "head_80", "head_256", "prefix", "pattern", "pattern_heads", "s2"}
ON_CHIP |= {"segments_full"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_numbers(name):
    if name in ON_CHIP and hopper_checks.interpreted() is not None:
        pytest.skip("on a Hopper GPU alone; see tests/hopper_checks.py")
    _compare(**SLOW[name])


@pytest.mark.slow
def test_learned_sinks(monkeypatch):
    """By the public function, the kernels under it; the first queries see the sink alone."""

    def run(direction, _, settings, *arrays):
        assert gpu.unsupported(*arrays[:7], settings) is None
        machine = _machine()
        with hopper_checks.no_races():
            return jax.jit(lambda *x: getattr(gpu, direction)(*x, settings, machine))(*arrays)

    monkeypatch.setattr(dispatch, "run", run)
    attention_numpy.check_learned_sinks(Causal(-40), (1, 128, 192, 2, 1, 64), jnp.bfloat16)


@pytest.mark.slow
def test_repeatable_to_the_bit():
    """What thread blocks run beside each other has no part in the result."""
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=(1, 256, heads, 64)) for heads in (2, 1, 1, 2))
    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    given, settings = (q, k, v, None, None, None, None), Settings(Causal(), 0.125)

    def step(cores):
        machine = dataclasses.replace(_machine(), cores=cores)
        out, lse = jax.jit(lambda *x: gpu.forward(*x, settings, machine))(*given)
        back = jax.jit(lambda *x: gpu.backward(*x, settings, machine)[:3])
        return out, lse, *back(*given, out, lse, dout, 0 * lse)

    for one, other in zip(step(2), step(1), strict=True):
        assert jnp.abs(one).max() > 0
        np.testing.assert_array_equal(one, other)


# ---- the compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h200_without_spills(name):
    """Skipped without jax[cuda13], 4.5 GB, which `make lab-gpu` installs and CI does not."""
    python = interpreter()
    if python is None:
        pytest.skip(INSTALL)
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [python, "-c", f"import attention_hopper as t; t.compile_case({name!r})"],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    names = {kernel for kernel, _, _ in kernels}
    backward = {"attention_backward_queries", "attention_backward_keys"}
    assert names == {"attention_forward", *backward}
    for kernel, spills, shared in kernels:
        assert spills == 0, f"{kernel} puts {spills} bytes of registers out"
        assert shared <= SHARED_LIMIT
