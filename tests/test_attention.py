"""Attention against float64 NumPy: reference, blockwise, every option, every gradient."""

import functools
from typing import Any, NamedTuple

import attention_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import (
    BlockPattern,
    Causal,
    Full,
    Heads,
    Prefix,
    Sinks,
    Stride,
    Window,
    attention,
    blockwise,
    dispatch,
    dropout,
    masks,
    patterns,
)
from pallas_kernels.attention.settings import Settings

KEY = jax.random.key(7)


def make(B, T, S, N, K, H, dtype=np.float32, seed=0):
    """q, k, v, dout, dlse: values that the dtype holds exactly."""
    random = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    arrays = [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(random.standard_normal((B, N, T)), jnp.float32)]


def segments(B, T, seed):
    return jnp.sort(jnp.asarray(np.random.default_rng(seed).integers(0, 3, (B, T)), jnp.int32))


def expectation(arrays, arithmetic=None, ids=None, rate=0.0, **options):
    """The same call in NumPy, dropout's bits taken from the hash."""
    q, k = arrays[:2]
    (B, T, N, H), S = q.shape, k.shape[1]
    mask = options.pop("mask", Full())
    seen = np.broadcast_to(mask.element(*np.ogrid[:N, :T, :S]), (1, N, T, S))
    if ids is not None:
        seen = seen & (np.asarray(ids[0])[:, None, :, None] == np.asarray(ids[1])[:, None, None, :])
    kept = None
    if rate:
        seeds = dropout.seeds(KEY, B, N)[..., None, None]
        kept = dropout.keep(seeds[:, :, 0], seeds[:, :, 1], *np.ogrid[:T, :S], rate)
    options = {name: None if x is None else np.asarray(x) for name, x in options.items()}
    options.setdefault("scale", H**-0.5)
    options.setdefault("offset", S - T)
    arrays = [np.asarray(x).astype(np.float64) for x in arrays]
    with np.errstate(invalid="ignore"):
        return attention_numpy.attention(
            *arrays, seen=seen, kept=np.asarray(kept) if rate else None, rate=rate,
            arithmetic=arithmetic, **options,
        )  # fmt: skip


def call(arrays, implementation, ids=None, rate=0.0, **options):
    """out, lse and all gradients by the public function."""
    q, k, v, dout, dlse = arrays
    offset = options.pop("offset", None)
    learned = {name: options.pop(name) for name in ("bias", "sinks") if name in options}

    @jax.jit
    def run(q, k, v, learned, dout, dlse):
        def attend(q, k, v, learned):
            return attention(
                q, k, v, segment_ids=ids, dropout_rate=rate, dropout_key=KEY if rate else None,
                alibi_offset=offset, return_lse=True, implementation=implementation,
                **learned, **options,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(attend, q, k, v, learned)
        dlse = jnp.where(jnp.isinf(lse), 0, dlse).astype(lse.dtype)
        return out, lse, *pull((dout, dlse))

    out, lse, dq, dk, dv, dlearned = run(q, k, v, learned, dout, dlse)
    assert out.dtype == v.dtype and (dq.dtype, dk.dtype, dv.dtype) == (q.dtype,) * 3
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return found | {f"d{name}": x for name, x in dlearned.items()}


def reduce_bias(expected, found):
    """dbias summed to the shape of the bias, where it is among what was found."""
    if "dbias" in found:
        axes = tuple(i for i, size in enumerate(found["dbias"].shape) if size == 1)
        return expected | {"dbias": expected["dbias"].sum(axes, keepdims=True)}
    return expected


SHAPE = (2, 70, 90, 4, 2, 8)
OPTIONS = {
    "plain": {},
    "causal": {"mask": Causal(20)},
    "rows that see nothing": {"mask": Causal(-10) & Window(5, offset=-10)},
    "sinks of a window": {"mask": Causal() & (Window(12) | Sinks(3))},
    "prefix": {"mask": Causal() | Prefix(9)},
    "heads": {"mask": Heads([Causal(), Full(), Window(5), Causal()])},
    "strided": {"mask": Causal() & (Window(8) | Stride(3, 1, 4))},
    "pattern": {"mask": BlockPattern(np.eye(9, 12) + np.eye(9, 12, 3), (8, 8)) & Causal(30)},
    "bias": {"bias": (2, 4, 70, 90)},
    "bias of keys": {"bias": (2, 1, 1, 90)},
    "bias of heads": {"bias": (1, 4, 70, 90), "mask": Heads([Causal(), Full()] * 2)},
    "alibi": {"alibi": jnp.array([0.5, 0.25, 0.1, 0.0]), "mask": Causal(20)},
    "alibi elsewhere": {"alibi": jnp.array([0.5, 0.25, 0.1, 0.0]), "offset": 3},
    "softcap": {"softcap": 1.5, "scale": 0.7},
    "learned sinks": {"sinks": jnp.array([-1.0, 0.0, 3.0, 8.0]), "mask": Causal(-10)},
    "segments": {"ids": True, "mask": Causal(20)},
    "dropout": {"rate": 0.3, "mask": Causal(20)},
    "everything": {
        "mask": Heads([Causal(), Full()] * 2) & (Window(30) | Sinks(4)), "bias": (1, 4, 1, 90),
        "alibi": jnp.array([0.5, 0.25, 0.1, 0.0]), "softcap": 2.0, "ids": True, "rate": 0.2,
        "sinks": jnp.array([-1.0, 0.0, 1.0, 2.0]), "scale": 0.5,
    },
}  # fmt: skip


# `make test-slow` checks the others.
QUICK = {"causal", "rows that see nothing", "pattern", "bias of heads", "learned sinks"}
QUICK |= {"segments", "dropout", "everything"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in OPTIONS]
)
def test_every_option_and_gradient(name):
    options = dict(OPTIONS[name])
    B, T, S = SHAPE[:3]
    arrays = make(*SHAPE)
    if options.pop("ids", False):
        options["ids"] = segments(B, T, 1), segments(B, S, 2)
    if "bias" in options:
        random = np.random.default_rng(3)
        options["bias"] = jnp.asarray(random.standard_normal(options["bias"]), jnp.float32)
    expected = expectation(arrays, **options)
    arrays[4] = jnp.where(np.isinf(expected["lse"]), 0, arrays[4])
    expected = expectation(arrays, **options)
    naive = expectation(arrays, attention_numpy.Naive(np.float32), **options)
    for implementation in (None, "reference"):
        found = call(arrays, implementation, **options)
        right, near = (reduce_bias(x, found) for x in (expected, naive))
        attention_numpy.check(found, right, near, np.float32, f"{implementation}")


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_learned_sinks_of_narrow_inputs(dtype, implementation):
    arrays, options = make(*SHAPE, dtype), OPTIONS["learned sinks"]
    found = call(arrays, implementation, **options)
    right, naive = (
        expectation(arrays, math, **options) for math in (None, attention_numpy.Naive(dtype))
    )
    attention_numpy.check(found, right, naive, np.dtype(dtype), implementation)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_float64_is_computed_in_float64(implementation):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in make(1, 20, 30, 2, 1, 8)]
        options = {"mask": Causal(10), "softcap": 2.0, "sinks": jnp.array([0.3, -1.0])}
        found = call(arrays, implementation, **options)
        expected = expectation(arrays, **options)
        for name, value in found.items():
            # Float32 anywhere inside would err by 1e-7.
            np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-12, err_msg=name)


def test_second_derivatives_are_those_of_the_reference():
    """At sizes that kernels take."""
    q, k, v = make(1, 128, 128, 1, 1, 64)[:3]

    def second(implementation):
        def loss(q):
            out = attention(q, k, v, mask=Causal(), implementation=implementation)
            return (out**3).sum()

        return jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (jnp.cos(q),))[1])(q)

    found, wanted = (second(i) for i in (None, "reference"))
    largest = np.abs(wanted).max()
    assert largest > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * largest)


class Drawn(NamedTuple):
    """A call of attention: sizes (B, T, S, N, K, H), its static options, and which arrays it has.

    block: sides of the blocks, or None for those of the implementation.
    """

    sizes: tuple
    dtype: Any
    mask: masks.Mask
    softcap: float | None
    rate: float
    arrays: tuple[str, ...]
    block: tuple[int, int] | None
    platform: str


@st.composite
def calls(draw):
    """Heads in groups, masks of every kind, all options, blocks smaller than the lengths."""
    K = draw(st.sampled_from([1, 2]))
    N = K * draw(st.sampled_from([1, 2, 3]))
    T, S, H = draw(st.integers(1, 50)), draw(st.integers(1, 50)), draw(st.sampled_from([4, 8, 20]))

    def pattern(rows, columns, heads, seed):
        shape = heads, -(-T // rows), -(-S // columns)
        live = np.random.default_rng(seed).random(shape) < 0.6
        return BlockPattern(live, (rows, columns))

    sides = st.sampled_from([3, 8, 16])
    leaf = st.one_of(
        st.integers(-20, 40).map(Causal),
        st.builds(Window, st.integers(1, 30), st.integers(0, 9), st.integers(-9, 20)),
        st.integers(1, 30).map(Prefix),
        st.builds(Stride, st.integers(1, 4), st.integers(0, 3), st.sampled_from([1, 8])),
        st.builds(pattern, sides, sides, st.sampled_from([1, N]), st.integers(0, 99)),
        st.just(Full()),
    )
    mask = draw(st.one_of(leaf, st.tuples(leaf, leaf).map(lambda x: x[0] & x[1])))
    mask = mask | draw(leaf) if draw(st.booleans()) else mask
    if draw(st.booleans()):
        mask = Heads([mask, draw(leaf)] * N)  # too many: cut to N below
        mask = Heads(mask.masks[:N])
    names = ("bias", "alibi", "ids", "sinks")
    return Drawn(
        (draw(st.integers(1, 2)), T, S, N, K, H),
        draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])),
        mask,
        draw(st.sampled_from([None, None, 1.0])),
        draw(st.sampled_from([0.0, 0.0, 0.4])),
        tuple(name for name in names if draw(st.booleans())),
        draw(st.sampled_from([None, (8, 8), (8, 24), (16, 8)])),
        draw(st.sampled_from(["cpu", "accelerator"])),
    )


BY_BLOCK = BlockPattern(np.random.default_rng(2).random((2, 3, 4)) < 0.6, (8, 8))
QUICK = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # each try compiles: to shrink takes minutes
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(calls())
@example(
    Drawn(
        (2, 24, 30, 2, 1, 8), jnp.bfloat16, BY_BLOCK & Causal(5), 2.0, 0.4,
        ("bias", "alibi", "ids", "sinks"), (16, 16), "cpu",
    )
)  # fmt: skip
def test_attention_errs_no_more_than_twice_naive_attention(drawn):
    errs_no_more_than_twice_naive_attention(drawn)


@pytest.mark.slow
@settings(QUICK, max_examples=25)
@given(calls())
def test_attention_errs_no_more_than_twice_naive_attention_at_length(drawn):
    errs_no_more_than_twice_naive_attention(drawn)


def errs_no_more_than_twice_naive_attention(drawn):
    B, T, S, N, _, _ = drawn.sizes
    arrays = make(*drawn.sizes, drawn.dtype)
    random = np.random.default_rng(5)
    options = {"mask": drawn.mask, "softcap": drawn.softcap, "rate": drawn.rate}
    if "bias" in drawn.arrays:
        shape = [size if random.random() < 0.6 else 1 for size in (B, N, T)]
        options["bias"] = jnp.asarray(random.standard_normal((*shape, S)), jnp.float32)
    if "alibi" in drawn.arrays:
        options["alibi"] = jnp.asarray(random.random(N), jnp.float32)
    if "sinks" in drawn.arrays:
        options["sinks"] = jnp.asarray(random.standard_normal(N), jnp.float32)
    if "ids" in drawn.arrays:
        options["ids"] = segments(B, T, 1), segments(B, S, 2)
    lse = expectation(arrays, **options)["lse"]
    arrays[4] = jnp.where(np.isinf(lse), 0, arrays[4])
    with pytest.MonkeyPatch.context() as patch:
        if drawn.block is not None:
            patch.setattr(dispatch, "run", functools.partial(run_blocks, drawn))
        found = call(arrays, "blockwise", **options)
    right, naive = (
        reduce_bias(expectation(arrays, math, **options), found)
        for math in (None, attention_numpy.Naive(drawn.dtype))
    )
    attention_numpy.check(found, right, naive, np.dtype(drawn.dtype), str(drawn))


def run_blocks(drawn, direction, implementation, static, *arrays):
    """`dispatch.run` of blockwise, with blocks and a platform which the public function chooses."""
    static = static._replace(block_q=drawn.block[0], block_kv=drawn.block[1])
    return getattr(blockwise, direction)(*arrays, static, platform=drawn.platform)


def test_only_live_blocks_are_visited_and_short_sequences_have_no_loop():
    q, k = (jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32) for _ in "qk")
    for mask, live in ((Causal(), 36), (Full(), 64), (Causal() & Window(128), 15)):
        static = Settings(mask=mask, block_q=128, block_kv=128)
        (plan,) = blockwise._plans(q, k, static, "cpu")
        assert len(plan.pairs) == live
    jaxpr = jax.make_jaxpr(functools.partial(attention, mask=Causal(), implementation="blockwise"))
    short, long = (jnp.zeros((4, T, 4, 64)) for T in (256, 2048))
    assert "scan" in str(jaxpr(long, long, long))
    lowered = jax.jit(attention).lower(short, short, short).as_text()
    assert "stablehlo.while" not in lowered


@pytest.mark.parametrize(("T", "S"), [(130, 130), (64, 1300)], ids=["written out", "loop"])
def test_repeatable_to_the_bit(T, S):
    """Gradients add up over blocks in one order, whatever runs beside."""
    arrays = make(2, T, S, 4, 2, 8, jnp.bfloat16)
    options = {"mask": Causal(S - T), "bias": jnp.ones((1, 4, 1, S)), "rate": 0.2}
    first, second = (call(arrays, "blockwise", **options) for _ in range(2))
    for name, value in first.items():
        assert jnp.abs(value).max() > 0
        np.testing.assert_array_equal(value, second[name], err_msg=name)
    lowered = jax.jit(functools.partial(attention, mask=options["mask"])).lower(*arrays[:3])
    assert ("stablehlo.while" in lowered.as_text()) == (T != S)


def test_memory_is_linear_in_length():
    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 4, 64), jnp.float32)
        loss = lambda q, k, v: attention(q, k, v, mask=Causal()).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    half, whole = temporaries(8192), temporaries(16384)
    assert whole < 2.1 * half
    assert whole < 20 * 16384 * 4 * 64 * 4  # twenty arrays like q; the scores would be 256


@pytest.mark.slow
def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    T = S = 256
    seeds = dropout.seeds(KEY, 2, 2)
    t, s = np.ogrid[:T, :S]
    kept = [
        np.asarray(dropout.keep(seeds[b, n, 0], seeds[b, n, 1], t, s, 0.3)).astype(float)
        for b, n in np.ndindex(2, 2)
    ]
    for mask in kept:
        assert abs(mask.mean() - 0.7) < 4 * (0.21 / T / S) ** 0.5
        assert abs(mask.mean(0) - 0.7).max() < 5 * (0.21 / T) ** 0.5
        assert abs(mask.mean(1) - 0.7).max() < 5 * (0.21 / S) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 3)):  # other heads, other sequences
        assert abs(np.corrcoef(kept[one].ravel(), kept[other].ravel())[0, 1]) < 0.02
    neighbours = np.corrcoef(kept[0][1:].ravel(), kept[0][:-1].ravel())[0, 1]
    along = np.corrcoef(kept[0][:, 1:].ravel(), kept[0][:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.02 and abs(along) < 0.02

    q, k = jnp.zeros((2, T, 4, 8)), jnp.ones((2, S, 4, 8))
    call = functools.partial(attention, q, k, k, dropout_rate=0.3)
    out = call(dropout_key=KEY)
    assert abs(out.mean() - 1) < 0.01 and out.std() > 0.01
    np.testing.assert_allclose(out, call(dropout_key=KEY, implementation="reference"), atol=1e-5)
    assert abs(out - call(dropout_key=jax.random.key(8))).max() > 0.05


def test_packed_sequences_are_as_if_apart():
    arrays = make(1, 200, 200, 2, 1, 8)
    q, k, v = arrays[:3]
    ids = jnp.repeat(jnp.array([3, 5, 9]), np.array([60, 100, 40]), total_repeat_length=200)[None]
    packed = attention(q, k, v, mask=Causal(), segment_ids=ids)
    apart = [
        attention(*(x[:, start:stop] for x in (q, k, v)), mask=Causal())
        for start, stop in ((0, 60), (60, 160), (160, 200))
    ]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=2e-6)


@pytest.mark.slow
def test_vmap_is_a_loop_over_calls():
    arrays = [jnp.stack([x, 2 * x, x + 1]) for x in make(2, 80, 80, 2, 1, 8)[:3]]

    def loss(q, k, v):
        out = attention(q, k, v, mask=Causal())
        return jnp.sin(out).sum()

    grad = jax.grad(loss, (0, 1, 2))
    together = jax.jit(jax.vmap(grad))(*arrays)
    apart = [grad(*(x[i] for x in arrays)) for i in range(3)]
    for one, others in zip(together, zip(*apart)):
        np.testing.assert_allclose(one, jnp.stack(others), atol=2e-5)


def test_a_constant_bias_costs_no_gradient(monkeypatch):
    asked = []
    backward = blockwise.backward

    def record(*args, **options):
        asked.append(args[-1].bias_gradient)
        return backward(*args, **options)

    monkeypatch.setattr(blockwise, "backward", record)
    jax.clear_caches()
    q, k, v = make(1, 20, 20, 2, 2, 8)[:3]
    bias = jnp.ones((1, 2, 20, 20))
    loss = lambda q, bias: attention(q, k, v, bias=bias).sum()  # noqa: E731
    jax.grad(loss)(q, bias)
    assert asked and not any(asked)
    asked.clear()
    dbias = jax.grad(loss, 1)(q, bias)
    assert all(asked) and jnp.abs(dbias).max() > 0


class FakeKernels:
    """Stands for a TPU's kernels: supports what it is told to."""

    reason = None

    def unsupported(self, *_):
        return self.reason

    def forward(self, *args):
        return blockwise.forward(*args)


@pytest.fixture
def kernels(monkeypatch):
    fake = FakeKernels()
    monkeypatch.setattr(dispatch, "_kernels", lambda name: fake if name == "tpu" else None)
    monkeypatch.setattr("pallas_kernels.dispatch.WARNED", set())
    jax.clear_caches()
    yield fake
    jax.clear_caches()


def test_a_fallback_is_said_once_and_only_where_it_happens(kernels, recwarn):
    q, k, v = make(1, 20, 20, 2, 2, 8)[:3]
    kernels.reason = "no head size of 8"
    traced = jax.jit(functools.partial(attention, mask=Causal())).trace(q, k, v)
    traced.lower(lowering_platforms=("cpu",))
    assert not [w for w in recwarn if "attention" in str(w.message)]
    for _ in range(2):
        jax.jit(functools.partial(attention, mask=Causal(1))).trace(q, k, v).lower(
            lowering_platforms=("tpu",)
        )
    said = [str(w.message) for w in recwarn if "attention" in str(w.message)]
    assert said == ["attention: not the tpu kernel but blockwise: no head size of 8"]
    with pytest.raises(ValueError, match=r"'tpu' cannot do this: no head size of 8"):
        attention(q, k, v, implementation="tpu")


def test_a_kernel_by_name_runs_on_its_platform_alone(kernels):
    q, k, v = make(1, 20, 20, 2, 2, 8)[:3]
    by_name = jax.jit(functools.partial(attention, implementation="tpu"))
    by_name.trace(q, k, v).lower(lowering_platforms=("tpu",))
    with pytest.raises(ValueError, match=r"'tpu' needs a TPU; accepted elsewhere"):
        by_name(q, k, v)
    with pytest.raises(ValueError, match=r"'gpu' cannot do this: there is no gpu kernel"):
        attention(q, k, v, implementation="gpu")


def bad(**changes):
    q, k, v = (jnp.zeros((2, 16, 4, 8)) for _ in range(3))
    return {"q": q, "k": k, "v": v} | changes


zeros = jnp.zeros


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (bad(q=zeros((2, 16, 8))), r"q must be an array \[B, T, N, H\]"),
        (bad(q=None), r"q must be an array .* NoneType"),
        (bad(q=zeros((2, 0, 4, 8))), "q must be .* no axis of 0"),
        (bad(v=zeros((2, 16, 2, 8))), r"v must be of k's shape \[2, 16, 4, 8\]"),
        (bad(q=zeros((3, 16, 4, 8))), "k must be of q's batch B, 3; got 2"),
        (bad(q=zeros((2, 16, 4, 16))), "k must be of q's head size H, 16; got 8"),
        (bad(q=zeros((2, 16, 6, 8))), "K a divisor of q's 6 heads, got K 4"),
        (bad(q=zeros((2, 16, 4, 8), jnp.int32)), "q must be of dtype float32, .* got int32"),
        (bad(k=zeros((2, 16, 4, 8), jnp.bfloat16)), "k must be of q's dtype float32, got bfloat16"),
        (bad(mask="causal"), r"mask must be a Mask .* such as Causal\(\)"),
        (bad(mask=Window(0)), "left must be an integer of at least 1"),
        (bad(mask=BlockPattern(np.ones((3, 3)), (4, 4))), r"live has shape \(1, 3, 3\)"),
        (bad(mask=Heads([Full()])), "1 masks for 4 query heads"),
        (bad(segment_ids=zeros((2, 15), int)), r"segment_ids must be integers \(\[2, 16\]"),
        (bad(segment_ids=zeros((2, 16))), "segment_ids must be integers .* float32"),
        (bad(bias=zeros((4, 16, 16))), r"bias must be an array \[2 or 1, 4 or 1, 16 or 1, 16\]"),
        (bad(bias=[[[[0.0] * 16]]]), r"bias must be an array \[2 or 1, .* got list"),
        (bad(bias=0.0), r"bias must be an array .* got float"),
        (bad(bias=zeros((2, 4, 16, 1))), r"bias must be .* got \[2, 4, 16, 1\]"),
        (bad(bias=zeros((1, 1, 16, 16), bool)), "bias must be of a floating dtype"),
        (bad(alibi=zeros(3)), r"alibi must be an array \[4\], one a query head"),
        (bad(alibi=[0.5] * 4), r"alibi must be an array \[4\], one a query head; got list"),
        (bad(sinks=zeros((4, 1))), r"sinks must be an array \[4\].* got \[4, 1\]"),
        (bad(sinks=[0.5] * 4), r"sinks must be an array \[4\], one a query head; got list"),
        (bad(softcap=0.0), "softcap must be a positive Python number"),
        (bad(scale=zeros(())), "scale must be a Python number"),
        (bad(alibi_offset=0.5), "alibi_offset must be an integer"),
        (bad(dropout_rate=1.0), "dropout_rate must be a Python number from 0 to below 1"),
        (bad(dropout_rate=0.5), "dropout_key must be a jax.random key .* got NoneType"),
        (bad(dropout_rate=0.5, dropout_key=0), "dropout_key must be a jax.random key .* got 0"),
        (bad(dropout_rate=0.5, dropout_key=zeros(2)), r"dropout_key must be a jax.random .* \[2\]"),
        (
            bad(dropout_rate=0.5, dropout_key=jax.random.split(KEY)),
            r"dropout_key must be a jax.random key .* got \[2\]",
        ),
        (bad(implementation="triton"), "implementation must be one of None, 'reference'"),
        (bad(sharding="data"), "sharding must be NamedSharding"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        attention(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 20), (2, 2, 20, 20)])
def test_a_row_hidden_by_an_infinite_bias_gives_zeros(implementation, shape):
    """As padding does that hides a whole sequence: no NaN, nothing seen, exactly no gradient."""
    arrays = make(2, 20, 20, 2, 1, 8)
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    bias[0] = -np.inf
    bias[1, ..., 5:9] = -np.inf
    options = {"bias": jnp.asarray(bias), "mask": Causal()}
    arrays[4] = arrays[4].at[0].set(0)  # of a log-sum-exp that is -inf
    found = call(arrays, implementation, **options)
    assert (found["lse"][0] == -jnp.inf).all() and jnp.isfinite(found["lse"][1]).all()
    for name in ("out", "dq", "dk", "dv", "dbias"):
        assert (found[name][0] == 0).all() and jnp.isfinite(found[name]).all(), name
        assert jnp.abs(found[name][1]).max() > 0, name
    right, naive = (
        reduce_bias(expectation(arrays, math, **options), found)
        for math in (None, attention_numpy.Naive(np.float32))
    )
    attention_numpy.check(found, right, naive, np.float32, implementation)


def test_dropout_takes_keys_of_both_kinds():
    q, k, v = make(1, 8, 8, 2, 2, 8)[:3]
    new, old = (
        attention(q, k, v, dropout_rate=0.5, dropout_key=key)
        for key in (jax.random.key(3), jax.random.PRNGKey(3))
    )
    np.testing.assert_array_equal(new, old)


def test_extreme_scores_overflow_nothing():
    q, k, v = make(1, 32, 32, 2, 2, 8)[:3]
    for scale in (1e4, 1e-30):
        out, pull = jax.vjp(lambda *x: attention(*x, mask=Causal(), scale=scale), q, k, v)  # noqa: B023
        assert all(jnp.isfinite(x).all() for x in (out, *pull(out)))
    hidden = attention(q, k, v, bias=jnp.full((1, 1, 32, 32), -jnp.inf))
    assert (hidden == 0).all()


@pytest.mark.slow
def test_patterns_run():
    q, k, v = make(1, 128, 128, 4, 4, 8)[:3]
    for mask in (patterns.s2_attention(4, stride=4, block=16, local_blocks=1),
                 patterns.flat_butterfly(128, block=16), masks.Empty()):  # fmt: skip
        one = attention(q, k, v, mask=mask)
        np.testing.assert_allclose(
            one, attention(q, k, v, mask=mask, implementation="reference"), atol=2e-6
        )
