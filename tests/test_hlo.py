"""The reader of HLO text and the interconnect's formulas, on small cases done by hand."""

import numpy as np
import pytest

from efficient.planning.collectives import collective_seconds, permute_seconds, replica_groups
from efficient.planning.hardware import Target
from efficient.planning.hlo import Module, parse_shapes
from efficient.planning.hlo_cost import hbm_bytes, matrix_flops


def test_interconnect_times_by_hand():
    payload = 16 * 10**9
    ring = np.array([[i, 3] for i in range(16)])
    pod, slice_ = Target("v5e", (16, 16)), Target("v5e", (4, 4))
    # A closed ring brings two links of 50 GB/s into a chip, an open line one.
    assert collective_seconds("all-gather", payload, ring, pod) == pytest.approx(0.15)
    assert collective_seconds("all-reduce", payload, ring, pod) == pytest.approx(0.30)
    line = np.array([[i, 0] for i in range(4)])
    assert collective_seconds("all-gather", payload, line, slice_) == pytest.approx(0.24)
    plane = np.array([[i, j] for i in range(16) for j in range(16)])
    assert collective_seconds("all-gather", payload, plane, pod) == pytest.approx(
        16e9 * 255 / 256 / 200e9
    )
    # Every fourth chip shares its links with three other groups.
    strided = ring[::4]
    assert collective_seconds("all-gather", payload, strided, pod) == pytest.approx(
        16e9 * 3 / 4 / (100e9 / 4)
    )
    assert collective_seconds("all-gather", 16, ring, pod) == pytest.approx(8e-6)  # hops
    neighbours, far = ring[None, :2], ring[None, [0, 15]]
    one = permute_seconds(payload, neighbours, pod)
    assert one == permute_seconds(payload, far, pod) == 16e9 / 50e9
    assert permute_seconds(payload, ring[None, [0, 5]], pod) == one  # streams through
    assert permute_seconds(16, ring[None, [0, 5]], pod) == pytest.approx(5e-6)
    # All 16 chips of a slice send to the opposite corner: 64 hops over its 48 links.
    opposite = np.array([[[i, j], [3 - i, 3 - j]] for i in range(4) for j in range(4)])
    assert permute_seconds(payload, opposite, slice_) == pytest.approx(16e9 / 50e9 * 64 / 48)
    node = Target.parse("h200:2x8")
    inside, across = np.array([[0, i] for i in range(8)]), np.array([[0, 0], [1, 0]])
    assert collective_seconds("all-gather", payload, inside, node) == pytest.approx(
        16e9 * 7 / 8 / 450e9
    )
    assert collective_seconds("all-gather", payload, across, node) == pytest.approx(0.16)


def test_replica_groups_in_three_spellings():
    rows = [[0, 2], [1, 3]]
    for text in (
        "replica_groups={{0,2},{1,3}}",
        "replica_groups=[2,2]<=[2,2]T(1,0)",
        "replica_groups=mesh['a'=2,'b'=2] {'a'}",
    ):
        assert replica_groups(text, 4).tolist() == rows
    assert replica_groups("replica_groups=[1,4]<=[4]", 4).tolist() == [[0, 1, 2, 3]]
    assert replica_groups("replica_groups={}", 3).tolist() == [[0, 1, 2]]
    sub = replica_groups("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 8)
    assert sub.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_shapes_in_memory():
    (shape,) = parse_shapes("bf16[3,60]{1,0:T(8,128)(2,1)S(1)}")
    assert (shape.logical_bytes, shape.padded_bytes, shape.hbm_bytes) == (360, 8 * 128 * 2, 0)
    (shape,) = parse_shapes("f32[60,3,2]{0,1,2:T(8,128)}")
    assert shape.hbm_bytes == 2 * 8 * 128 * 4
    pair = parse_shapes("(s4[6]{0}, (pred[], f8e4m3fn[2,2]{1,0}), token[])")
    assert [s.logical_bytes for s in pair] == [3, 1, 4, 0]


_LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8]{0} multiply(%x, %x)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)
}
%test (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(LIMIT)
  ROOT %c = pred[] compare(%j, %n), direction=LT
}
ENTRY %main (a: f32[8], s: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %s = s32[] parameter(1)
  %zero = s32[] constant(1)
  %in = (s32[], f32[8]{0}) tuple(%START, %a)
  %w = (s32[], f32[8]{0}) while(%in), condition=%test, body=%bodySTATED
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ("start", "limit", "stated", "turns", "known"),
    [
        ("zero", "10", "", 5, True),  # 1, 3, 5, 7, 9
        ("zero", "9", "", 4, True),
        ("zero", "1", "", 0, True),
        ("s", "10", "", 1, False),
        ("s", "10", ', backend_config={"known_trip_count":{"n":"12"}}', 12, True),
    ],
)
def test_trip_counts(start, limit, stated, turns, known):
    text = _LOOP.replace("LIMIT", limit).replace("START", start).replace("STATED", stated)
    module = Module(text)
    runs = {i.name: times for _, i, times in module.scheduled()}
    assert runs["y"] == turns
    assert runs["a"] == 1
    assert bool(module.notes) != known


_FUSED = """
%inner (a: f32[8,1024], i: s32[]) -> f32[2,1024] {
  %a = f32[8,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %v = f32[8,1024]{1,0} convert(%a)
  ROOT %s = f32[2,1024]{1,0} dynamic-slice(%v, %i, %z), dynamic_slice_sizes={2,1024}
}
%outer (b: f32[8,1024], j: s32[], w: f32[1024,4], o: f32[9,2,4]) -> f32[9,2,4] {
  %b = f32[8,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %w = f32[1024,4]{1,0} parameter(2)
  %o = f32[9,2,4]{2,1,0} parameter(3)
  %f = f32[2,1024]{1,0} fusion(%b, %j), kind=kLoop, calls=%inner
  %c = f32[2,4]{1,0} convolution(%f, %w), dim_labels=bf_io->bf
  %d = f32[1,2,4]{2,1,0} bitcast(%c)
  %k = s32[] constant(0)
  ROOT %u = f32[9,2,4]{2,1,0} dynamic-update-slice(%o, %d, %j, %k, %k)
}
ENTRY %main (b: f32[8,1024], j: s32[], w: f32[1024,4], o: f32[9,2,4]) -> f32[9,2,4] {
  %b = f32[8,1024]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %w = f32[1024,4]{1,0WSPACE} parameter(2)
  %o = f32[9,2,4]{2,1,0} parameter(3)
  ROOT %y = f32[9,2,4]{2,1,0} fusion(%b, %j, %w, %o), kind=kOutput, calls=%outer
}
"""


@pytest.mark.parametrize("space", ["", ":S(1)"])
def test_a_fusion_reads_its_slices_and_writes_its_update(space):
    module = Module(_FUSED.replace("WSPACE", space))
    main = module.computations["main"]
    fusion = main.instructions["y"]
    read = 2 * 1024 * 4 + (0 if space else 1024 * 4 * 4) + 4  # rows, weights, the index
    assert hbm_bytes(module, main, fusion) == read + 2 * 4 * 4
    assert matrix_flops(module, main, fusion) == 2 * 2 * 1024 * 4
