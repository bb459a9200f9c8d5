"""The forward kernel of attention on Hopper, in Mosaic GPU.

A persistent thread block of three warpgroups: two compute, each on its 64 of a tile's 128 queries,
and one copies blocks of keys and values into a ring in shared memory by TMA. While one warpgroup
is in its softmax, the other has the tensor cores: they hand them to each other through the barrier
`turn` (FlashAttention-3, arXiv 2407.08608, section 3.1). Scores stay in base 2: the scale and
log2(e) are one factor, multiplied in with the subtraction of the maximum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_ops
from pallas_kernels.attention.gpu_ops import (
    COMPUTE,
    LOG2_E,
    OF_ROWS,
    ROWS,
    STAGES,
    TILE_ROWS,
    Lists,
    Machine,
    Ring,
    Shape,
    along_rows,
)
from pallas_kernels.attention.gpu_scores import Place, scores

# A running maximum to start from: less than any score, and finite, so that a row without a key
# gives zeros and no NaN.
LEAST = -1e38


class Inputs(NamedTuple):
    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    q_ids: Any  # int32[B, T], or None
    kv_ids: Any  # int32[B, S], or None
    lists: Lists


class Scratch(NamedTuple):
    own: Any  # queries, and then results, [COMPUTE, ROWS, H]
    lse: Any  # [COMPUTE, ROWS]
    ids: Any  # [COMPUTE, ROWS], or None
    ring: Ring  # (keys, their segments), (values,)
    arrived: Any
    ids_arrived: Any
    turn: Any


def run(inputs: Inputs, shape: Shape, masks, machine: Machine):
    """out [B, T, N, H] in q's dtype and lse [B, N, T] in float32, of padded inputs."""
    segments = inputs.q_ids is not None

    def attention_forward(cores, inputs, outputs, scratch):
        machine.each_tile(
            inputs.lists, scratch.ring, shape, cores,
            lambda *at: _tile(machine, shape, masks, inputs, outputs, scratch, *at),
            lambda *at: _sources(shape, inputs, *at),
        )  # fmt: skip

    block = gpu_ops.operand((STAGES, shape.columns), shape, inputs.q.dtype)
    ids = [plgpu.SMEM((STAGES, shape.columns), jnp.int32)] * segments
    each = plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE)
    scratch = Scratch(
        gpu_ops.operand((COMPUTE, ROWS), shape, inputs.q.dtype),
        plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        plgpu.SMEM((COMPUTE, ROWS), jnp.int32) if segments else None,
        Ring.scratch((block, *ids), (block,)),
        each,
        each if segments else None,
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=1),
    )
    out_type = (
        jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        jax.ShapeDtypeStruct((shape.B, shape.N, shape.T), jnp.float32),
    )
    count = inputs.lists.tiles.shape[1] * shape.B
    return machine.launch(attention_forward, inputs, out_type, scratch, count)


def _sources(shape, inputs, tile, block):
    rows = pl.ds(block.column * shape.columns, shape.columns)
    head = jax.lax.div(tile.head, jnp.int32(shape.N // shape.K))
    ids = [] if inputs.kv_ids is None else [inputs.kv_ids.at[tile.b, rows]]
    return [inputs.k.at[tile.b, rows, head], *ids], [inputs.v.at[tile.b, rows, head]]


def _tile(machine, shape, masks, inputs, outputs, scratch, group, tile, step):
    """out and lse of a warpgroup's queries of a tile."""
    first = tile.row * TILE_ROWS + group * ROWS
    rows = pl.ds(first, ROWS)
    own, own_lse, turn = scratch.own.at[group], scratch.lse.at[group], scratch.turn
    copies = [(inputs.q.at[tile.b, rows, tile.head], own, scratch.arrived.at[group])]
    if scratch.ids is not None:
        ids = scratch.ids.at[group]
        copies.append((inputs.q_ids.at[tile.b, rows], ids, scratch.ids_arrived.at[group]))
    gpu_ops.arrived(*copies)
    row_ids = None if scratch.ids is None else machine.read(ids, OF_ROWS)

    def at(i, carry):
        block = inputs.lists.block(tile, i)
        place = Place(block, tile.head, first, block.column * shape.columns, False, row_ids, None)
        queries = scratch.own.at[group + block.zero]
        return _step(machine, shape, masks, scratch, queries, place, step + i, carry)

    # The second warpgroup starts half a step after the first, and the first ends before it.
    pl.when(group == 1)(lambda: _exchange(turn))
    carry = (
        machine.full((ROWS, shape.H), 0),
        machine.full((ROWS,), LEAST, OF_ROWS),
        machine.full((ROWS,), 0, OF_ROWS),
    )
    total, most, weight = jax.lax.fori_loop(jnp.int32(0), tile.count, at, carry)
    pl.when(group == 0)(lambda: _exchange(turn))

    seen = weight > 0
    inverse = jnp.where(seen, 1 / weight, 0.0)
    own[...] = (total * along_rows(inverse, total.shape)).astype(own.dtype)
    sum_log = jnp.log(jnp.where(seen, weight, 1.0))
    own_lse[...] = jnp.where(seen, most / LOG2_E + sum_log, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, outputs[0].at[tile.b, rows, tile.head])
    plgpu.copy_smem_to_gmem(own_lse, outputs[1].at[tile.b, tile.head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _exchange(turn):
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _step(machine, shape, masks, scratch, own, place, step, carry):
    """One block of keys: online softmax."""
    ring, turn = scratch.ring, scratch.turn
    stage = jax.lax.rem(step, jnp.int32(STAGES))
    total, most, weight = carry
    keys, *ids = ring.wait(0, stage)
    x = machine.transposed_product(own, keys, lambda: _exchange(turn))
    place = place._replace(column_ids=ids[0] if ids else None)
    if not ids:
        ring.free(0, stage)
    x, factor, _ = scores(machine, shape.settings, masks, place, x)
    if ids:
        ring.free(0, stage)
    new = jnp.maximum(most, x.max(axis=1) * factor)
    shrink = jnp.exp2(most - new)
    p = jnp.exp2(x * factor - along_rows(new, x.shape))
    weight = weight * shrink + p.sum(axis=1)
    total = total * along_rows(shrink, total.shape)
    # The softmax is over before the other warpgroup's begins.
    total, weight, new, p = machine.settle(total, weight, new, p.astype(own.dtype))
    plgpu.barrier_arrive(turn)
    (values,) = ring.wait(1, stage)
    plgpu.barrier_wait(turn)
    total = machine.add_product(total, p, values)
    ring.free(1, stage)
    return total, new, weight
