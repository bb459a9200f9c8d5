"""The TPU kernels of attention: what they visit, their numbers in the interpreter, the compiler.

Numbers are checked in Pallas' TPU interpreter with race detection and memory that starts as NaN,
against NumPy in float64. The compiler is the real one; it needs libtpu and no TPU.
"""

import functools
import os
import re

import attention_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from races import no_races

from pallas_kernels.attention import (
    attention,
    cases,
    dispatch,
    dropout,
    masks,
    patterns,
    tpu,
    tpu_plan,
    tpu_scores,
)
from pallas_kernels.attention.masks import (
    BlockPattern,
    Causal,
    Empty,
    Full,
    Heads,
    Prefix,
    Sinks,
    Stride,
    Window,
)
from pallas_kernels.attention.settings import Settings

LAMBDA = Causal() & (Window(100, None) | Sinks(4))
FOUR = Heads([Causal(), Causal() & Window(64), Full(), Empty()])
PATTERN = BlockPattern(np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]), 128)
BY_HEAD = BlockPattern(np.random.default_rng(1).integers(0, 2, (2, 4, 4)), 128)
S2 = patterns.s2_attention(4, stride=4, local_blocks=1)
# Blocks that lie across the kernels' own: more partial kinds than the kernels have code for.
S2_FINE = patterns.s2_attention(4, stride=4, block=48, local_blocks=2, dense_heads=1)
WINDOWS = Heads([Window(30 + 40 * n) | Sinks(n + 1) for n in range(4)])
MANY = Heads(
    [Window(20) | Stride(3), Causal() & (Window(50) | Stride(5, 1, 24)), Causal(9), Full()]
)


# ---- what is visited


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        (Causal(40), 300, 500),
        (LAMBDA, 640, 640),
        (FOUR, 384, 384),
        (PATTERN, 512, 512),
        (S2, 640, 640),
        (S2_FINE, 520, 600),
        (WINDOWS, 384, 384),
        (MANY & (Causal(60) | Prefix(200)), 384, 420),
    ],
)
def test_plan_covers_the_mask(mask, T, S, group):
    """The pieces visited, with the masks that remain in them, are the mask: no more, no less."""
    tile = tpu_plan.tiling(Settings(mask=mask, block_q=128, block_kv=256), T, S, 512, 2048)
    plan = tpu_plan.plan(mask, 4, T, S, tile, group)
    heads = [0] if plan.head is None else range(4)
    t, s = np.arange(T)[:, None], np.arange(S)[None]
    seen = {n: np.zeros((T + 512, S + 512), int) for n in heads}
    owners = []
    for p, (index, state) in enumerate(zip(plan.index.tolist(), plan.state.tolist())):
        n = 0 if plan.head is None else int(plan.head[p])
        q, kv = index >> 16, index & 0xFFFF
        owners.append(
            (n // group, kv) if group and plan.head is not None else (n, kv if group else q)
        )
        region = state >> tpu_plan.REGION
        pieces = tpu_plan.pieces_of(np.array([state]), tile)[0].tolist()
        assert region == 0 or plan.regions[region - 1] == tuple(pieces)
        for piece in range(tile.pieces):
            kind = (state >> (tpu_plan.SHIFT + tpu_plan.WIDTH * piece)) & 7
            rows = q * tile.block_q + np.arange(tile.block_q)[:, None]
            columns = kv * tile.block_kv + piece * tile.piece + np.arange(tile.piece)[None]
            seen[n][rows, columns] += np.broadcast_to(
                plan.masks[kind].element(n, rows, columns), (tile.block_q, tile.piece)
            )
    for n in heads:
        right = np.broadcast_to(mask.head(n).element(n, t, s), (T, S))
        np.testing.assert_array_equal(seen[n][:T, :S], right)
        assert not seen[n][:T, S:].any(), "keys beyond S are visited"
    starts = [p for p in range(len(owners)) if p == 0 or owners[p] != owners[p - 1]]
    assert [p for p, x in enumerate(plan.state) if x & tpu_plan.FIRST] == starts
    ends = [p for p, x in enumerate(plan.state) if x & tpu_plan.LAST]
    assert ends == [*(p - 1 for p in starts[1:]), len(owners) - 1]
    tiles = -(-S // tile.block_kv) if group else -(-T // tile.block_q)
    parts = len(heads) // (group if group and plan.head is not None else 1)
    assert len(set(owners)) == len(starts) == tiles * parts, "every output is written once"


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_laboratorys_cases_sample_keys_that_all_queries_see(case):
    """So scores out of range are the only exceptions in their kernels, as `EXCEPTIONS` has it."""
    q, k, _ = case.args_of("forward")
    mask, T, S = case.kernels["forward"].fn.keywords["mask"], q.shape[1], k.shape[1]
    tile = tpu_plan.tiling(Settings(mask=mask), T, S, 512, 2048)
    plan = tpu_plan.plan(mask, q.shape[2], T, S, tile)
    first = plan.state & tpu_plan.FIRST > 0
    assert plan.complete and first.sum() == -(-T // tile.block_q)
    for index, state in zip(plan.index[first].tolist(), plan.state[first].tolist()):
        t = (index >> 16) * tile.block_q + np.arange(tile.block_q)[:, None]
        piece = state >> tpu_plan.SAMPLE & tpu_plan.MOST_PIECES - 1
        s = (index & 0xFFFF) * tile.block_kv + piece * tile.piece + np.arange(128)
        assert np.broadcast_to(mask.element(0, t, s), (tile.block_q, 128)).any(1).all()


def test_corners_are_what_a_mask_leaves_of_quarters():
    tile = tpu_plan.tiling(Settings(), 4096, 4096, 512, 2048)
    causal = tpu_plan.plan(Causal(), 1, 4096, 4096, tile)
    assert causal.masks == (Empty(), Full(), Causal())
    empty, partial, full = masks.EMPTY, masks.PARTIAL, masks.FULL
    assert causal.corners == (None, None, ((partial, empty), (full, partial)))
    # Keys s <= t + 100 leave other quarters of a tile beside the diagonal than of one on it.
    shifted = tpu_plan.plan(Causal(100), 1, 4096, 4096, tile)
    assert shifted.corners[2] is None
    rows = {(1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 0), (1, 2, 0, 0), (2, 0, 0, 0)}
    assert causal.complete and set(causal.regions) == rows and len(causal.regions) == 5


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(
    ("mask", "live"),
    [
        (Full(), 64),
        (Causal(), 36),
        (Window(512), 15),
        (Causal() & (Window(512) | Sinks(4)), 21),
        # Pieces of 128 keys: each tile's own 4, and of 8 tiles' far blocks every eighth.
        (patterns.s2_attention(2, stride=8, local_blocks=1), [8 * 4 + 16, 8 * 4 + 12]),
        (patterns.strided_blocks(512, 8, 256), 38),
        (BlockPattern(np.eye(32, dtype=int), 128), 32),
    ],
)
def test_products_are_those_of_pieces_in_which_something_is_seen(mask, live, by_keys):
    """Counted by piece of 512 keys or fewer, of which a step of the grid has up to four."""
    T, heads = 4096, 2
    tile = tpu_plan.tiling(Settings(mask=mask), T, T, 512, 1024 if by_keys else 2048)
    plan = tpu_plan.plan(mask, heads, T, T, tile, by_keys and 1)
    kinds = tpu_plan.pieces_of(plan.state, tile)
    assert kinds.any(1).all(), "a step has a product"
    found = np.zeros(heads, int)
    for n in range(heads):
        found[n] = (kinds[slice(None) if plan.head is None else plan.head == n] > 0).sum()
        t, s = np.arange(T)[:, None], np.arange(T)
        seen = np.broadcast_to(mask.head(n).element(n, t, s), (T, T))
        sides = T // tile.block_q, tile.block_q, T // tile.piece, tile.piece
        assert found[n] == seen.reshape(sides).any((1, 3)).sum()
    assert (found == live).all()
    # A step in straight code multiplies its live pieces and nothing else.
    for region in plan.regions:
        keys = sum(size for _, size, _ in tpu_scores.runs(region, plan, tile))
        assert keys == tile.piece * np.count_nonzero(region)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float64}, "dtype"),
        ({"H": 512}, "head size 512"),
        ({"H": 60}, "head size 60"),
        ({"block_q": 100}, "block_q 100"),
        ({"mask": BlockPattern(np.eye(8, dtype=int), 32)}, "multiples of 128"),
        ({}, None),
        ({"mask": PATTERN, "T": 512}, None),
    ],
)
def test_unsupported_says_why(change, reason):
    change = {"T": 256, "H": 64, "dtype": jnp.bfloat16, "mask": Full(), "block_q": None} | change
    q = np.zeros((1, change["T"], 2, change["H"]), change["dtype"])
    settings = Settings(mask=change["mask"], block_q=change["block_q"])
    found = tpu.unsupported(q, q, q, None, None, None, None, settings)
    assert found is None if reason is None else reason in found


# ---- numbers


def _inputs(B, T, S, N, K, H, dtype, segments, bias, alibi, rate, steep):
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=size) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    ]
    arrays[0] *= steep
    if steep > 1:  # scores that grow along the keys: later ones exceed every sample of the first
        arrays[1] *= np.linspace(0, 1, S)[:, None, None]
    q, k, v, dout = (jnp.asarray(x, dtype) for x in arrays)
    ids = None
    if segments:
        ids = tuple(jnp.asarray(np.sort(rng.integers(0, 4, (B, n))), jnp.int32) for n in (T, S))
    bias = None if bias is None else jnp.asarray(rng.normal(size=bias), jnp.float32)
    slopes = jnp.asarray(2.0 ** -np.arange(1, N + 1), jnp.float32) if alibi else None
    seeds = dropout.seeds(jax.random.key(0), B, N) if rate else None
    dlse = jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)
    return (q, k, v, bias, slopes, ids, seeds), dout, dlse


def _interpreter():
    return pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
    )


def _run(given, dout, dlse, settings):
    interpret = _interpreter()
    with no_races():
        out, lse = tpu.forward(*given, settings, interpret=interpret)
        back = tpu.backward(*given, out, lse, dout, dlse, settings, interpret=interpret)
    dq, dk, dv, dbias = back
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}


def _compare(
    *, B=1, T=256, S=None, N=2, K=None, H=64, dtype=jnp.float32, mask=Full(), segments=False,
    bias=None, alibi=False, softcap=None, rate=0.0, block_q=128, block_kv=256, steep=1.0,
):  # fmt: skip
    S, K = S or T, K or N
    given, dout, dlse = _inputs(B, T, S, N, K, H, dtype, segments, bias, alibi, rate, steep)
    settings = Settings(
        mask, H**-0.5, softcap, rate, alibi_offset=S - T, block_q=block_q, block_kv=block_kv
    )
    assert tpu.unsupported(*given, settings) is None
    found = _run(given, dout, dlse, settings)
    q, k, v, b, slopes, ids, seeds = (jax.tree.map(np.asarray, x) for x in given)
    n, t, s = np.arange(N)[:, None, None], np.arange(T)[:, None], np.arange(S)
    seen = np.broadcast_to(mask.element(n, t, s), (B, N, T, S))
    if ids is not None:
        seen = seen & (ids[0][:, :, None] == ids[1][:, None, :])[:, None]
    kept = None
    if rate:
        kept = dropout.keep(seeds[..., 0, None, None], seeds[..., 1, None, None], t, s, rate)
    right, naive = (
        attention_numpy.attention(
            q, k, v, np.asarray(dout), np.asarray(dlse), seen=seen, scale=H**-0.5, bias=b,
            alibi=slopes, offset=S - T, softcap=softcap, kept=kept, rate=rate, arithmetic=math,
        )
        for math in (attention_numpy.Exact(), attention_numpy.Naive(dtype))
    )  # fmt: skip
    if b is None:
        del found["dbias"]
    else:
        axes = tuple(axis for axis in range(4) if b.shape[axis] == 1)
        for each in (right, naive):
            each["dbias"] = np.asarray(each["dbias"]).sum(axes, keepdims=True)
    assert found["out"].dtype == found["dq"].dtype == dtype
    attention_numpy.check(found, right, naive, dtype)


def test_grouped_causal_bfloat16():
    _compare(mask=Causal(), N=4, K=2, dtype=jnp.bfloat16)


def test_ragged_lengths_and_rows_that_see_nothing():
    _compare(mask=Causal(-60), T=200, S=300, H=80)


def test_one_tile_of_one_block_whose_corners_are_skipped():
    _compare(mask=Causal(), T=512, N=1, dtype=jnp.bfloat16, block_q=512, block_kv=None)


def test_reference_value_exceeded():
    """Scores far beyond the sample's maximum: the exact path does these queries again."""
    _compare(T=128, S=512, block_kv=512, N=1, steep=30.0)


@pytest.mark.slow
def test_dropout_softcap_and_a_row_of_bias():
    _compare(rate=0.3, softcap=2.0, bias=(1, 1, 1, 256), T=128, S=256)


SLOW = {
    "full": {},
    "float16": {"dtype": jnp.float16},
    "bfloat16_bias": {"dtype": jnp.bfloat16, "bias": (1, 2, 256, 256), "B": 2},
    "head_128": {"H": 128, "mask": Causal(), "dtype": jnp.bfloat16},
    "head_192": {"H": 192, "mask": Causal(), "T": 128},
    "head_256": {"H": 256, "T": 128, "dtype": jnp.bfloat16},
    "multi_query": {"N": 4, "K": 1, "mask": Causal()},
    "lambda": {"mask": LAMBDA, "T": 512, "block_kv": 512},
    "window": {"mask": Window(100, 20), "T": 384, "S": 512, "block_kv": 512},
    "prefix": {"mask": Causal() | masks.Prefix(70), "T": 300},
    "heads": {"mask": FOUR, "T": 384, "N": 4, "K": 2},
    "pattern": {"mask": PATTERN, "T": 512, "block_kv": 512},
    "pattern_heads": {"mask": BY_HEAD & Causal(), "T": 512, "block_kv": 512},
    "s2": {"mask": S2, "T": 512, "N": 4, "K": 2, "block_kv": None},
    "s2_segments": {"mask": S2, "T": 512, "N": 4, "block_kv": None, "segments": True},
    "s2_fine_ragged": {"mask": S2_FINE, "T": 300, "N": 4, "K": 2},
    "windows": {"mask": WINDOWS, "N": 4},
    "many_kinds": {"mask": MANY & (Causal(60) | Prefix(200)), "N": 4},
    "bias": {"bias": (2, 1, 200, 300), "T": 200, "S": 300, "B": 2, "mask": Causal()},
    "alibi": {"alibi": True, "mask": Causal(56), "T": 200, "S": 256},
    "segments": {"segments": True, "mask": Causal(), "T": 512, "B": 2, "block_kv": 512},
    "segments_full": {"segments": True, "T": 300, "S": 200},
    "dropout": {"rate": 0.3, "B": 2, "mask": Causal()},
    "softcap": {"softcap": 5.0, "steep": 3.0},
    "blocks_with_corners": {
        "mask": Causal(1024),
        "T": 1024,
        "S": 2048,
        "N": 1,
        "block_q": 256,
        "block_kv": 1024,
    },
    "steep_corners": {
        "steep": 30.0,
        "mask": Causal(),
        "T": 1024,
        "N": 1,
        "block_q": 256,
        "block_kv": 1024,
    },
    "steep_alone": {"steep": 30.0, "mask": Causal(), "T": 256, "N": 1, "block_q": 256},
    "late_reference": {"mask": Window(100), "T": 512, "steep": 30.0, "block_kv": 512},
    "steep_causal": {"steep": 30.0, "mask": Causal(), "T": 512, "block_kv": 512},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_numbers(name):
    _compare(**SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_learned_sinks(dtype, monkeypatch):
    """By the public function, the kernels under it; the first queries see the sink alone."""

    def run(direction, _, settings, *arrays):
        settings = settings._replace(block_q=128, block_kv=256)
        with no_races():
            return getattr(tpu, direction)(*arrays, settings, interpret=_interpreter())

    monkeypatch.setattr(dispatch, "run", run)
    attention_numpy.check_learned_sinks(Causal(-60), (1, 200, 256, 4, 2, 64), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 1, 256), (2, 1, 256, 256)])
def test_a_row_hidden_by_an_infinite_bias_gives_zeros(shape):
    given, dout, dlse = _inputs(2, 256, 256, 2, 1, 64, jnp.float32, False, shape, False, 0.0, 1.0)
    bias = given[3].at[0].set(-jnp.inf).at[1, ..., 100:140].set(-jnp.inf)
    given = (*given[:3], bias, *given[4:])
    settings = Settings(Causal(), 64**-0.5, block_q=128, block_kv=256)
    found = _run(given, dout, dlse.at[0].set(0), settings)
    assert (found["lse"][0] == -jnp.inf).all() and jnp.isfinite(found["lse"][1]).all()
    for name in ("out", "dq", "dk", "dv", "dbias"):
        assert (found[name][0] == 0).all() and jnp.isfinite(found[name]).all(), name
        assert jnp.abs(found[name][1]).max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 4])
def test_heads_in_parts_where_their_pairs_do_not_fit_together(heads, monkeypatch):
    mask = Heads([Causal(), Causal() & Window(64), Window(130), Causal() & Window(64)])
    tile = tpu_plan.tiling(Settings(mask=mask, block_q=128, block_kv=256), 256, 256, 512, 2048)
    assert tpu_plan.parts(mask, 4, 2, 256, 256, tile) == 1
    monkeypatch.setattr(tpu_plan, "MOST_PAIRS", 7)
    assert tpu_plan.parts(mask, 4, 2, 256, 256, tile) == 2
    _compare(mask=mask, N=4, K=2, bias=(2, heads, 1, 256), alibi=True, rate=0.2, B=2)


def test_heads_of_a_long_context_go_in_parts():
    q = jax.ShapeDtypeStruct((1, 65536, 16, 128), jnp.bfloat16)
    mask = patterns.s2_attention(16, stride=8)
    tile = tpu_plan.tiling(Settings(mask=mask), 65536, 65536, 512, 2048)
    assert tpu_plan.parts(mask, 16, 16, 65536, 65536, tile) == 2
    assert tpu.unsupported(q, q, q, None, None, None, None, Settings(mask=mask)) is None


@pytest.mark.slow
def test_two_backward_kernels_where_dq_does_not_fit(monkeypatch):
    monkeypatch.setattr(tpu, "FUSED_MOST", 0)
    _compare(mask=Causal(), N=4, K=2, T=300)


@pytest.mark.slow
def test_repeatable_to_the_bit():
    given, dout, dlse = _inputs(1, 256, 256, 4, 2, 64, jnp.bfloat16, False, None, False, 0.0, 1.0)
    settings = Settings(Causal(), block_q=128, block_kv=256)
    first, second = (_run(given, dout, dlse, settings) for _ in range(2))
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(first[name], second[name])


# ---- the public function


def _gradients(q, k, v, dout, extra, **options):
    def attend(q, k, v, extra):
        return attention(q, k, v, **extra, **options)

    out, pull = jax.vjp(attend, q, k, v, extra)
    *gradients, of_extra = pull(dout)
    # All of them, or else JAX may drop the kernel of the bias; integers have none.
    real = {name: extra[name].dtype.kind == "f" for name in extra}
    return out, gradients, {name: g for name, g in of_extra.items() if real[name]}


BOTH = ["forward", "backward"]
# The mask, other arrays, and the kernels of a step on a TPU.
PUBLIC = {
    "full": (Full(), {}, BOTH),
    "causal": (Causal(), {}, BOTH),
    "lambda": (LAMBDA, {}, BOTH),
    "s2": (
        patterns.s2_attention(4, stride=4), {}, ["forward", "backward_keys", "backward_queries"]
    ),
    "pattern": (PATTERN, {}, BOTH),
    "padding": (Causal(), {"bias": ((2, 1, 1, 512), jnp.float32)}, [*BOTH, "backward_bias"]),
    "learned_sinks": (Causal(), {"sinks": ((4,), jnp.float32)}, BOTH),
    "alibi": (Causal(), {"alibi": ((4,), jnp.float32)}, BOTH),
    "segments": (Causal(), {"segment_ids": ((2, 512), jnp.int32)}, BOTH),
    "small_pattern": (BlockPattern(np.eye(8, dtype=int), 64), {}, []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:attention. not the tpu kernel")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_function_lowers_to_the_kernels_on_a_tpu_alone(name):
    mask, extra, expected = PUBLIC[name]
    q, k = (jax.ShapeDtypeStruct((2, 512, heads, 64), jnp.bfloat16) for heads in (4, 2))
    extra = {key: jax.ShapeDtypeStruct(*form) for key, form in extra.items()}
    for platform in ("tpu", "cpu", "cuda"):
        step = jax.jit(functools.partial(_gradients, mask=mask))
        text = step.trace(q, k, k, q, extra).lower(lowering_platforms=(platform,)).as_text()
        kernels = re.findall(r'kernel_name = "attention_(\w+)"', text)
        assert text.count("@tpu_custom_call") == len(kernels)
        assert kernels == (expected if platform == "tpu" else []), platform


def test_on_a_mesh_each_device_runs_the_kernels_on_its_own_heads():
    """Compiled for four v5e, batch x heads: no device gathers what another has."""
    devices = _topology("v5e:2x2")
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "heads"))
    layout = NamedSharding(mesh, P("data", None, "heads", None))
    q, k = (jax.ShapeDtypeStruct((4, 512, heads, 128), jnp.bfloat16, sharding=layout)
            for heads in (8, 4))  # fmt: skip
    step = jax.jit(functools.partial(_gradients, extra={}, mask=Causal(), sharding=layout))
    compiled = step.trace(q, k, k, q).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) == 2 and all("bf16[2,4,512,128]" in line for line in calls)
    moved = re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
    assert not moved
    assert all(x.spec == layout.spec for x in jax.tree.leaves(compiled.output_shardings))


# ---- the compiler


def _topology(target):
    """The devices of a TPU that is not there."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices


def _step(q, k, v, dout, dlse, extra, settings):
    ids = (extra["q_ids"], extra["kv_ids"]) if "q_ids" in extra else None
    bias = extra.get("bias", extra.get("padding"))
    given = (q, k, v, bias, extra.get("alibi"), ids, extra.get("seeds"))
    out, lse = tpu.forward(*given, settings)
    return out, lse, tpu.backward(*given, out, lse, dout, dlse, settings)


def _compile(
    target,
    *,
    B=1,
    T=512,
    S=None,
    N=2,
    K=None,
    H=128,
    dtype=jnp.bfloat16,
    extra=(),
    rate=0.0,
    **static,
):
    S, K = S or T, K or N
    shapes = {
        "q_ids": ((B, T), jnp.int32),
        "kv_ids": ((B, S), jnp.int32),
        "bias": ((1, N, T, S), jnp.float32),
        "padding": ((B, 1, 1, S), jnp.float32),
        "alibi": ((N,), jnp.float32),
        "seeds": ((B, N, 2), jnp.uint32),
    }
    device = _topology(target)[0]
    of = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    q, k = of((B, T, N, H), dtype), of((B, S, K, H), dtype)
    given = (q, k, k, q, of((B, N, T), jnp.float32), {name: of(*shapes[name]) for name in extra})
    step = functools.partial(
        _step, settings=Settings(scale=H**-0.5, dropout_rate=rate, alibi_offset=S - T, **static)
    )
    return jax.jit(step).trace(*given).lower(lowering_platforms=("tpu",)).compile()


def test_compiles_for_v6e():
    text = _compile("v6e:2x2", mask=Causal(), T=256).as_text()
    assert "attention_forward" in text and "attention_backward" in text


COMPILED = {
    "full": {"T": 2048},
    "causal_gqa": {"T": 2048, "mask": Causal(), "N": 4, "K": 2},
    "head_64": {"H": 64},
    "head_80_ragged": {"H": 80, "T": 300, "S": 1100, "mask": Causal(800)},
    "head_192": {"H": 192, "mask": Causal()},
    "head_256": {"H": 256, "T": 2048},
    "head_256_gqa_of_4096": {"H": 256, "T": 4096, "N": 8, "K": 2},
    "head_256_bias_of_4096": {"H": 256, "T": 4096, "extra": ("bias",)},
    "float32": {"dtype": jnp.float32, "mask": Causal()},
    "float32_head_256": {"dtype": jnp.float32, "H": 256, "T": 1024},
    "float16": {"dtype": jnp.float16},
    "lambda": {"mask": LAMBDA, "T": 1024},
    "heads": {"mask": FOUR, "N": 4, "K": 2, "T": 1024},
    "pattern": {"mask": PATTERN},
    "pattern_heads": {"mask": BY_HEAD & Causal()},
    "s2": {"mask": patterns.s2_attention(16, stride=8), "N": 16, "K": 4, "T": 2048},
    "s2_segments": {
        "mask": patterns.s2_attention(16, stride=8),
        "N": 16,
        "T": 1024,
        "extra": ("q_ids", "kv_ids"),
    },
    "s2_fine_ragged": {"mask": S2_FINE, "N": 4, "K": 2, "T": 1000},
    "windows": {"mask": WINDOWS, "N": 4},
    "many_kinds": {"mask": MANY & (Causal(60) | Prefix(200)), "N": 4},
    "segments": {"extra": ("q_ids", "kv_ids"), "mask": Causal(), "T": 1024, "B": 2},
    "bias": {"extra": ("bias",)},
    "padding": {"extra": ("padding",), "mask": Causal(), "B": 2},
    "padding_float32_ragged": {
        "extra": ("padding",),
        "B": 2,
        "T": 300,
        "S": 520,
        "dtype": jnp.float32,
    },
    "alibi": {"extra": ("alibi",), "mask": Causal()},
    "dropout": {"extra": ("seeds",), "rate": 0.1},
    "softcap": {"softcap": 30.0},
    "short": {"T": 100},
}


TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
ON_ALL = ("full", "causal_gqa", "head_256", "float32", "heads", "segments", "bias", "dropout")
# Every other case on one of the three, by turns.
PAIRS = [(n, t) for n in ON_ALL for t in TARGETS]
PAIRS += [(n, TARGETS[i % 3]) for i, n in enumerate(n for n in COMPILED if n not in ON_ALL)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_compiles(name, target):
    _compile(target, **COMPILED[name])


@pytest.mark.slow
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_memory_is_linear_in_length(mask):
    """131,072 tokens, forward and backward, on one v5p: temporaries of a few times the inputs."""
    memory = [
        _compile("v5p:2x2x1", T=T, mask=mask).memory_analysis().temp_size_in_bytes
        for T in (65536, 131072)
    ]
    assert memory[1] <= 2.1 * memory[0]
    assert memory[1] <= 3 * (4 * 131072 * 2 * 128 * 2)
