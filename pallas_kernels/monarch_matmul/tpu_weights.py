"""Weights brought on chip once a core, in the order of features in which the kernels work.

Column tile t of `right` (of K q / 128, in groups of L) is ordered for its place t % L in the group,
rows and columns of `left` for its block: see `pallas_kernels.interleave`. Columns are taken lane by
lane; rows come by products with permutation matrices, exact in the weights' dtype. While one piece
is ordered the next is copied.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interleave import (
    LANES,
    exchange_order,
    exchanged_rows,
    spread_lane,
    spread_order,
    take_lanes,
)
from pallas_kernels.monarch_matmul.tpu_plan import Plan
from pallas_kernels.tpu_dot import dot


def scratch(plan: Plan, dtype) -> dict:
    """Scratch memory: the ordered weights, and buffers of the copies."""
    slots = 2 * plan.turn
    return {
        "right": pltpu.VMEM((plan.K, plan.p, plan.q), dtype),
        "left": pltpu.VMEM((plan.L, plan.r, plan.s), dtype),
        "columns": pltpu.VMEM((slots, plan.p, LANES), dtype),
        "rows": pltpu.VMEM((slots, LANES, plan.s), dtype),
        "copied": pltpu.SemaphoreType.DMA((2, slots)),
    }


def load(right_hbm, left_hbm, state, plan: Plan) -> None:
    """Fills state["right"] and state["left"], and where there are gradients, those with zeros.

    There are as many tiles of columns in right as of rows in left.
    """
    each, count = plan.turn, plan.inner // LANES

    def copies(t, slot):
        pieces = (right_hbm, column_tile(t, plan), "columns"), (left_hbm, row_tile(t, plan), "rows")
        return [
            pltpu.make_async_copy(hbm.at[at], state[name].at[slot], state["copied"].at[i, slot])
            for i, (hbm, at, name) in enumerate(pieces)
        ]

    def start(first, half):
        for i in range(each):
            for copy in copies(first + i, half * each + i):
                copy.start()

    def body(i, _):
        first, half = i * each, lax.rem(i, 2)
        pl.when(first + each < count)(lambda: start(first + each, 1 - half))
        for j in range(each):
            for copy in copies(first + j, half * each + j):
                copy.wait()
        for j in range(each):
            if "dright" in state:
                state["dright"][column_tile(first + j, plan)] = jnp.zeros((plan.p, LANES))
                state["dleft"][row_tile(first + j, plan)] = jnp.zeros((LANES, plan.s))
            _order_columns(first + j, half * each + j, state, plan)
            _order_rows(first + j, half * each + j, state, plan)
        return 0

    start(jnp.int32(0), jnp.int32(0))
    lax.fori_loop(0, count // each, body, 0)


def _order_columns(t, slot, state, plan: Plan):
    order = exchange_order(lax.rem(t, plan.L))
    state["right"][column_tile(t, plan)] = take_lanes(state["columns"][slot], order)


def _order_rows(t, slot, state, plan: Plan):
    block, at, _ = row_tile(t, plan)
    rows = permute_rows(exchanged_rows(block, plan.L), state["rows"][slot])
    order = spread_order(block, plan.L)
    for c in range(0, plan.s, LANES):
        columns = slice(c, c + LANES)
        state["left"][block, at, columns] = take_lanes(rows[:, columns], order)


def store(state, dright, dleft, plan: Plan) -> None:
    """Copies the gradients of this core, state["dright"] and state["dleft"], out in true order.

    They are float32, or where no other core's are to be added rounded to the weights' dtype first,
    in place of the weights.
    """
    of = ("right", "left") if plan.cores == 1 else ("dright", "dleft")
    right, left = (state[name] for name in of)
    _restore(state, right, left, plan)
    core = pl.program_id(0)
    copies = [
        pltpu.make_async_copy(right, dright.at[core], state["copied"].at[0, 0]),
        pltpu.make_async_copy(left, dleft.at[core], state["copied"].at[1, 0]),
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _restore(state, right, left, plan: Plan) -> None:
    """Puts state["dright"] and state["dleft"] in true order into `right` and `left`."""
    each, count = plan.turn, plan.inner // LANES

    def body(i, _):
        for j in range(each):
            t = i * each + j
            at = column_tile(t, plan)
            right[at] = true_columns(state["dright"][at].astype(right.dtype), t, plan)
            block, at, _ = row_tile(t, plan)
            left[block, at, :] = true_rows(
                state["dleft"][block, at, :].astype(left.dtype), block, plan
            )
        return 0

    lax.fori_loop(0, count // each, body, 0)


def true_columns(columns, t, plan: Plan):
    """Tile t of all columns of right, [p, 128], in true order."""
    return take_lanes(columns, exchange_order(lax.rem(t, plan.L)))


def true_rows(rows, block, plan: Plan):
    """128 rows of a block of left, [128, s], in true order, rows and columns."""
    rows = permute_rows(exchanged_rows(block, plan.L).T, rows)
    order = spread_lane(block, plan.L)
    tiles = [take_lanes(rows[:, c : c + LANES], order) for c in range(0, plan.s, LANES)]
    return jnp.concatenate(tiles, axis=1)


def column_tile(t, plan: Plan):
    """Where tile t of all columns of right is in it."""
    each = plan.q // LANES
    return lax.div(t, each), slice(None), _tile(lax.rem(t, each))


def row_tile(t, plan: Plan):
    """Where tile t of all rows of left is in it."""
    groups = plan.r // LANES
    return lax.div(t, groups), _tile(lax.rem(t, groups)), slice(None)


def permute_rows(order: jax.Array, a: jax.Array) -> jax.Array:
    """order @ a for a permutation matrix in bfloat16: exactly the elements of a."""
    if a.dtype == jnp.bfloat16:
        return dot(order, a, None).astype(a.dtype)
    # The 24 bits of a float32 are those of three bfloat16.
    found, left = jnp.zeros_like(a), a
    for _ in range(3):
        part = left.astype(jnp.bfloat16)
        found, left = found + dot(order, part, None), left - part.astype(a.dtype)
    return found


def _tile(i):
    return pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
