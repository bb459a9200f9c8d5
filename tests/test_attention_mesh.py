"""Attention on a mesh of eight devices, and the merging of partial results."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import (
    Causal,
    Full,
    Heads,
    Prefix,
    Window,
    attention,
    masks,
    merge,
    patterns,
)

KEY = jax.random.key(1)
COLLECTIVE = re.compile(r"(all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
BY_HEAD = Heads([Causal(), Full(), Window(5), Causal()])


def make(B=8, T=40, N=4, K=2, H=8):
    random = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    q, k, v = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    bias = jnp.asarray(random.standard_normal((B, 1, 1, T)), jnp.float32)
    return q, k, v, bias, jnp.asarray(random.integers(0, 3, (B, T)), jnp.int32)


def loss(q, k, v, bias, ids, mask, **how):
    out, lse = attention(
        q, k, v, mask=mask, bias=bias, segment_ids=ids, dropout_rate=0.2, dropout_key=KEY,
        sinks=jnp.arange(4.0), alibi=jnp.arange(4.0) / 8, return_lse=True, **how,
    )  # fmt: skip
    return jnp.sin(out).sum() + jnp.sin(lse).sum()


@functools.cache
def one_device(mask):
    return values_and_gradients(make(), mask)[0]


def values_and_gradients(arrays, mask, **how):
    compiled = (
        jax.jit(lambda *x: jax.value_and_grad(loss, (0, 1, 2, 3))(*x, mask, **how))
        .lower(*arrays)
        .compile()
    )
    return compiled(*arrays), compiled.as_text()


@pytest.mark.parametrize(
    ("mask", "shape"),
    [(Causal(), (4, 2)), (Causal(), (2, 4)), pytest.param(BY_HEAD, (4, 2), marks=pytest.mark.slow)],
    ids=["causal", "K does not divide", "by head"],
)
@pytest.mark.parametrize("how", ["partitioned by XLA", "sharding", "explicit"])
def test_eight_devices_are_one(how, shape, mask):
    arrays = make()
    expected, gradients = one_device(mask)
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(shape, ("data", "heads"), axis_types=(kind, kind))
    layout = NamedSharding(mesh, P("data", None, "heads", None))
    kv = layout if shape[1] == 2 else NamedSharding(mesh, P("data"))
    rows = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, to) for x, to in zip(arrays, (layout, kv, kv, rows, rows))]
    with jax.set_mesh(mesh):
        given = {"sharding": layout} if how == "sharding" else {}
        (found, others), text = values_and_gradients(placed, mask, **given)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(gradients, others):
        np.testing.assert_allclose(np.asarray(other), one, atol=2e-5)
    if shape[1] == 2 and not (mask == BY_HEAD and how == "partitioned by XLA"):
        assert not COLLECTIVE.search(text), "each device has all that it needs"


def test_inside_shard_map_with_checks_of_what_varies():
    q, k, v, _, ids = make(T=200)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"))
    spec, rows = P("data", None, "heads"), P("data")
    call = lambda q, k, v, ids: attention(q, k, v, mask=Causal(), segment_ids=ids)  # noqa: E731
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec)
    found = jax.jit(mapped)(q, k, v, ids)
    np.testing.assert_allclose(found, call(q, k, v, ids), atol=2e-6)


def test_a_layout_that_does_not_fit_is_refused():
    q, k, v = make()[:3]
    mesh = Mesh(np.array(jax.devices()), ("data",))
    for spec, words in (
        (P(None, "data"), "must leave T and H whole"),
        (P(None, None, "data"), r"must divide q's batch 8 and heads 4"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, sharding=NamedSharding(mesh, spec))


@pytest.mark.slow
def test_parts_of_the_keys_merge_exactly_with_gradients():
    q, k, v = make()[:3]

    def whole(q, k, v):
        return attention(q, k, v, mask=Causal(), return_lse=True)

    def in_parts(q, k, v):
        parts = []
        for start, stop in ((0, 10), (10, 25), (25, 40)):  # the last hides its keys from most rows
            some = k[:, start:stop], v[:, start:stop]
            parts.append(attention(q, *some, mask=Causal(-start), return_lse=True))
        return merge([merge(parts[:2]), parts[2]])

    (out, lse), pull = jax.vjp(whole, q, k, v)
    (found, found_lse), pull_parts = jax.vjp(in_parts, q, k, v)
    np.testing.assert_allclose(found, out, atol=1e-6)
    np.testing.assert_allclose(found_lse, lse, atol=1e-6)
    cotangents = jnp.cos(out), jnp.sin(lse)
    for one, other in zip(pull(cotangents), pull_parts(cotangents)):
        np.testing.assert_allclose(other, one, atol=5e-6)


def test_far_sinks_may_have_positions_of_their_own():
    """LM-Infinite: sinks beyond the window are as far as the window is wide."""
    q, k, v = make(T=64)[:3]
    window, sinks = 16, 4
    near, far = patterns.lambda_parts(sinks, window)
    slopes = jnp.array([0.5, 0.2, 0.1, 0.05])
    distance = jnp.clip(jnp.arange(64)[:, None] - jnp.arange(64), 0, window)
    bias = -(slopes[:, None, None] * distance)[None]
    expected = attention(q, k, v, mask=patterns.lambda_shaped(sinks, window), bias=bias)
    parts = [
        attention(q, k, v, mask=near, alibi=slopes, return_lse=True),
        attention(
            q, k[:, :sinks], v[:, :sinks], mask=Causal(-window) & Prefix(sinks),
            bias=jnp.broadcast_to(-window * slopes[:, None, None], (4, 1, sinks))[None],
            return_lse=True,
        ),
    ]  # fmt: skip
    np.testing.assert_allclose(merge(parts)[0], expected, atol=2e-6)
    assert far == Causal(-window) & masks.Sinks(sinks)


def test_merging_nothing_gives_nothing():
    nothing = jnp.zeros((1, 3, 2, 4)), jnp.full((1, 2, 3), -jnp.inf)
    something = jnp.ones((1, 3, 2, 4)), jnp.zeros((1, 2, 3))
    out, lse = merge([nothing, nothing])
    assert (out == 0).all() and (lse == -jnp.inf).all()
    out, lse = merge([nothing, something])
    assert (out == 1).all() and (lse == 0).all()
    gradient = jax.grad(lambda lse: merge([(nothing[0], lse), something])[0].sum())(nothing[1])
    assert (gradient == 0).all()
    large = (something[0], something[1] + 1e4), (2 * something[0], something[1] + 1e4)
    np.testing.assert_allclose(merge(large)[0], 1.5)
    half = [(out.astype(jnp.bfloat16), lse) for out, lse in large]
    assert merge(half)[0].dtype == jnp.bfloat16 and merge(half, jnp.float32)[0].dtype == jnp.float32
    for parts in ([], [something, (something[0][:, :2], something[1])], [something[::-1]]):
        with pytest.raises(ValueError, match="merge: parts"):
            merge(parts)
