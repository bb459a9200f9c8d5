"""The bodies of the TPU kernels of `butterfly_matmul`; references come by name.

The stages at strides of whole tiles are done in k turns, a visit of scalar stages or one stage of
blocks each, from value 0 to value k; the product within tiles of lanes comes before or after them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_diagonal_matmul.tpu import dot
from pallas_kernels.butterfly_matmul.tpu_plan import LANES, Plan

# Rows of a visit of registers: four registers of each of its tiles.
ROWS = 32


def forward(refs, *, plan: Plan, precision):
    x, y, k = refs["x"], refs["y"], plan.turns
    if not k:
        _lanes(x, y, refs, plan, precision)
        return
    middle = refs["saved"].at[0] if plan.saved else None
    start = middle if plan.lanes_first else x
    end = middle if plan.lanes_last else y
    if plan.lanes_first:
        _lanes(x, start, refs, plan, precision)
    _turns([start, *[middle] * (k - 1), end], k, refs, plan, precision)
    if plan.lanes_last:
        _lanes(end, y, refs, plan, precision)


def backward(refs, *, plan: Plan, precision):
    x, dy, dx, k = refs["x"], refs["dy"], refs["dx"], plan.turns

    @pl.when(pl.program_id(1) == 0)
    def _():
        for name in ("dlanes", "dcoefficients", "dpairs"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    if not k:
        _lanes_back(x, dy, dx, refs, plan, precision)
        return
    values = [refs["saved"].at[i] for i in range(plan.saved)]
    values = values if plan.lanes_first else [x, *values]
    gradient = refs["gradient"]
    if plan.lanes_first:
        _lanes(x, values[0], refs, plan, precision)
    _turns(values, len(values) - 1, refs, plan, precision)
    end, start = dy, dx
    if plan.lanes_last:
        end = gradient
        _lanes_back(values[k], dy, end, refs, plan, precision)
    if plan.lanes_first:
        start = gradient
    gradients = [start, *[gradient] * (k - 1), end]
    turns_back = _visits_back if plan.scalar else _pairs_back
    turns_back(values, gradients, refs, plan, precision)
    if plan.lanes_first:
        _lanes_back(x, start, dx, refs, plan, precision)


def _lanes(source, target, refs, plan: Plan, precision):
    """The product within each tile of lanes."""
    for t in range(plan.N // LANES):
        columns = pl.ds(t * LANES, LANES)
        values = source[:, columns].astype(refs["lanes"].dtype)
        target[:, columns] = dot(values, refs["lanes"][t], precision).astype(target.dtype)


def _lanes_back(source, gradient, target, refs, plan: Plan, precision):
    lanes, sums = refs["lanes"], refs["dlanes"]
    for t in range(plan.N // LANES):
        columns = pl.ds(t * LANES, LANES)
        values, g = (a[:, columns].astype(lanes.dtype) for a in (source, gradient))
        sums[0, t] += dot(values, g, precision, 0, 0)
        target[:, columns] = dot(g, lanes[t], precision, 1, 1).astype(target.dtype)


def _turns(values, count, refs, plan: Plan, precision):
    """The first `count` turns, each from one of `values` to the next."""
    if plan.scalar:

        @pl.loop(0, plan.rows, step=ROWS)
        def _(row):
            for i in range(count):
                for tiles in plan.joined(i):
                    found = _visit(
                        _load(values[i], row, tiles), _taken(refs, plan, i, tiles), plan, i
                    )
                    _store(values[i + 1], row, tiles, found)

        return
    for i in range(count):
        for pair, tiles in enumerate(plan.joined(i)):
            found = dot(_beside(values[i], tiles, plan), refs["pairs"][i, pair], precision)
            _apart(values[i + 1], tiles, found, plan)


def _visit(tiles, coefficients, plan: Plan, turn):
    """Scalar stages between tiles [rows / 8, 8, 128]; coefficients [8, 128], by stage and tile."""
    strides = plan.strides(turn)
    for stride, (own, other) in zip(strides, coefficients, strict=True):
        step = stride // min(strides)
        tiles = [own[i] * tile + other[i] * tiles[i ^ step] for i, tile in enumerate(tiles)]
    return tiles


def _visits_back(values, gradients, refs, plan: Plan, precision):
    del precision
    sums = refs["dcoefficients"]

    @pl.loop(0, plan.rows, step=ROWS)
    def _(row):
        for i in reversed(range(plan.turns)):
            for tiles in plan.joined(i):
                given = _load(values[i], row, tiles), _taken(refs, plan, i, tiles)
                _, pull = jax.vjp(lambda t, c, i=i: _visit(t, c, plan, i), *given)
                found, of_coefficients = pull(_load(gradients[i + 1], row, tiles))
                _store(gradients[i], row, tiles, found)
                for number, both in zip(plan.numbers(i), of_coefficients, strict=True):
                    for which, parts in enumerate(both):
                        for t, part in zip(tiles, parts, strict=True):
                            sums[0, number, which, :, pl.ds(t * LANES, LANES)] += part


def _taken(refs, plan: Plan, turn, tiles):
    """For each stage of a visit two lists of [8, 128]: tiles' own coefficients, their partners'."""

    def row(number, which, t):
        found = refs["coefficients"][number, which : which + 1, pl.ds(t * LANES, LANES)]
        return jnp.broadcast_to(found, (8, LANES))

    return [
        tuple([row(number, which, t) for t in tiles] for which in (0, 1))
        for number in plan.numbers(turn)
    ]


def _load(ref, row, tiles):
    rows = pl.ds(pl.multiple_of(row, ROWS), ROWS)
    loaded = [ref[rows, pl.ds(t * LANES, LANES)].astype(jnp.float32) for t in tiles]
    return [a.reshape(ROWS // 8, 8, LANES) for a in loaded]


def _store(ref, row, tiles, values):
    rows = pl.ds(pl.multiple_of(row, ROWS), ROWS)
    for t, value in zip(tiles, values, strict=True):
        ref[rows, pl.ds(t * LANES, LANES)] = value.reshape(ROWS, LANES).astype(ref.dtype)


def _pairs_back(values, gradients, refs, plan: Plan, precision):
    pairs, sums = refs["pairs"], refs["dpairs"]
    for i in reversed(range(plan.turns)):
        for pair, tiles in enumerate(plan.joined(i)):
            g = _beside(gradients[i + 1], tiles, plan)
            sums[0, i, pair] += dot(_beside(values[i], tiles, plan), g, precision, 0, 0)
            _apart(gradients[i], tiles, dot(g, pairs[i, pair], precision, 1, 1), plan)


def _beside(ref, tiles, plan: Plan):
    return jnp.concatenate([ref[:, pl.ds(t * plan.tile, plan.tile)] for t in tiles], axis=1)


def _apart(ref, tiles, values, plan: Plan):
    for i, t in enumerate(tiles):
        part = values[:, i * plan.tile : (i + 1) * plan.tile]
        ref[:, pl.ds(t * plan.tile, plan.tile)] = part.astype(ref.dtype)
