"""Masks against their definition, element by element, and block states against the elements."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import patterns, schedule
from pallas_kernels.attention.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    And,
    BlockPattern,
    Causal,
    Empty,
    Full,
    Heads,
    Or,
    Prefix,
    Sinks,
    Stride,
    Window,
)

HEADS = 3


def dense(mask, heads, T, S):
    """bool[heads, T, S], by Python's own integers: no broadcasting, no array arithmetic."""
    return np.array(
        [[[bool(mask.element(n, t, s)) for s in range(S)] for t in range(T)] for n in range(heads)]
    ).reshape(heads, T, S)


def arrays(mask, heads, T, S):
    seen = mask.element(*np.ogrid[:heads, :T, :S])
    return np.broadcast_to(seen, (heads, T, S))


small = st.integers(1, 40)
offsets = st.integers(-30, 30)


@st.composite
def leaves(draw, T, S):
    kind = draw(st.sampled_from(["causal", "window", "prefix", "sinks", "stride", "pattern"]))
    if kind == "causal":
        return Causal(draw(offsets))
    if kind == "window":
        sides = draw(st.none() | small), draw(st.none() | st.integers(0, 20))
        return Window(*sides, draw(offsets), draw(st.sampled_from([1, 1, 3, 8])))
    if kind == "stride":
        return Stride(draw(st.integers(1, 5)), draw(offsets), draw(st.sampled_from([1, 3, 8])))
    if kind == "pattern":
        block = draw(st.tuples(st.integers(3, 16), st.integers(3, 16)))
        heads = draw(st.sampled_from([1, HEADS]))
        seed = draw(st.integers(0, 99))
        shape = heads, -(-T // block[0]), -(-S // block[1])
        return BlockPattern(np.random.default_rng(seed).random(shape) < 0.5, block)
    return {"prefix": Prefix, "sinks": Sinks}[kind](draw(small))


@st.composite
def cases(draw):
    """A composed mask with lengths, and blocks to judge it by."""
    T, S = draw(small), draw(small)
    combined = st.recursive(
        leaves(T, S),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
            st.tuples(inner, inner, inner).map(Heads),
        ),
        max_leaves=4,
    )
    return draw(combined), T, S, draw(st.integers(1, 17)), draw(st.integers(1, 17))


@given(cases())
@settings(max_examples=300, deadline=None)
def test_blocks_agree_with_elements(case):
    mask, T, S, block_q, block_kv = case
    seen = arrays(mask, HEADS, T, S)
    states = mask.blocks(HEADS, T, S, block_q, block_kv)
    assert states.dtype == np.uint8 and len(states) == (HEADS if mask.names_heads() else 1)
    states = np.broadcast_to(states, (HEADS, *states.shape[1:]))
    assert states.shape[1:] == (-(-T // block_q), -(-S // block_kv))
    for n, i, j in np.ndindex(states.shape):
        tile = seen[n, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        if states[n, i, j] == EMPTY:
            assert not tile.any()
        elif states[n, i, j] == FULL:
            assert tile.all()
        else:
            assert states[n, i, j] == PARTIAL
            leaf = not isinstance(mask, (And, Or, Heads, Window))
            assert not leaf or (tile.any() and not tile.all()), "PARTIAL without need"


@given(cases(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_schedule_visits_what_is_seen_once(case, transpose):
    mask, T, S, block_q, block_kv = case
    found = schedule.schedule(mask, HEADS, T, S, block_q, block_kv, transpose)
    seen = arrays(mask, HEADS, T, S)
    for n in range(HEADS):
        pairs = found.pairs[found.heads[n]]
        visited = np.zeros((T, S), bool)
        for q, kv, _, _, kind in pairs:
            tile = np.s_[q * block_q : (q + 1) * block_q, kv * block_kv : (kv + 1) * block_kv]
            assert not visited[tile].any()
            t, s = np.ogrid[:T, :S]
            remains = np.broadcast_to(found.masks[kind].element(0, t, s), (T, S))
            visited[tile] = remains[tile]
        np.testing.assert_array_equal(visited, seen[n])
        outer, inner = (pairs[:, 1], pairs[:, 0]) if transpose else (pairs[:, 0], pairs[:, 1])
        order = np.lexsort((inner, outer))
        np.testing.assert_array_equal(order, np.arange(len(pairs)))
        blocks = -(-S // block_kv) if transpose else -(-T // block_q)
        np.testing.assert_array_equal(np.unique(outer), np.arange(blocks))
        np.testing.assert_array_equal(pairs[:, 2], np.diff(outer, prepend=-1) != 0)
        np.testing.assert_array_equal(pairs[:, 3], np.diff(outer, append=-1) != 0)


@pytest.mark.slow
@given(cases(), st.sampled_from([3, 5, 8, 64]))
@settings(max_examples=200, deadline=None)
def test_kinds_of_blocks_are_the_mask_however_few_there_may_be(case, most):
    mask, T, S, block_q, block_kv = case
    found = schedule.numbered(mask, HEADS, T, S, block_q, block_kv, most)
    assert len(found.masks) <= most and found.masks[:2] == (Empty(), Full())
    right = dense(mask, HEADS, T, S)
    for n in range(HEADS):
        kinds = found.tables[found.table[n]]
        for i, j in np.ndindex(kinds.shape):
            t, s = np.ogrid[: min(block_q, T - i * block_q), :block_kv]
            t, s = t + i * block_q, s + j * block_kv
            # The head as a kernel has it, an array.
            seen = found.masks[kinds[i, j]].element(np.array(n), t, s)
            seen = np.broadcast_to(seen, (len(t), block_kv))
            inside = S - j * block_kv
            np.testing.assert_array_equal(
                seen[:, :inside], right[n][t[0, 0] : t[-1, 0] + 1, s[0, 0] : s[0, -1] + 1]
            )
            assert not seen[:, inside:].any(), "keys beyond S are seen"


def test_heads_of_one_rule_are_one_mask_with_numbers_of_the_head():
    """A kernel's head is a traced integer: it must not cost a mask for each head."""
    import jax

    mask = patterns.s2_attention(16, stride=8, block=48)
    jaxpr = jax.make_jaxpr(mask.element)(
        np.int32(0), np.zeros((64, 1), int), np.zeros((1, 64), int)
    )
    wide = [x for x in jaxpr.eqns if any(64 in out.aval.shape for out in x.outvars)]
    one = jax.make_jaxpr(mask.head(1).element)(0, np.zeros((64, 1), int), np.zeros((1, 64), int))
    few = [x for x in one.eqns if any(64 in out.aval.shape for out in x.outvars)]
    assert len(wide) <= len(few) + 8
    for alike in (mask, Heads([Window(3 + n, 2 * n, n - 8) | Sinks(n + 1) for n in range(16)])):
        np.testing.assert_array_equal(arrays(alike, 16, 40, 700), dense(alike, 16, 40, 700))
    found = schedule.numbered(mask, 16, 2048, 2048, 512, 512, 8)
    assert 2 < len(found.masks) <= 8 and any(mask.names_heads() for mask in found.masks)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_printed_masks_can_be_pasted_and_are_equal(case):
    mask = case[0]
    again = eval(repr(mask))
    assert again == mask and hash(again) == hash(mask)


@given(cases())
@settings(max_examples=12, deadline=None)
def test_jax_numpy_and_integers_agree(case):
    import jax.numpy as jnp

    mask, T, S, _, _ = case
    T, S = min(T, 12), min(S, 12)
    expected = dense(mask, HEADS, T, S)
    np.testing.assert_array_equal(arrays(mask, HEADS, T, S), expected)
    grid = [jnp.asarray(axis) for axis in np.ogrid[:HEADS, :T, :S]]
    found = np.broadcast_to(np.asarray(mask.element(*grid)), (HEADS, T, S))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 24])
def test_traced_blocks_below_zero_are_those_of_python(n):
    import jax.numpy as jnp

    mask, t = Stride(5, shift=-7, block=n), np.arange(-60, 60)
    for each in (mask, Window(2, 1, offset=-70, block=n)):
        found = each.element(0, jnp.asarray(t)[:, None], jnp.arange(90))
        right = [[bool(each.element(0, int(row), s)) for s in range(90)] for row in t]
        np.testing.assert_array_equal(np.broadcast_to(found, (120, 90)), right)


def test_definitions():
    """Each mask by a formula of its own, written out."""
    T, S = 9, 11
    t, s = np.mgrid[:T, :S]
    table = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    expected = {
        Full(): np.ones((T, S)),
        Empty(): np.zeros((T, S)),
        Causal(): np.tri(T, S),
        Causal(2): np.tri(T, S, 2),
        Window(3): np.tri(T, S) - np.tri(T, S, -3),
        Window(1, 1): np.tri(T, S, 1) - np.tri(T, S, -1),
        Window(None, 4): np.tri(T, S, 4),
        Window(2, None, offset=1): 1 - np.tri(T, S, -1),
        Window(1, block=4): t // 4 == s // 4,
        Prefix(4): s < 4,
        Sinks(2): np.arange(S) < 2,
        Stride(3, shift=1): np.isin(s, [2, 5, 8]),
        Stride(2, block=3): np.isin(s, [0, 1, 2, 6, 7, 8]),
        Causal() & Sinks(2): np.minimum(np.tri(T, S), s < 2),
        Causal() | Prefix(4): np.maximum(np.tri(T, S), s < 4),
        BlockPattern(table[:1], (3, 3)): np.repeat(np.repeat(table[0], 3, 0), 3, 1)[:T, :S],
    }
    for mask, seen in expected.items():
        seen = np.broadcast_to(seen, (T, S)).astype(bool)
        np.testing.assert_array_equal(arrays(mask, 1, T, S)[0], seen, err_msg=repr(mask))
    by_head = arrays(BlockPattern(table, (3, 3)), 2, T, S)
    np.testing.assert_array_equal(by_head, np.kron(table, np.ones((3, 3)))[:, :T, :S])
    different = arrays(Heads([Causal(), Full()]), 2, T, S)
    np.testing.assert_array_equal(different, [np.tri(T, S), np.ones((T, S))])


def test_causal_blocks_cost_half_and_the_last_short_block_is_full():
    states = Causal().blocks(4, 1000, 1000, 128, 128)
    assert states.shape == (1, 8, 8)
    assert (states[0] == np.tri(8, 8, -1) * FULL + np.eye(8) * PARTIAL).all()
    assert (Full().blocks(1, 5, 1000, 4, 128) == FULL).all()
    assert (Prefix(1000).blocks(1, 5, 1000, 4, 128) == FULL).all()


def test_only_what_is_undecided_remains_in_a_block():
    found = schedule.schedule(Causal() & Window(512), 2, 2048, 2048, 128, 128)
    assert set(found.masks) == {Empty(), Full(), Causal(), Window(512, None)}
    kinds = {found.masks[kind]: q - kv for q, kv, _, _, kind in found.pairs[0] if kind > 1}
    assert kinds == {Causal(): 0, Window(512, None): 4}
    table = np.tri(4, 4, dtype=bool)
    table[3, 0] = False
    found = schedule.schedule(BlockPattern(table, (64, 64)) & Causal(), 1, 256, 256, 32, 64)
    assert set(found.masks) == {Empty(), Full(), Causal()}
    empty = schedule.schedule(Empty(), 1, 256, 256, 64, 64)
    np.testing.assert_array_equal(empty.pairs[0], [[i, 0, 1, 1, 0] for i in range(4)])


def test_heads_alike_share_a_schedule():
    mask = Heads([Causal(), Full(), Causal(), Full()])
    found = schedule.schedule(mask, 4, 64, 64, 16, 16)
    np.testing.assert_array_equal(found.heads, [0, 1, 0, 1])
    assert [len(pairs) for pairs in found.pairs] == [10, 16]


def test_a_long_mask_takes_no_table():
    found = schedule.schedule(patterns.s2_attention(32, stride=16), 32, 131072, 131072, 512, 512)
    assert len(found.heads) == 32
    live = sum(len(found.pairs[n]) for n in found.heads)
    assert live < 32 * 256 * 256 * 0.5


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda: Window(0), "left must be an integer of at least 1"),
        (lambda: Window(4, -1), "right must be an integer of at least 0"),
        (lambda: Window(4.0), "Window: left"),
        (lambda: Causal(True), "offset must be an integer"),
        (lambda: Prefix(0), "Prefix: n"),
        (lambda: Sinks(0), "Sinks: n"),
        (lambda: Stride(0), "Stride: stride"),
        (lambda: Heads([Causal()]), "1 masks for 4 query heads"),
        (lambda: Heads([Causal(), Window(0), Full(), Full()]), "Window: left"),
        (lambda: Causal() & Window(0), "Window: left"),
        (lambda: Causal() | Prefix(0), "Prefix: n"),
        (lambda: BlockPattern(np.ones((4, 4)), (8, 8)), r"need \(1 or 4, 8, 8\)"),
        (lambda: BlockPattern(np.ones((3, 8, 8)), (8, 8)), r"need \(1 or 4, 8, 8\)"),
        (lambda: BlockPattern(np.ones((8, 8)), (0, 8)), "block"),
        (lambda: BlockPattern(np.ones(8), (8, 8)), "zeros and ones"),
        (lambda: BlockPattern(np.full((8, 8), 2), (8, 8)), "zeros and ones"),
        (lambda: BlockPattern([[1], [1, 0]], (8, 8)), "zeros and ones"),
    ],
)
def test_bad_masks_say_what_is_accepted(mask, words):
    with pytest.raises(ValueError, match=words):
        mask().blocks(4, 64, 64, 16, 16)


def test_only_masks_combine():
    with pytest.raises(TypeError):
        Causal() & True


def test_s2_attention_covers_the_context_by_its_heads_together():
    """The union over heads is the causal triangle, each head alone a fraction of it."""
    T, block, stride = 512, 16, 8
    seen = arrays(patterns.s2_attention(8, stride=stride, block=block, local_blocks=2), 8, T, T)
    np.testing.assert_array_equal(seen.any(0), np.tri(T, T, dtype=bool))
    assert (seen.mean((1, 2)) < 0.5 * 0.4).all()
    row, column = np.mgrid[:T, :T] // block
    for n in range(8):  # the rule of the paper's code, head by head
        live = (row - column < 2) | ((column + n) % stride == 0)
        np.testing.assert_array_equal(seen[n], live & np.tri(T, T, dtype=bool))


def test_s2_attention_groups_dense_heads_and_steps():
    seen = arrays(patterns.s2_attention(4, kv_heads=2, stride=8, block=4, dense_heads=1), 4, 64, 64)
    np.testing.assert_array_equal(seen[2:], np.broadcast_to(np.tri(64, 64), (2, 64, 64)))
    np.testing.assert_array_equal(seen[0], seen[1])
    wide = patterns.s2_attention(2, stride=8, block=1, local_blocks=1)  # a step of 8 // 2 = 4
    last = arrays(wide, 2, 17, 17)[:, 16]
    assert [np.flatnonzero(row).tolist() for row in last] == [[0, 8, 16], [4, 12, 16]]


def test_butterfly_connects_blocks_whose_indices_differ_in_one_low_bit():
    seen = arrays(patterns.flat_butterfly(256, block=16, factors=3), 1, 256, 256)[0]
    row, column = np.mgrid[:256, :256] // 16
    np.testing.assert_array_equal(seen, np.isin(row ^ column, [0, 1, 2, 4]))
    stretched = patterns.flat_butterfly(256, block=16, size=4, factors=2)
    row, column = np.mgrid[:256, :256] // 64
    np.testing.assert_array_equal(
        arrays(stretched, 1, 256, 256)[0], np.isin(row ^ column, [0, 1, 2])
    )
    wide = arrays(patterns.flat_butterfly(256, block=16, factors=1, global_blocks=1), 1, 256, 256)
    assert wide[0, :16].all() and wide[0, :, :16].all() and not wide[0, 100:200, 16:90].any()
    with pytest.raises(ValueError, match="power of two"):
        patterns.flat_butterfly(256, block=16, size=3)
    with pytest.raises(ValueError, match="factors"):
        patterns.flat_butterfly(256, block=16, factors=5)


def test_lambda_shaped_parts_are_disjoint_and_make_up_the_mask():
    whole = arrays(patterns.lambda_shaped(4, 10), 1, 40, 40)[0]
    near, far = (arrays(part, 1, 40, 40)[0] for part in patterns.lambda_parts(4, 10))
    assert not (near & far).any()
    np.testing.assert_array_equal(near | far, whole)
    assert np.flatnonzero(whole[30]).tolist() == [0, 1, 2, 3, *range(21, 31)]


def test_longgen_strided_blocks():
    seen = arrays(patterns.strided_blocks(window=8, stride=4, block=4), 1, 64, 64)[0]
    assert np.flatnonzero(seen[63]).tolist() == [
        *range(0, 4), *range(16, 20), *range(32, 36), *range(48, 52), *range(56, 64)
    ]  # fmt: skip
    assert not np.triu(seen, 1).any()
