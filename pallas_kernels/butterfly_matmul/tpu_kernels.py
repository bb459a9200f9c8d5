"""The bodies of the TPU kernels of `butterfly_matmul`; references come by name.

The stages at strides of whole tiles are k turns, from value 0 to value k; the product within tiles
of lanes comes before or after them.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.butterfly_matmul.tpu_plan import LANES, Plan
from pallas_kernels.tpu_dot import dot


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
        for name in ("dlanes", "dpairs"):
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
    _turns_back(values, gradients, refs, plan, precision)
    if plan.lanes_first:
        _lanes_back(x, start, dx, refs, plan, precision)


def _lanes(source, target, refs, plan: Plan, precision):
    """The product within each tile of lanes."""
    for t in range(plan.N // LANES):
        columns = pl.ds(t * LANES, LANES)
        target[:, columns] = dot(source[:, columns], refs["lanes"][t], precision).astype(
            target.dtype
        )


def _lanes_back(source, gradient, target, refs, plan: Plan, precision):
    lanes, sums = refs["lanes"], refs["dlanes"]
    for t in range(plan.N // LANES):
        columns = pl.ds(t * LANES, LANES)
        values, g = source[:, columns], gradient[:, columns]
        sums[0, t] += dot(values, g, precision, 0, 0)
        target[:, columns] = dot(g, lanes[t], precision, 1, 1).astype(target.dtype)


def _turns(values, count, refs, plan: Plan, precision):
    """The first `count` turns, each from one of `values` to the next."""
    for i in range(count):
        for pair, tiles in enumerate(plan.joined(i)):
            found = dot(_beside(values[i], tiles, plan), refs["pairs"][i, pair], precision)
            _apart(values[i + 1], tiles, found, plan)


def _turns_back(values, gradients, refs, plan: Plan, precision):
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
