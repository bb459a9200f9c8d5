"""Attention forward on TPU: one Pallas kernel over the live tiles of the scores.

FlashAttention's online softmax (arXiv 2205.14135, 2307.08691) needs the maximum of a block before
the first exponential of it, which keeps the matrix unit waiting. Here a reference value m stands in
for the maximum: a sample of the first keys' scores. Any m gives the same result as long as no
exponential overflows, so the straight path computes 2 ** (s - m) as scores leave the matrix unit,
and only compares the block's maximum with m beside it. Queries whose scores exceed m by more than
64 (8 in float32) keep their old state in the straight path and are done again, exactly, with their
own maximum, by the path that also serves queries which have no m yet.

What the compiler makes of it, bundles and matrix-unit use beside jax's splash attention, is in
docs/kernels.md, from `python -m pallas_kernels.lab attention`. Most of the loop's code is not run
by a step: the exact path for scores out of range alone, the sample and the output once a tile of
queries. With an earlier compiler the online softmax with the block's own maximum used the matrix
unit less, with two heads interleaved too, and so did tiles of 512 x 1024 and of 256 x 2048.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan
from pallas_kernels.attention.tpu_scores import (
    INF,
    LEAST,
    LN2,
    Cell,
    Scores,
    by_region,
    contract,
    runs,
    visit,
)
from pallas_kernels.attention.tpu_specs import Grid, Shape, cost, input_specs, params

# An exponential may be as great as 2 ** slack: sums over all keys, times values, stay in float32.
# A difference of 64 is itself rounded at 4e-6: far below bfloat16's weights, not below float32's.
SLACK, SLACK_FLOAT32 = 64.0, 8.0
# Keys whose scores are sampled for m, and keys that the exact path does at a time.
SAMPLE = EXACT = 128


def kernel(scalars, inputs, out, lse, state, *, grid: Grid):
    """One tile of queries, one block of keys. `state` lives over the pairs of a tile of queries:

    m, l: float32 [1, block_q], reference value and sum of 2 ** (s - m); acc: float32 [H, block_q].
    todo: float32 [1, block_q], 1 for queries that the exact path must do.
    flags: int32 [2] in scalar memory: whether m is missing; whether any query is to do. 0 is the
      rule, 1 the exception.
    """
    plan, at = grid.plan, grid.place(scalars)
    scores = Scores(inputs, grid.shape, plan.masks, at)
    flags, by_pieces = state["flags"], at.region == 0
    finish = functools.partial(_finish, out, lse, state, grid.shape)
    flags[1] = 0
    if plan.alone:
        by_region(at, plan, lambda kinds: _alone(scores, state, kinds, plan, finish))
    else:
        pl.when(at.has(tpu_plan.FIRST))(lambda: _begin(scores, state, plan))
        by_region(at, plan, lambda kinds: _region(scores, state, kinds, plan))

    def piece(start, kind):
        if not plan.complete:

            @pl.when(by_pieces)
            def _():
                flags[1] = 0
                pl.when(flags[0] == 1)(lambda: _sample(scores, state, start, kind))
                pl.when(flags[0] == 0)(lambda: _piece(scores, state, start, kind))
                pl.when(flags[0] == 1)(lambda: _all_to_do(state))

        @pl.when(flags[1] == 1)
        def _():
            @pl.loop(0, grid.shape.tile.piece // EXACT)
            def _(i):
                _exact(scores, state, pl.multiple_of(start + i * EXACT, EXACT), EXACT, kind)

    again = flags[1] == 1
    pl.when(again if plan.complete else again | by_pieces)(lambda: visit(scores, scalars, piece))
    pl.when(again if plan.alone else at.has(tpu_plan.LAST))(finish)


def _begin(scores, state, plan):
    """An empty state; where the block has straight code, m from a piece of it.

    Queries that see none of the sampled keys keep LEAST, so that the straight path leaves them to
    the exact one.
    """
    at, size = scores.at, scores.shape.tile.piece
    state["m"][...] = jnp.full_like(state["m"], LEAST)
    state["l"][...] = jnp.zeros_like(state["l"])
    state["acc"][...] = jnp.zeros_like(state["acc"])
    state["flags"][0] = (at.region == 0).astype(jnp.int32)
    kinds = plan.sampled_kinds()
    for kind in kinds:

        def sample(kind=kind):
            start = pl.multiple_of(at.sample * size, size)
            state["m"][...] = _reference(scores, start, kind)

        if len(kinds) == 1 and plan.complete:
            sample()
        else:
            pl.when((at.region > 0) & (at.kind(at.sample) == kind))(sample)


def _sample(scores, state, start, kind):
    """Sets m from the first keys of a piece; flags[0] tells whether some query sees none of them.

    Where that is so, as at the far edge of a window, the straight path would be wasted on it.
    """
    m = _reference(scores, start, kind)
    state["m"][...] = m
    state["flags"][0] = (jnp.min(m) <= LEAST).astype(jnp.int32)


def _reference(scores, start, kind):
    """The maximum of the first scores of a piece, for each query."""
    x, keep = scores(start, SAMPLE), scores.seen(kind, start, SAMPLE)
    x = x if keep is None else jnp.where(keep, x, -INF)
    return jnp.maximum(jnp.max(x, axis=0, keepdims=True), LEAST)


def _all_to_do(state):
    state["todo"][...] = jnp.ones_like(state["todo"])
    state["flags"][1] = 1


def _piece(scores, state, start, kind):
    """Adds the keys of a piece, for the queries that m serves."""
    tile, m = scores.shape.tile, state["m"][...]
    cells = [Cell(0, tile.piece, 0, tile.block_q, kind)]
    _add(state, m, *_weigh(scores, m, start, tile.piece, cells))


def _region(scores, state, kinds, plan):
    """Adds the keys of a block, for the queries that m serves: one straight region."""
    m = state["m"][...]
    _add(state, m, *_block(scores, m, kinds, plan))


def _add(state, m, most, total, values):
    beyond = most > m
    state["l"][...] = jnp.where(beyond, state["l"][...], state["l"][...] + total)
    state["acc"][...] = jnp.where(beyond, state["acc"][...], state["acc"][...] + values)
    _beyond(state, beyond)


def _beyond(state, beyond):
    todo = beyond.astype(jnp.float32)
    state["todo"][...] = todo
    state["flags"][1] = (jnp.max(todo) > 0).astype(jnp.int32)


def _alone(scores, state, kinds, plan, finish):
    """The only block of the tile: `_begin`, `_region` and `_finish` in one straight region."""
    sampled = tpu_plan.sampled(kinds)
    m = _reference(scores, int(sampled) * scores.shape.tile.piece, kinds[sampled])
    most, total, values = _block(scores, m, kinds, plan)
    beyond = most > m
    state["m"][...] = m
    state["l"][...] = jnp.where(beyond, 0, total)
    state["acc"][...] = jnp.where(beyond, 0, values)
    _beyond(state, beyond)
    finish()


def _block(scores, m, kinds, plan):
    """`_weigh` of all live parts of a block."""
    each = (_weigh(scores, m, *run) for run in runs(kinds, plan, scores.shape.tile))
    return functools.reduce(lambda a, b: (jnp.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]), each)


def _weigh(scores, m, start, size, cells):
    """Of `size` keys: their maximum less the slack, the sum of weights, V^T P^T, relative to m."""
    x = scores.hide(scores(start, size), -INF, start, cells)
    slack = SLACK_FLOAT32 if scores.inputs["q"].dtype == jnp.float32 else SLACK
    most = jnp.max(x, axis=0, keepdims=True) - slack
    weights = jnp.exp2(x - m)
    total = jnp.sum(weights, axis=0, keepdims=True)
    return most, total, _weighted(scores, weights, start, size)


def _exact(scores, state, start, size, kind):
    """Adds `size` keys for the queries to do, with their maximum and a rescaled state."""
    x = scores(start, size)
    keep = scores.seen(kind, start, size)
    todo = state["todo"][...] > 0
    x = jnp.where(todo if keep is None else keep & todo, x, -INF)
    old = state["m"][...]
    m = jnp.maximum(old, jnp.max(x, axis=0, keepdims=True))
    shrink = jnp.exp2(old - m)
    weights = jnp.exp2(x - m)
    state["m"][...] = m
    state["l"][...] = state["l"][...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
    state["acc"][...] = state["acc"][...] * shrink + _weighted(scores, weights, start, size)
    state["flags"][0] = 0


def _weighted(scores, weights, start, size):
    """V^T P^T, float32 [H, block_q]."""
    if scores.shape.settings.dropout_rate:
        weights = jnp.where(scores.kept(start, size), weights, 0)
    values = scores.inputs["v"][pl.ds(start, size), :]
    return contract(values, weights.astype(values.dtype), (0, 0))


def _finish(out, lse, state, shape):
    total = state["l"][...]
    seen = total > 0
    share = jnp.where(seen, 1 / (total * (1 - shape.settings.dropout_rate)), 0)
    # A row that sees nothing has an accumulator of zeros.
    out[...] = jnp.transpose(state["acc"][...] * share).astype(out.dtype)
    lse[...] = jnp.where(seen, (state["m"][...] + jnp.log2(total)) * LN2, -INF)


def run(inputs, shape: Shape, plan: tpu_plan.Plan, scalars, out_dtype, interpret=False):
    """out [B, N, T, H] and lse [B, N, 1, T] float32, of inputs from tpu_specs."""
    tile, grid = shape.tile, Grid(shape, plan)
    row = pltpu.VMEM((1, tile.block_q), jnp.float32)
    return pl.pallas_call(
        functools.partial(kernel, grid=grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.sizes,
            in_specs=[input_specs(inputs, grid)],
            out_specs=[
                grid.spec((tile.block_q, shape.H), lambda b, n, q, kv: (b, n, q, 0)),
                grid.spec((1, tile.block_q), lambda b, n, q, kv: (b, n, 0, q)),
            ],
            scratch_shapes=[
                {
                    "m": row,
                    "l": row,
                    "todo": row,
                    "acc": pltpu.VMEM((shape.H, tile.block_q), jnp.float32),
                    "flags": pltpu.SMEM((2,), jnp.int32),
                }
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((shape.B, shape.N, shape.T, shape.H), out_dtype),
            jax.ShapeDtypeStruct((shape.B, shape.N, 1, shape.T), jnp.float32),
        ],
        compiler_params=params(grid),
        cost_estimate=cost(grid, products=2),
        interpret=interpret,
        name="attention_forward",
    )(scalars, inputs)
