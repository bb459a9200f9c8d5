"""Decode attention on TPU: one Pallas kernel over the blocks that the rows hold.

Decoding is bound by the bytes of the cache, so the kernel is made for its copies: a unit of work is
a block of whole pages, two units' copies are under way while a third is in use, and the list of
units goes on from row to row, so that only the first copy of a call is waited for idly. Units are
made from `lengths` when the program runs, and the grid is as long as they are many: pages beyond a
row's length, or before its window, cost neither copy nor step.

In HBM the heads of a key are neighbours, [page, page_size * K, H] without a change of layout, and
stay so: one product of all N * T query rows with all heads' keys, of which each row keeps those of
its own head. The waste, K times the products, hides behind the copies.

By the laboratory (jax 0.10.2, libtpu 0.0.52, bfloat16, 32 query and 8 key heads of 128, full rows;
nothing was run): microseconds of memory / of the schedule, in brackets memory over the greater.

    case                          v5e                  v5p                v6e
    B 32, S 8192                  1312 / 561 (1.00)    389 / 239 (1.00)   656 / 427 (1.00)
      in pages of 16              1312 / 800 (1.00)    389 / 336 (1.00)   656 / 622 (1.00)
      4 new tokens, 128 rows      1314 / 1297 (1.00)   389 / 565 (0.69)   657 / 956 (0.69)
    B 256, S 128                  169 / 120 (1.00)     50 / 50 (1.00)     85 / 93 (0.90)

Steps of a grid whose length is known only when it runs cannot be followed, so each is charged the
longer of its two paths, that with masks: 1154 bundles on v6e in the first row, where the other has
826. Most blocks of a long row need no masks and take the other. Even so memory binds up to some 70
rows N * T on v5p and v6e, and 130 on v5e, between the first row's 32 and the third's 128. Heads of
64 are refused: XLA keeps such a cache in another layout and would copy all of it for each call.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.merge import merge
from pallas_kernels.decode_attention import tpu_plan
from pallas_kernels.decode_attention.settings import Settings
from pallas_kernels.decode_attention.tpu_plan import AHEAD, Plan

DTYPES = (jnp.bfloat16, jnp.float32)
HEAD_MOST = 256
ROWS_MOST = 256
# Scalar memory for the table of pages and the list of units; every TPU has a megabyte.
SCALAR_BYTES = 600 * 2**10
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
INF = float("inf")
# So many pages of a block are copied by straight code, more by a loop.
UNROLL = 4
# Stands for the maximum of no scores, and takes no exponential to infinity.
LEAST = -1e30


def unsupported(q, k_cache, v_cache, lengths, pages, settings: Settings) -> str | None:
    """Why the kernel cannot do this, in words; None where it can. Arrays as in `forward`."""
    (B, T, N, H), (size, K) = q.shape, k_cache.shape[1:3]
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}; accepted: bfloat16, float32"
    if H % 128 or H > HEAD_MOST:
        return f"head size {H}, for which XLA would copy the cache; accepted: 128, 256"
    if N * T > ROWS_MOST:
        return f"{N} heads of {T} queries; accepted: N * T up to {ROWS_MOST}"
    tile = 32 // q.dtype.itemsize
    if pages is not None and size * K % tile:
        return f"pages of {size} x {K} heads; accepted: page_size * K a multiple of {tile}"
    if pages is None and not tpu_plan.piece(size, K, q.dtype):
        return f"a cache of {size} x {K} heads; accepted: S * K a multiple of {tile}"
    plan = tpu_plan.plan(q, k_cache, pages, settings)
    table = 0 if pages is None else B * plan.table
    if 4 * (table + 3 * plan.cores * plan.units + B) > SCALAR_BYTES:
        return f"{table} pages and {plan.cores * plan.units} blocks, too many for scalar memory"
    if plan.columns * H * q.dtype.itemsize > 4 * tpu_plan.BLOCK_BYTES:
        return f"pages of {size} x {K} x {H}; accepted: up to {4 * tpu_plan.BLOCK_BYTES} bytes"
    return None


def forward(q, k_cache, v_cache, lengths, pages, settings: Settings, interpret=False):
    """out [B, T, N, H] in `settings.out_dtype` and lse [B, N, T] in float32; see `api`.

    Args:
      q: [B, T, N, H]. k_cache, v_cache: [B, S, K, H] or [pages, page_size, K, H].
      lengths: int32 [B], at most what the cache holds. pages: int32 [B, max_pages] or None.
      interpret: what pl.pallas_call takes.
    """
    plan = tpu_plan.plan(q, k_cache, pages, settings)
    scalars = {"lengths": lengths, **tpu_plan.work(lengths, plan)}
    if pages is not None:
        scalars["pages"] = pages.reshape(-1)
    # Neither moves a byte: pages are cut along the keys, and a key's heads are rows.
    k, v = (x.reshape(-1, plan.page * plan.K, plan.H) for x in (k_cache, v_cache))
    out, lse = _call(_query_rows(q, plan), k, v, scalars, plan, interpret)
    used = plan.N * plan.T
    out = out[:, :used].reshape(plan.B, plan.splits, plan.N, plan.T, plan.H)
    lse = lse[:, 0, :used].reshape(plan.B, plan.splits, plan.N, plan.T)
    parts = [(jnp.swapaxes(out[:, p], 1, 2), lse[:, p]) for p in range(plan.splits)]
    return parts[0] if plan.splits == 1 else merge(parts, settings.out_dtype(q.dtype))


def _query_rows(q, plan: Plan):
    """[B, rows, H], row n * T + t, padded with zeros."""
    rows = jnp.swapaxes(q, 1, 2).reshape(plan.B, plan.N * plan.T, plan.H)
    return jnp.pad(rows, ((0, 0), (0, plan.rows - plan.N * plan.T), (0, 0)))


def _own_head(plan: Plan):
    """float32 [rows, columns]: 0 where a row's key head is the column's, else -inf."""
    row, column = jnp.arange(plan.rows)[:, None], jnp.arange(plan.columns)
    head = row // (plan.T * (plan.N // plan.K))
    return jnp.where(head == column % plan.K, 0.0, -INF)


def _call(q, k, v, scalars, plan: Plan, interpret):
    """out [B * splits, rows, H], lse [B * splits, 1, rows] float32."""

    def row(c, u, scalars):
        u = jnp.clip(u - AHEAD, 0, scalars["count"][c] - 1)
        return scalars["row"][c * plan.units + u]

    by_row = lambda c, u, s: (row(c, u, s), 0, 0)  # noqa: E731
    by_batch = lambda c, u, s: (_div(row(c, u, s), plan.splits), 0, 0)  # noqa: E731
    out_dtype = plan.settings.out_dtype(q.dtype) if plan.splits == 1 else jnp.float32
    buffer = pltpu.VMEM((AHEAD + 1, plan.columns, plan.H), k.dtype)
    column = pltpu.VMEM((plan.rows, 1), jnp.float32)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    heads = pl.BlockSpec((plan.rows, plan.columns), lambda c, u, s: (0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(plan.cores, scalars["count"].max() + AHEAD),
            in_specs=[pl.BlockSpec((None, plan.rows, plan.H), by_batch), heads, hbm, hbm],
            out_specs=[
                pl.BlockSpec((None, plan.rows, plan.H), by_row),
                pl.BlockSpec((None, 1, plan.rows), by_row),
            ],
            scratch_shapes=[
                {
                    "k": buffer,
                    "v": buffer,
                    "copied": pltpu.SemaphoreType.DMA((2, AHEAD + 1)),
                    "m": column,
                    "l": column,
                    "acc": pltpu.VMEM((plan.rows, plan.H), jnp.float32),
                }
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((plan.B * plan.splits, plan.rows, plan.H), out_dtype),
            jax.ShapeDtypeStruct((plan.B * plan.splits, 1, plan.rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
            disable_bounds_checks=True,  # of the copies, whose pages are clipped
        ),
        cost_estimate=cost(plan, q.dtype.itemsize),
        interpret=interpret,
        name="decode_attention",
    )(scalars, q, _own_head(plan), k, v)


def cost(plan: Plan, itemsize: int) -> pl.CostEstimate:
    """For XLA's scheduler, where every row is full."""
    keys = plan.B * plan.table * plan.page
    scores = keys * plan.N * plan.T
    moved = 2 * itemsize * plan.H * (keys * plan.K + plan.B * plan.rows)
    return pl.CostEstimate(
        flops=4 * scores * plan.H, transcendentals=scores, bytes_accessed=int(moved)
    )


def _kernel(scalars, q, heads, k_hbm, v_hbm, out, lse, state, *, plan: Plan):
    """Starts the copies of one unit and computes the one that was started AHEAD steps before.

    `state` lives over the grid: buffers and semaphores by turns, and over the units of a row

    m, l: float32 [rows, 1], maximum and sum of 2 ** (s - m); acc: float32 [rows, H].
    """
    core, step = pl.program_id(0), pl.program_id(1)
    count = scalars["count"][core]
    pl.when(step < count)(
        lambda: _start(scalars, (k_hbm, v_hbm), state, _Unit(scalars, core, step, plan), plan)
    )

    @pl.when((step >= AHEAD) & (step < count + AHEAD))
    def _():
        unit = _Unit(scalars, core, step - AHEAD, plan)

        @pl.when(unit.flags & 1 != 0)
        def _():
            state["m"][...] = jnp.full_like(state["m"], LEAST)
            state["l"][...] = jnp.zeros_like(state["l"])
            state["acc"][...] = jnp.zeros_like(state["acc"])

        _wait(state, unit, plan)
        block = state["k"].at[unit.slot], state["v"].at[unit.slot]
        whole = unit.whole(plan)
        pl.when(whole)(lambda: _absorb(q, heads, *block, state, plan))
        pl.when(jnp.logical_not(whole))(lambda: _absorb(q, heads, *block, state, plan, unit))
        pl.when(unit.flags & 2 != 0)(lambda: _finish(out, lse, state))


class _Unit:
    """Of unit `u` of a core: its row of the batch, the row's length, its block and live pages."""

    def __init__(self, scalars, core, u, plan: Plan):
        index = core * plan.units + u
        packed, live = scalars["block"][index], scalars["live"][index]
        self.slot = jax.lax.rem(u, AHEAD + 1)
        self.flags, self.block = packed & 3, packed >> 2
        self.row = _div(scalars["row"][index], plan.splits)
        self.length = scalars["lengths"][self.row]
        self.first_page, self.end_page = live >> 16, live & 0xFFFF

    def place(self, plan: Plan):
        """Where, in the block, the first query's window starts and its keys end."""
        end = self.length - (plan.T - 1) - self.block * plan.block
        return end - (plan.settings.window or 0), end

    def whole(self, plan: Plan):
        """Whether every query sees every key of the block: the last's window, the first's end."""
        start, end = self.place(plan)
        found = end >= plan.block
        return found if plan.settings.window is None else found & (start + plan.T - 1 <= 0)


def _start(scalars, hbm, state, unit: _Unit, plan: Plan):
    """Starts the copies of a unit's live pages."""
    size = plan.page * plan.K
    base = unit.row * plan.table + unit.block * plan.pages

    def page(i):
        @pl.when((i >= unit.first_page) & (i < unit.end_page))
        def _():
            source = base + i
            if "pages" in scalars:
                source = jnp.clip(scalars["pages"][source], 0, hbm[0].shape[0] - 1)
            place = pl.ds(pl.multiple_of(i * size, size), size)
            for kind, name in enumerate(("k", "v")):
                pltpu.make_async_copy(
                    hbm[kind].at[source],
                    state[name].at[unit.slot, place],
                    state["copied"].at[kind, unit.slot],
                ).start()

    if plan.pages <= UNROLL:
        for i in range(plan.pages):
            page(i)
    else:
        pl.loop(0, plan.pages)(page)


def _wait(state, unit: _Unit, plan: Plan):
    """Waits for a unit's pages, a power of two of them at a time: a semaphore counts bytes."""
    pages = unit.end_page - unit.first_page
    size = plan.pages
    while size:

        @pl.when(pages & size != 0)
        def _(size=size):
            part = pl.ds(0, size * plan.page * plan.K)
            for kind, name in enumerate(("k", "v")):
                buffer = state[name].at[unit.slot, part]
                pltpu.make_async_copy(buffer, buffer, state["copied"].at[kind, unit.slot]).wait()

        size //= 2


def _absorb(q, heads, k, v, state, plan: Plan, unit: _Unit | None = None):
    """Adds a block; with a unit, the keys of it that each query sees."""
    settings = plan.settings
    narrow = k.dtype == jnp.bfloat16
    precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
    x = _dot(q[...], k[...], 1, precision)
    if settings.softcap is None:
        x = x * (settings.scale * LOG2E)
    else:
        cap = settings.softcap
        x = jnp.tanh(x * (settings.scale / cap)) * (cap * LOG2E)
    if plan.K > 1:
        x = x + heads[...]
    values = v[...]
    if unit is not None:
        x = jnp.where(_seen(unit, plan), x, -INF)
        start, end = unit.place(plan)
        rows = jax.lax.broadcasted_iota(jnp.int32, (plan.columns, 1), 0)
        kept = rows < (end + plan.T - 1) * plan.K
        if settings.window is not None:  # pages before it were not copied
            kept &= rows >= start * plan.K
        values = jnp.where(kept, values, jnp.zeros_like(values))
    old = state["m"][...]
    m = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
    shrink = jnp.exp2(old - m)
    weights = jnp.exp2(x - m)
    state["m"][...] = m
    state["l"][...] = state["l"][...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    values = _dot(weights.astype(values.dtype), values, 0, precision)
    state["acc"][...] = state["acc"][...] * shrink + values


def _seen(unit: _Unit, plan: Plan):
    """bool [rows or 1, columns]: which keys of the unit's block a query sees."""
    column = jax.lax.broadcasted_iota(jnp.int32, (1, plan.columns), 1)
    ahead = 0  # of the first query
    if plan.T > 1:
        ahead = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0), plan.T)
    start, end = unit.place(plan)
    seen = column < (end + ahead) * plan.K
    if plan.settings.window is not None:
        seen &= column >= (start + ahead) * plan.K
    return seen


def _finish(out, lse, state):
    total = state["l"][...]
    some = total > 0
    divisor = jnp.where(some, total, 1)
    out[...] = (state["acc"][...] / divisor).astype(out.dtype)
    column = jnp.where(some, (state["m"][...] + jnp.log2(divisor)) * LN2, -INF)
    rows = out.shape[0]
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (rows, rows), i) for i in (0, 1))
    lse[...] = jnp.sum(jnp.where(first == second, column, 0.0), axis=0, keepdims=True)


def _div(x, n: int):
    """x // n for x that is not negative; `//` asks for the chip, which may not be here."""
    return x if n == 1 else jax.lax.div(x, jnp.int32(n))


def _dot(a, b, axis, precision):
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
