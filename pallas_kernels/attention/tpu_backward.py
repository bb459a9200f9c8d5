"""Attention backward on TPU.

Weights are computed again from the log-sum-exp: P = 2 ** (s - lse), dS = P * (dP - delta), with
delta = rowsum(dO * O) - dlse made outside. (A log-sum-exp of 28 is rounded at 1e-6 in float32, and
so are weights made of it: with every key that far below 0, under ALiBi with a mask that ends before
its positions do, gradients erred 3.0 to 4.2 times as much as naive attention's, at S 256.) There is
no maximum to wait for: the live pieces of a block of scores are straight code where the plan has a
region for it (see tpu_plan), and otherwise a region each. Two ways, both deterministic:

- `run_fused`: one kernel goes over the blocks of keys, adds up dK and dV of a block in VMEM, and
  dQ of all queries of its heads too: 5 products a tile. dQ must fit, 8 bytes an element.
- `run_queries` and `run_keys`: dQ by tiles of queries, dK and dV by blocks of keys: 3 + 4 products,
  and VMEM that does not grow with length.

Gradients are accumulated transposed, [H, length], so that a head narrower than the matrix unit does
not waste it, and are transposed when they leave. The query heads of a key head add up in VMEM.

Bundles and matrix-unit use, beside jax's splash attention, are in docs/kernels.md.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan
from pallas_kernels.attention.tpu_scores import Cell, Scores, by_region, contract, runs, visit
from pallas_kernels.attention.tpu_specs import LOG2E, Grid, Shape, cost, input_specs, params


def weights_and_slopes(scores: Scores, start, size: int, cells):
    """For `size` keys of the block: weights P as dV wants them, dS, and dS before the softcap.

    All float32 [size, count]. The padding's log-sum-exp is infinite, so that its weights are 0.
    """
    inputs, settings = scores.inputs, scores.shape.settings
    x = scores.product(start, size)
    weights = jnp.exp2(scores.finish(x, start, size) - inputs["lse"][...] * LOG2E)
    weights = scores.hide(weights, 0, start, cells)
    slopes = contract(inputs["v"][pl.ds(start, size), :], inputs["dout"][...], (1, 1))
    dropped = weights
    if settings.dropout_rate:
        # The factor 1 / (1 - rate) of dV is applied when dV leaves.
        kept = scores.kept(start, size)
        slopes = jnp.where(kept, slopes / (1 - settings.dropout_rate), 0)
        dropped = jnp.where(kept, weights, 0)
    slopes = weights * (slopes - inputs["delta"][...])
    inner = slopes if settings.softcap is None else slopes * (1 - jnp.square(jnp.tanh(x)))
    return dropped, slopes, inner


def keys_kernel(scalars, inputs, dk, dv, *rest, grid: Grid):
    """dK and dV of a block of keys; with an output for it, dQ of all tiles of queries as well."""
    shape, tile, at = grid.shape, grid.shape.tile, grid.place(scalars)
    *dq, sums = rest
    g = pl.program_id(3)
    scores = Scores(inputs, shape, grid.plan.masks, at)

    @pl.when(at.has(tpu_plan.FIRST) & (g == 0))
    def _():
        sums["dk"][...] = jnp.zeros_like(sums["dk"])
        sums["dv"][...] = jnp.zeros_like(sums["dv"])

    if dq:

        @pl.when((pl.program_id(2) == 0) & (g == 0))
        def _():
            sums["dq"][...] = jnp.zeros_like(sums["dq"])

    def add(start, size, cells):
        weights, _, slopes = weights_and_slopes(scores, start, size, cells)
        q, dout = inputs["q"][...], inputs["dout"][...]
        here = (slice(None), pl.ds(start, size))
        slopes = slopes.astype(q.dtype)
        sums["dv"][here] += contract(dout, weights.astype(q.dtype), (0, 1))
        sums["dk"][here] += contract(q, slopes, (0, 1))
        if dq:
            sums["dq"][g, at.q] += contract(inputs["k"][pl.ds(start, size), :], slopes, (0, 0))

    _visit(scores, grid.plan, scalars, add)

    @pl.when(at.has(tpu_plan.LAST) & (g == pl.num_programs(3) - 1))
    def _():
        keep = 1 - shape.settings.dropout_rate
        factor = shape.settings.scale / shape.fold
        dk[...] = jnp.transpose(sums["dk"][...] * factor).astype(dk.dtype)
        dv[...] = jnp.transpose(sums["dv"][...] / keep).astype(dv.dtype)

    if dq:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            @pl.loop(0, shape.T // tile.block_q)
            def _(i):
                rows = pl.ds(pl.multiple_of(i * tile.block_q, tile.block_q), tile.block_q)
                total = sums["dq"][g, i] * shape.settings.scale
                dq[0][g, rows, :] = jnp.transpose(total).astype(dq[0].dtype)


def queries_kernel(scalars, inputs, dq, total, *, grid: Grid):
    """dQ of a tile of queries."""
    at = grid.place(scalars)
    scores = Scores(inputs, grid.shape, grid.plan.masks, at)

    @pl.when(at.has(tpu_plan.FIRST))
    def _():
        total[...] = jnp.zeros_like(total)

    def add(start, size, cells):
        keys = inputs["k"][pl.ds(start, size), :]
        slopes = weights_and_slopes(scores, start, size, cells)[2].astype(keys.dtype)
        total[...] += contract(keys, slopes, (0, 0))

    _visit(scores, grid.plan, scalars, add)

    @pl.when(at.has(tpu_plan.LAST))
    def _():
        dq[...] = jnp.transpose(total[...] * grid.shape.settings.scale).astype(dq.dtype)


def _visit(scores: Scores, plan: tpu_plan.Plan, scalars, add):
    """The block in one straight region where there is code for it, else its live pieces in turn."""
    tile, at = scores.shape.tile, scores.at

    def region(kinds):
        for run in runs(kinds, plan, tile):
            add(*run)

    def piece(start, kind):
        add(start, tile.piece, [Cell(0, tile.piece, 0, tile.block_q, kind)])

    by_region(at, plan, region)
    if not plan.complete:
        pl.when(at.region == 0)(lambda: visit(scores, scalars, piece))


def run_keys(inputs, shape: Shape, plan: tpu_plan.Plan, scalars, dtypes, fused, interpret=False):
    """dk, dv [B, K, S, H] and, if fused, dq [B, N, T, H]; plan by blocks of keys."""
    tile, grid = shape.tile, Grid(shape, plan, grouped=True)
    B, N, K, T, S, H = shape[:6]
    keys = grid.spec((tile.block_kv, H), lambda b, n, q, kv: (b, shape.key_head(n), kv, 0))
    outs = [jax.ShapeDtypeStruct((B, K, S, H), dtype) for dtype in dtypes[1:]]
    specs = [keys, keys]
    sums = {name: pltpu.VMEM((H, tile.block_kv), jnp.float32) for name in ("dk", "dv")}
    if fused:
        outs.append(jax.ShapeDtypeStruct((B, K, shape.group, T, H), dtypes[0]))
        block = (None, None, shape.group, T, H)
        specs.append(pl.BlockSpec(block, lambda b, i, p, g, _: (b, i, 0, 0, 0)))
        sums["dq"] = pltpu.VMEM((shape.group, T // tile.block_q, H, tile.block_q), jnp.float32)
    found = pl.pallas_call(
        functools.partial(keys_kernel, grid=grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.sizes,
            in_specs=[input_specs(inputs, grid)],
            out_specs=specs,
            scratch_shapes=[sums],
        ),
        out_shape=outs,
        compiler_params=params(grid),
        cost_estimate=cost(grid, products=5 if fused else 4),
        interpret=interpret,
        name="attention_backward" if fused else "attention_backward_keys",
    )(scalars, inputs)
    return [*found[:2], *(x.reshape(B, N, T, H) for x in found[2:])]


def run_queries(inputs, shape: Shape, plan: tpu_plan.Plan, scalars, dtype, interpret=False):
    """dq [B, N, T, H]; plan by tiles of queries."""
    tile, grid = shape.tile, Grid(shape, plan)
    return pl.pallas_call(
        functools.partial(queries_kernel, grid=grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.sizes,
            in_specs=[input_specs(inputs, grid)],
            out_specs=grid.spec((tile.block_q, shape.H), lambda b, n, q, kv: (b, n, q, 0)),
            scratch_shapes=[pltpu.VMEM((shape.H, tile.block_q), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((shape.B, shape.N, shape.T, shape.H), dtype),
        compiler_params=params(grid),
        cost_estimate=cost(grid, products=3),
        interpret=interpret,
        name="attention_backward_queries",
    )(scalars, inputs)
