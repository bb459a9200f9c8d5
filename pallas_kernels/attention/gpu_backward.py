"""The backward kernels of attention on Hopper, in Mosaic GPU: dQ, and dK and dV.

Both are deterministic: each result is summed up by one warpgroup in registers, in the order of a
list, and neither uses atomics. Weights are made again from the log-sum-exp. As in the forward
kernel two warpgroups compute and one copies. For dQ a warpgroup keeps its 64 queries in shared
memory and keys and values come by; for dK and dV it keeps 64 keys, works on transposed scores, and
the queries of all heads of its key head come by, so that gradients of grouped heads are summed in
float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_ops
from pallas_kernels.attention.gpu_ops import (
    COMPUTE,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    STAGES,
    TILE_ROWS,
    Lists,
    Machine,
    Ring,
    Shape,
    along_columns,
    along_rows,
)
from pallas_kernels.attention.gpu_scores import Place, scores


class Inputs(NamedTuple):
    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    dout: Any  # [B, T, N, H]
    lse: Any  # float32[B, N, T], in base 2, +inf for a row that sees nothing
    delta: Any  # float32[B, N, T], rowsum(dout * out) - dlse
    q_ids: Any  # int32[B, T], or None
    kv_ids: Any  # int32[B, S], or None
    lists: Lists


class Scratch(NamedTuple):
    own: tuple  # operands of a warpgroup's rows, each [COMPUTE, ROWS, H]; results replace them
    rows: tuple  # what else it has for each row, [COMPUTE, ROWS]
    ring: Ring
    arrived: Any


def _scratch(own, rows, ring):
    count = len(own) + len(rows)
    arrived = tuple(plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE) for _ in range(count))
    return Scratch(own, rows, ring, arrived)


def _load(group, scratch, sources):
    """A warpgroup's own arrays, from `sources`, in shared memory."""
    own = [x.at[group] for x in (*scratch.own, *scratch.rows)]
    barriers = [x.at[group] for x in scratch.arrived]
    gpu_ops.arrived(*zip(sources, own, barriers, strict=True))
    return own[: len(scratch.own)], own[len(scratch.own) :]


def _store(totals, buffers, targets):
    for total, buffer in zip(totals, buffers, strict=True):
        buffer[...] = total.astype(buffer.dtype)
    plgpu.commit_smem()
    for buffer, target in zip(buffers, targets, strict=True):
        plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _weights(machine, shape, masks, place, x, lse):
    """Softmax weights, from products q k^T, and tanh of the softcap.

    lse: gives the log-sum-exp; called late, for it takes registers.
    """
    x, factor, capped = scores(machine, shape.settings, masks, place, x)
    return jnp.exp2(x * factor - lse()), capped


def _scores_gradient(p, dp, delta, capped):
    dx = p * (dp - delta)
    return dx if capped is None else dx * (1 - capped * capped)


def run_queries(inputs: Inputs, shape: Shape, masks, machine: Machine):
    """dq [B, T, N, H] in q's dtype, of padded inputs."""
    dtype, segments = inputs.q.dtype, inputs.q_ids is not None

    def attention_backward_queries(cores, inputs, outputs, scratch):
        machine.each_tile(
            inputs.lists, scratch.ring, shape, cores,
            lambda *at: _query_tile(machine, shape, masks, inputs, outputs[0], scratch, *at),
            lambda *at: _key_sources(shape, inputs, *at),
        )  # fmt: skip

    own = gpu_ops.operand((COMPUTE, ROWS), shape, dtype)
    block = gpu_ops.operand((STAGES, shape.columns), shape, dtype)
    ids = [plgpu.SMEM((STAGES, shape.columns), jnp.int32)] * segments
    numbers = [plgpu.SMEM((COMPUTE, ROWS), jnp.float32)] * 2
    own_ids = [plgpu.SMEM((COMPUTE, ROWS), jnp.int32)] * segments
    ring = Ring.scratch((block, *ids), (block,))
    scratch = _scratch((own, own), (*numbers, *own_ids), ring)
    out_type = (jax.ShapeDtypeStruct(inputs.q.shape, dtype),)
    count = inputs.lists.tiles.shape[1] * shape.B
    return machine.launch(attention_backward_queries, inputs, out_type, scratch, count)[0]


def _key_sources(shape, inputs, tile, block):
    rows = pl.ds(block.column * shape.columns, shape.columns)
    head = jax.lax.div(tile.head, jnp.int32(shape.N // shape.K))
    ids = [] if inputs.kv_ids is None else [inputs.kv_ids.at[tile.b, rows]]
    return [inputs.k.at[tile.b, rows, head], *ids], [inputs.v.at[tile.b, rows, head]]


def _query_tile(machine, shape, masks, inputs, dq, scratch, group, tile, step):
    first = tile.row * TILE_ROWS + group * ROWS
    rows = pl.ds(first, ROWS)
    wide, narrow = (tile.b, rows, tile.head), (tile.b, tile.head, rows)
    sources = [inputs.q.at[wide], inputs.dout.at[wide], inputs.lse.at[narrow]]
    sources.append(inputs.delta.at[narrow])
    if inputs.q_ids is not None:
        sources.append(inputs.q_ids.at[tile.b, rows])
    buffers, numbers = _load(group, scratch, sources)
    lse, delta, *ids = (machine.read(x, OF_ROWS) for x in numbers)

    def at(i, total):
        block = inputs.lists.block(tile, i)
        row_ids = ids[0] if ids else None
        s = block.column * shape.columns
        place = Place(block, tile.head, first, s, False, row_ids, None)
        own = [x.at[group + block.zero] for x in scratch.own]
        at = machine, shape, masks, scratch.ring
        return _query_step(*at, own, lse, delta, place, step + i, total)

    total = machine.full((ROWS, shape.H), 0)
    total = jax.lax.fori_loop(jnp.int32(0), tile.count, at, total)
    _store([total * shape.settings.scale], buffers[:1], [dq.at[wide]])


def _query_step(machine, shape, masks, ring, own, lse, delta, place, step, total):
    """total + dS K of one block of keys."""
    stage = jax.lax.rem(step, jnp.int32(STAGES))
    q, dout = own
    keys, *ids = ring.wait(0, stage)
    x = machine.transposed_product(q, keys)
    place = place._replace(column_ids=ids[0] if ids else None)
    p, capped = _weights(machine, shape, masks, place, x, lambda: along_rows(lse, x.shape))
    (values,) = ring.wait(1, stage)
    dp = machine.transposed_product(dout, values)
    ring.free(1, stage)
    dx = _scores_gradient(p, dp, along_rows(delta, x.shape), capped)
    total = machine.add_product(total, dx.astype(q.dtype), keys)
    ring.free(0, stage)
    return total


def run_keys(inputs: Inputs, shape: Shape, masks, machine: Machine, results=("dk", "dv")):
    """dk, dv [B, S, K, H] in k's dtype, of padded inputs.

    Args:
      results: both, or one of them: above a head size of 128 two sums do not fit in registers.
    """
    dtype, segments = inputs.q.dtype, inputs.q_ids is not None

    def attention_backward_keys(cores, inputs, outputs, scratch):
        machine.each_tile(
            inputs.lists, scratch.ring, shape, cores,
            lambda *at: _key_tile(machine, shape, masks, results, inputs, outputs, scratch, *at),
            lambda *at: _query_sources(shape, inputs, *at),
        )  # fmt: skip

    own = gpu_ops.operand((COMPUTE, ROWS), shape, dtype)
    block = gpu_ops.operand((STAGES, shape.columns), shape, dtype)
    numbers = plgpu.SMEM((STAGES, shape.columns), jnp.float32)
    ids = [plgpu.SMEM((STAGES, shape.columns), jnp.int32)] * segments
    own_ids = [plgpu.SMEM((COMPUTE, ROWS), jnp.int32)] * segments
    ring = Ring.scratch((block, numbers, *ids), (block, numbers))
    scratch = _scratch((own, own) if "dk" in results else (own,), tuple(own_ids), ring)
    out_type = (jax.ShapeDtypeStruct(inputs.k.shape, dtype),) * len(results)
    count = inputs.lists.tiles.shape[1] * shape.B
    return machine.launch(attention_backward_keys, inputs, out_type, scratch, count)


def _query_sources(shape, inputs, tile, block):
    rows = pl.ds(block.column * shape.columns, shape.columns)
    head = tile.head * (shape.N // shape.K) + block.head
    wide, narrow = (tile.b, rows, head), (tile.b, head, rows)
    ids = [] if inputs.q_ids is None else [inputs.q_ids.at[tile.b, rows]]
    queries = [inputs.q.at[wide], inputs.lse.at[narrow], *ids]
    return queries, [inputs.dout.at[wide], inputs.delta.at[narrow]]


def _key_tile(machine, shape, masks, results, inputs, outputs, scratch, group, tile, step):
    first = tile.row * TILE_ROWS + group * ROWS
    rows = pl.ds(first, ROWS)
    at_rows = (tile.b, rows, tile.head)
    sources = [inputs.k.at[at_rows], inputs.v.at[at_rows]][: len(scratch.own)]
    if inputs.kv_ids is not None:
        sources.append(inputs.kv_ids.at[tile.b, rows])
    buffers, numbers = _load(group, scratch, sources)
    ids = [machine.read(x, OF_ROWS) for x in numbers]

    def at(i, totals):
        block = inputs.lists.block(tile, i)
        row_ids = ids[0] if ids else None
        head = tile.head * (shape.N // shape.K) + block.head
        t = block.column * shape.columns
        place = Place(block, head, t, first, True, row_ids, None)
        own = [x.at[group + block.zero] for x in scratch.own]
        return _key_step(machine, shape, masks, scratch.ring, own, place, step + i, totals)

    totals = {name: machine.full((ROWS, shape.H), 0) for name in results}
    totals = jax.lax.fori_loop(jnp.int32(0), tile.count, at, totals)
    if "dk" in results:
        totals["dk"] *= shape.settings.scale
    targets = [output.at[at_rows] for output in outputs]
    _store([totals[name] for name in results], buffers[: len(results)], targets)


def _key_step(machine, shape, masks, ring, own, place, step, totals):
    """totals and what one block of queries adds: P^T dO to dV, dS^T Q to dK."""
    stage, totals = jax.lax.rem(step, jnp.int32(STAGES)), dict(totals)
    queries, lse, *ids = ring.wait(0, stage)
    x = machine.transposed_product(own[0], queries)
    place = place._replace(column_ids=ids[0] if ids else None)
    p, capped = _weights(
        machine, shape, masks, place, x,
        lambda: along_columns(machine.read(lse, OF_COLUMNS), x.shape),
    )  # fmt: skip
    dout, delta = ring.wait(1, stage)
    if "dv" in totals:
        totals["dv"] = machine.add_product(totals["dv"], p.astype(queries.dtype), dout)
    if "dk" in totals:
        dp = machine.transposed_product(own[1], dout)
        delta = along_columns(machine.read(delta, OF_COLUMNS), x.shape)
        dx = _scores_gradient(p, dp, delta, capped).astype(queries.dtype)
        totals["dk"] = machine.add_product(totals["dk"], dx, queries)
    ring.free(1, stage)
    ring.free(0, stage)
    return totals
