"""The forward kernel of attention on Hopper, in Mosaic GPU.

A persistent thread block of three warpgroups: two compute, each on its 64 of a tile's 128 queries,
and one copies blocks of keys and values into a ring of `STAGES` in shared memory by TMA. While one
warpgroup is in its softmax, the other has the tensor cores: they hand them to each other through
the barrier `turn` (FlashAttention-3, arXiv 2407.08608, section 3.1). Scores stay in base 2: the
scale and log2(e) are one factor, multiplied in with the subtraction of the maximum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_ops, gpu_plan
from pallas_kernels.attention.gpu_ops import LEAST, LOG2_E, OF_ROWS, Machine, along_rows
from pallas_kernels.attention.settings import Settings

ROWS = 64  # queries of a warpgroup: what one wgmma takes
COMPUTE = 2  # warpgroups that compute; one more copies
BLOCK_Q = ROWS * COMPUTE
STAGES = 2
CORES = 132  # streaming multiprocessors of an H100 or H200 (SXM): thread blocks of the grid
# Registers of a thread: 168 each at the start, moved from who copies to who computes.
COMPUTING, COPYING = 240, 24


class Shape(NamedTuple):
    """Static sizes of a call; T and S are padded to whole blocks."""

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    block_q: int
    block_kv: int
    settings: Settings


def run(q, k, v, shape: Shape, work: gpu_plan.Work, interpret=None, cores=CORES):
    """out [B, T, N, H] in q's dtype and lse [B, N, T] in float32.

    Args:
      q: [B, T, N, H]. k, v: [B, S, K, H]. Padded.
      interpret: parameters of the Mosaic GPU interpreter, or None.
      cores: thread blocks at most.
    """
    machine = Machine(interpret is not None)
    count = len(work.tiles) * shape.B
    cores = min(cores, count)

    def kernel(*refs):
        _block(machine, shape, work.masks, count, cores, *refs)

    per_stage = plgpu.Barrier(num_arrivals=1, num_barriers=STAGES)
    freed = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES)
    return plgpu.kernel(
        kernel,
        kernel_name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((shape.B, shape.N, shape.T), jnp.float32),
        ),
        scratch_types=(
            gpu_ops.shared((COMPUTE, ROWS, shape.H), q.dtype),
            gpu_ops.shared((STAGES, shape.block_kv, shape.H), q.dtype),
            gpu_ops.shared((STAGES, shape.block_kv, shape.H), q.dtype),
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE),
            per_stage,
            per_stage,
            freed,
            freed,
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=1),
        ),
        grid=(cores,),
        grid_names=("core",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({"interpret": interpret} if interpret is not None else {}),
    )(q, k, v, jnp.asarray(work.tiles), jnp.asarray(work.blocks))


class _Tile(NamedTuple):
    """A tile of work, as read from the list."""

    b: jax.Array
    head: jax.Array
    row: jax.Array
    start: jax.Array
    count: jax.Array

    @classmethod
    def read(cls, tiles, index, B):
        place = jax.lax.div(index, jnp.int32(B))
        b = jax.lax.rem(index, jnp.int32(B))
        return cls(b, *(tiles[place, i] for i in range(4)))


def _block(machine, shape, masks, count, cores, *refs):
    """What a thread block does: its share of the tiles, in each of its warpgroups."""
    core, group = jax.lax.axis_index("core"), jax.lax.axis_index("warpgroup")
    mine = jax.lax.div(count - core + cores - 1, jnp.int32(cores))

    def each_tile(body):
        def at(i, step):
            tile = _Tile.read(refs[3], core + i * cores, shape.B)
            body(tile, step)
            return step + tile.count

        return jax.lax.fori_loop(jnp.int32(0), mine, at, jnp.int32(0))

    @pl.when(group < COMPUTE)
    def compute():
        if not machine.interpreted:
            plgpu.set_max_registers(COMPUTING, action="increase")
        _free_all(refs)
        each_tile(lambda tile, step: _attend(machine, shape, masks, group, tile, step, refs))

    @pl.when(group == COMPUTE)
    def copy():
        if not machine.interpreted:
            plgpu.set_max_registers(COPYING, action="decrease")
        each_tile(lambda tile, step: _copy(shape, tile, step, refs))
        _await_all(refs)


def _free_all(refs):
    for stage in range(STAGES):
        for freed in refs[14:16]:
            plgpu.barrier_arrive(freed.at[stage])


def _await_all(refs):
    """No warpgroup of a thread block ends while another has yet to arrive at its barriers."""
    for stage in range(STAGES):
        for freed in refs[14:16]:
            plgpu.barrier_wait(freed.at[stage])


def _copy(shape, tile, step, refs):
    """The tile's keys and values into the ring, block after block."""
    sources, blocks = refs[1:3], refs[4]
    rings, filled, freed = refs[8:10], refs[12:14], refs[14:16]
    head = jax.lax.div(tile.head, jnp.int32(shape.N // shape.K))

    @pl.loop(jnp.int32(0), tile.count)
    def _(i):
        stage = jax.lax.rem(step + i, jnp.int32(STAGES))
        column = jnp.bitwise_and(blocks[tile.start + i], gpu_plan.MOST_COLUMNS - 1)
        rows = pl.ds(column * shape.block_kv, shape.block_kv)
        for source, ring, full, empty in zip(sources, rings, filled, freed, strict=True):
            plgpu.barrier_wait(empty.at[stage])
            plgpu.copy_gmem_to_smem(
                source.at[tile.b, rows, head], ring.at[stage], full.at[stage]
            )


def _attend(machine, shape, masks, group, tile, step, refs):
    """out and lse of a warpgroup's queries of a tile."""
    q, blocks, out, lse = refs[0], refs[4], refs[5], refs[6]
    own, own_lse = refs[7].at[group], refs[10].at[group]
    q_filled, turn = refs[11].at[group], refs[16]
    first = tile.row * shape.block_q + group * ROWS
    plgpu.copy_gmem_to_smem(q.at[tile.b, pl.ds(first, ROWS), tile.head], own, q_filled)
    plgpu.barrier_wait(q_filled)

    def pass_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def at(i, carry):
        return _step(machine, shape, masks, group, first, step + i, blocks[tile.start + i],
                     own, refs, carry)  # fmt: skip

    # The second warpgroup starts half a step after the first, and the first ends before it.
    pl.when(group == 1)(pass_turn)
    carry = (
        machine.full((ROWS, shape.H), 0),
        machine.full((ROWS,), LEAST, OF_ROWS),
        machine.full((ROWS,), 0, OF_ROWS),
    )
    total, most, weight = jax.lax.fori_loop(jnp.int32(0), tile.count, at, carry)
    pl.when(group == 0)(pass_turn)

    seen = weight > 0
    inverse = jnp.where(seen, 1 / weight, 0.0)
    own[...] = (total * along_rows(inverse, total.shape)).astype(own.dtype)
    sum_log = jnp.log(jnp.where(seen, weight, 1.0))
    own_lse[...] = jnp.where(seen, most / LOG2_E + sum_log, -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, out.at[tile.b, pl.ds(first, ROWS), tile.head])
    plgpu.copy_smem_to_gmem(own_lse, lse.at[tile.b, tile.head, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _step(machine, shape, masks, group, first, step, block, own, refs, carry):
    """One block of keys: online softmax."""
    k_ring, v_ring, turn = refs[8], refs[9], refs[16]
    (k_filled, v_filled), (k_freed, v_freed) = refs[12:14], refs[14:16]
    stage = jax.lax.rem(step, jnp.int32(STAGES))
    total, most, weight = carry

    def start_softmax():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    plgpu.barrier_wait(k_filled.at[stage])
    x = machine.transposed_product(own, k_ring.at[stage], start_softmax)
    plgpu.barrier_arrive(k_freed.at[stage])
    x = hide(machine, shape, masks, block, first, x)
    factor = shape.settings.scale * LOG2_E
    new = jnp.maximum(most, x.max(axis=1) * factor)
    shrink = jnp.exp2(most - new)
    p = jnp.exp2(x * factor - along_rows(new, x.shape))
    weight = weight * shrink + p.sum(axis=1)
    total = total * along_rows(shrink, total.shape)
    p = p.astype(own.dtype)
    if not machine.interpreted:  # the softmax is over before the other warpgroup's begins
        total, weight, new, p = jax.lax.optimization_barrier((total, weight, new, p))
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(v_filled.at[stage])
    plgpu.barrier_wait(turn)
    total = machine.add_product(total, p, v_ring.at[stage])
    plgpu.barrier_arrive(v_freed.at[stage])
    return total, new, weight


def hide(machine, shape, masks, block, first, x):
    """Scores x [ROWS, block_kv] with -inf where the block's mask hides a key."""
    if len(masks) == 2:
        return x

    def by(mask):
        def hidden(x, first, column):
            t = machine.positions(x.shape, 0, first)
            s = machine.positions(x.shape, 1, column * shape.block_kv)
            return jnp.where(mask.element(0, t, s), x, -jnp.inf)

        return hidden

    column = jnp.bitwise_and(block, gpu_plan.MOST_COLUMNS - 1)
    kind = jax.lax.shift_right_logical(block, jnp.int32(gpu_plan.KIND_SHIFT))
    branches = [lambda x, *_: x, *(by(mask) for mask in masks[2:])]
    return jax.lax.switch(kind - 1, branches, x, first, column)
