"""Ulysses: against a softmax in float64, and what its compiled programs send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import layout, mesh_of

from efficient.errors import UserError
from efficient.parallel.ulysses import Ulysses, key_heads, ulysses_attention
from efficient.planning.collectives import find_collectives
from efficient.planning.hardware import Target
from efficient.planning.hlo import Module
from pallas_kernels.attention import BlockPattern, Causal, Full, Heads, Window

B, T, H = 2, 32, 8
EPS = float(np.finfo(np.float32).eps)


def softmax_attention(q, k, v, dout, seen, softcap=None, dtype=np.float64):
    """(out, dq, dk, dv) by the definition; `seen` broadcasts to [B, N, T, S]."""
    q, k, v, dout = (np.asarray(x, dtype) for x in (q, k, v, dout))
    group, scale = q.shape[2] // k.shape[2], dtype(q.shape[3] ** -0.5)
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    x = np.einsum("btnh,bsnh->bnts", q, keys) * scale
    bent = np.ones_like(x)
    if softcap is not None:
        x = np.tanh(x / dtype(softcap))
        x, bent = dtype(softcap) * x, 1 - x * x
    x = np.where(seen, x, -np.inf)
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btnh,bsnh->bnts", dout, values)
    dx = p * (dp - (p * dp).sum(-1, keepdims=True)) * bent * scale
    dk, dv = np.einsum("bnts,btnh->bsnh", dx, q), np.einsum("bnts,btnh->bsnh", p, dout)
    dk, dv = (a.reshape(*k.shape[:3], group, -1).sum(3) for a in (dk, dv))
    return np.einsum("bnts,bsnh->btnh", p, values), np.einsum("bnts,bsnh->btnh", dx, keys), dk, dv


def arrays(N, K, shape=(B, T), seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(*shape, n, H)), jnp.float32) for n in (N, K, K, N)]


def seen_by(mask, N, ids=None):
    t, s = np.arange(T)[:, None], np.arange(T)
    seen = np.stack([np.broadcast_to(mask.head(n).element(0, t, s), (T, T)) for n in range(N)])
    return seen if ids is None else seen & (ids[:, None, :, None] == ids[:, None, None, :])


def check(found, q, k, v, dout, seen, softcap=None):
    """Errors up to twice those of the definition in float32, and four last bits."""
    right = softmax_attention(q, k, v, dout, seen, softcap)
    naive = softmax_attention(q, k, v, dout, seen, softcap, np.float32)
    for name, value, exact, near in zip(
        ("out", "dq", "dk", "dv"), found, right, naive, strict=True
    ):
        largest = np.abs(exact).max()
        assert largest > 0.1
        allowed = 2 * np.abs(near - exact).max() + 4 * EPS * max(largest, 1)
        error = np.abs(np.asarray(value, np.float64) - exact).max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@functools.partial(jax.jit, static_argnames=("sharding", "mask", "softcap"))
def both(q, k, v, dout, ids=None, *, sharding, mask, softcap=None):
    """(out, dq, dk, dv) of ulysses."""
    q, k, v, dout = (jax.lax.with_sharding_constraint(x, sharding) for x in (q, k, v, dout))
    out, pull = jax.vjp(
        lambda q, k, v: ulysses_attention(
            q, k, v, sharding=sharding, mask=mask, segment_ids=ids, softcap=softcap
        ),
        q, k, v,
    )  # fmt: skip
    return out, *pull(dout)


# Twelve heads of six key heads over four ranks: heads 0 to 2 read key heads 0, 0 and 1, heads 3 to
# 5 read 1, 2 and 2.
@pytest.mark.parametrize(
    ("sizes", "N", "K", "mask", "softcap"),
    [
        ({"data": 2, "sequence": 4}, 4, 2, Causal(), None),
        ({"sequence": 2, "tensor": 2, "data": 2}, 4, 1, Window(5), None),
        ({"sequence": 8}, 8, 8, Full(), 2.0),
        ({"data": 2, "sequence": 4}, 12, 6, Causal(), None),
    ],
    ids=["fewer key heads", "tensor parallel", "eight ranks", "uneven"],
)
def test_values_and_gradients(sizes, N, K, mask, softcap):
    given, sharding = arrays(N, K), layout(mesh_of(**sizes))
    ids = None
    if N == 4:  # three packed sequences, that meet within what a rank holds
        ids = np.searchsorted([5, 21], np.arange(T), side="right") + np.arange(B)[:, None]
    found = both(*given, ids, sharding=sharding, mask=mask, softcap=softcap)
    check(found, *given, seen_by(mask, N, ids), softcap)


@pytest.mark.parametrize("kind", ["heads", "pattern"])
def test_masks_that_name_heads(kind):
    """Ranks attend by the masks of their own heads; two ranks of tensor, two of the sequence."""
    mask = Heads([Causal(), Full(), Window(3), Causal()])
    if kind == "pattern":
        live = np.random.default_rng(1).integers(0, 2, (4, 4, 4)) | np.eye(4, dtype=int)
        mask = BlockPattern(live, 8)
    given, sharding = arrays(4, 2), layout(mesh_of(sequence=2, tensor=2))
    found = both(*given, sharding=sharding, mask=mask)
    check(found, *given, seen_by(mask, 4))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways"),
    [(8, 8, 4), (8, 2, 4), (8, 1, 8), (12, 6, 4), (40, 10, 4), (12, 4, 6), (28, 4, 14), (6, 3, 2)],
)
def test_ranks_receive_the_key_heads_that_they_read_and_no_other(heads, kv_heads, ways):
    wanted, serves = key_heads(heads, kv_heads, ways)
    own, group = heads // ways, heads // kv_heads
    read = [[n // group for n in range(r * own, (r + 1) * own)] for r in range(ways)]
    most = max(len(set(row)) for row in read)
    assert wanted.shape == (ways, most)
    for row, some, serve in zip(read, wanted, serves, strict=True):
        assert set(some) == set(row)
        assert list(np.repeat(some[serve], own // len(serve))) == row


def sent(mesh, N, K, length, gradients=False):
    """Bytes that a device sends in the program for one sequence, all of them by all-to-all."""
    place = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=layout(mesh))
    q, k, v, dout = (place((1, length, n, H)) for n in (N, K, K, N))
    how = {"sharding": layout(mesh), "mask": Causal()}
    if gradients:
        lowered = both.lower(q, k, v, dout, **how)
    else:
        lowered = jax.jit(functools.partial(ulysses_attention, **how)).lower(q, k, v)
    module = Module(lowered.compile().as_text())
    found = find_collectives(module, Target.parse("h200:8"), mesh)
    assert {c.kind for c in found} == {"all-to-all"}
    return sum(c.wire for c in found)


@pytest.mark.parametrize("K", [8, 2])
def test_bytes_are_those_of_the_formula(K):
    """(2 N + 2 K) (T / P) H (P - 1) / P elements a pass, with P for a K that is less."""
    N, ways = 8, 8
    expected = (2 * N + 2 * max(K, ways)) * (T // ways) * H * (ways - 1) // ways * 4
    for gradients in (False, True):
        assert (
            sent(mesh_of(data=1, sequence=ways), N, K, T, gradients) == (1 + gradients) * expected
        )


def test_communication_is_constant_where_length_and_devices_grow():
    """It stays below (2 N + 2 K) (T / P) H, to which it tends."""
    found = [sent(mesh_of(sequence=n), 8, 8, 8 * n) * n / (n - 1) for n in (2, 4, 8)]
    assert found == [4 * 8 * 8 * H * 4] * 3


def test_what_does_not_divide_is_refused():
    sharding = layout(mesh_of(data=2, sequence=4))
    attend = functools.partial(ulysses_attention, sharding=sharding)
    q, k, v, _ = arrays(6, 6)
    with pytest.raises(
        UserError, match=r"6 heads do not divide over config.mesh.sequence=4; .* 4 heads"
    ):
        attend(q, k, v)
    q, k, v, _ = arrays(4, 4, (2, 30))
    with pytest.raises(
        UserError, match="length of 30 .* config.mesh.sequence=4 .* nearest .* is 32"
    ):
        attend(q, k, v)
    q, k, v, _ = arrays(4, 4, (3, 32))
    with pytest.raises(UserError, match="3 sequences do not divide over config.mesh.data=2"):
        attend(q, k, v)
    with pytest.raises(UserError, match="sharding must be NamedSharding"):
        ulysses_attention(q, k, v, sharding=NamedSharding(sharding.mesh, P("data")))


def test_strategy():
    given, sharding = arrays(4, 4), layout(mesh_of(data=2, sequence=4))
    how = {"mask": Causal(), "segment_ids": None, "softcap": None, "implementation": None}
    assert Ulysses().order_of(T, 4, True) is None
    out = jax.jit(lambda *x: Ulysses()(*x, sharding=sharding, permuted=False, **how))(*given[:3])
    right = softmax_attention(*given, seen_by(Causal(), 4))[0]
    np.testing.assert_allclose(out, right, rtol=0, atol=32 * EPS * np.abs(right).max())
    with pytest.raises(UserError, match="their own order"):
        Ulysses()(*given[:3], sharding=sharding, permuted=True, **how)
