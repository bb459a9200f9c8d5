"""Products, layouts and the persistent grid of the Hopper kernels.

The Mosaic GPU interpreter of JAX 0.10 runs copies, barriers, warpgroups and the grid, but knows no
layouts and no wgmma whose operand is transposed, lies in registers, or whose accumulator has a
value already. There `Machine` multiplies what it reads from shared memory in float32, so that the
interpreter checks everything about a kernel except these instructions, which compiling it does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import gpu_plan
from pallas_kernels.attention.settings import Settings

ROWS = 64  # rows of a warpgroup: what one wgmma takes
COMPUTE = 2  # warpgroups that compute; one more copies
TILE_ROWS = ROWS * COMPUTE
STAGES = 2  # blocks of columns in shared memory
CORES = 132  # streaming multiprocessors of an H100 or H200 (SXM)
# Registers of a thread: 168 each at the start, moved from who copies to who computes.
COMPUTING, COPYING = 240, 24

TILE = plgpu.Layout.WGMMA  # of [64, columns], a warpgroup's share of a product
OF_ROWS, OF_COLUMNS = TILE.reduce(1), TILE.reduce(0)  # of [64] and of [columns]
LOG2_E = 1.4426950408889634


class Shape(NamedTuple):
    """Static sizes of a kernel; T and S are padded to whole blocks and tiles."""

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    columns: int  # of a block: keys, or queries for dK and dV
    settings: Settings


class Tile(NamedTuple):
    """A tile of rows, as read from gpu_plan's list. `head` is a key head where rows are keys."""

    b: jax.Array
    head: jax.Array
    row: jax.Array
    start: jax.Array
    count: jax.Array


class Block(NamedTuple):
    """A block of columns, as read from gpu_plan's list; `head` counts within a group."""

    column: jax.Array
    head: jax.Array
    kind: jax.Array
    mixed: jax.Array

    @property
    def zero(self):
        """0, though the compiler cannot know it.

        An address made with it is not computed before the loop over blocks: otherwise the
        descriptors of every wgmma on it are kept in registers throughout, and some are spilled.
        """
        return jax.lax.shift_right_logical(self.mixed, jnp.int32(31))


class Lists(NamedTuple):
    """gpu_plan's lists in device memory, [1 or B, W, 4] and [1 or B, P]."""

    tiles: Any
    blocks: Any

    def tile(self, index, B):
        place, b = jax.lax.div(index, jnp.int32(B)), jax.lax.rem(index, jnp.int32(B))
        of = b if self.tiles.shape[0] > 1 else 0
        return Tile(b, *(self.tiles[of, place, i] for i in range(4)))

    def block(self, tile, i):
        word = self.blocks[tile.b if self.blocks.shape[0] > 1 else 0, tile.start + i]
        return Block(*gpu_plan.unpack(word))


class Ring(NamedTuple):
    """Blocks of columns in shared memory, in groups that are filled and freed together.

    buffers: for each group its arrays [STAGES, ...]. filled, freed: a barrier a stage.
    """

    buffers: tuple
    filled: tuple
    freed: tuple

    @classmethod
    def scratch(cls, *groups):
        filled = [plgpu.Barrier(num_arrivals=len(x), num_barriers=STAGES) for x in groups]
        freed = [plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES) for _ in groups]
        return cls(tuple(map(tuple, groups)), tuple(filled), tuple(freed))

    def wait(self, group, stage):
        """The arrays of a group of a stage, when they are there."""
        plgpu.barrier_wait(self.filled[group].at[stage])
        return [buffer.at[stage] for buffer in self.buffers[group]]

    def free(self, group, stage):
        if len(self.buffers[group]) > 1:
            # What is beside an operand was read by the threads, not by wgmma: their reads are
            # made known to the copy engine before it may write there again.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.freed[group].at[stage])

    def free_all(self):
        for stage in range(STAGES):
            for group in range(len(self.freed)):
                self.free(group, stage)

    def await_all(self):
        """No warpgroup of a thread block ends while another has yet to arrive at its barriers."""
        for stage in range(STAGES):
            for freed in self.freed:
                plgpu.barrier_wait(freed.at[stage])

    def copy(self, lists, tile, step, sources):
        """Fills the ring with all blocks of a tile; sources(tile, block) gives what to copy."""

        @pl.loop(jnp.int32(0), tile.count)
        def _(i):
            stage = jax.lax.rem(step + i, jnp.int32(STAGES))
            groups = sources(tile, lists.block(tile, i))
            for group, given in enumerate(groups):
                plgpu.barrier_wait(self.freed[group].at[stage])
                for source, buffer in zip(given, self.buffers[group], strict=True):
                    plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.filled[group].at[stage])


@dataclasses.dataclass(frozen=True)
class Machine:
    """The chip, or the interpreter.

    interpret: parameters of the Mosaic GPU interpreter, or None.
    cores: thread blocks at most.
    """

    interpret: Any = None
    cores: int = CORES

    @property
    def chip(self) -> bool:
        return self.interpret is None

    def launch(self, body: Callable, operands, out_type, scratch, count: int):
        """Runs body(cores, inputs, outputs, scratch), on refs, in a persistent grid.

        Args:
          operands: a pytree of arrays. out_type: a tuple. scratch: a pytree.
          count: tiles of work.
        """
        leaves, tree = jax.tree.flatten(operands)
        cores = min(self.cores, count)

        def kernel(*refs, scratch):
            inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
            body(cores, inputs, refs[len(leaves) :], scratch)

        return plgpu.kernel(
            kernel,
            kernel_name=body.__name__,
            out_type=out_type,
            scratch_types={"scratch": scratch},
            grid=(cores,),
            grid_names=("core",),
            num_threads=COMPUTE + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            **({} if self.chip else {"interpret": self.interpret}),
        )(*leaves)

    def each_tile(self, lists, ring, shape, cores, compute, sources):
        """A thread block's share of the tiles, in each of its warpgroups.

        Args:
          compute: compute(warpgroup, tile, step), `step` being the blocks that went before.
          sources: as in Ring.copy.
        """
        core, group = jax.lax.axis_index("core"), jax.lax.axis_index("warpgroup")
        count = lists.tiles.shape[1] * shape.B
        mine = jax.lax.div(count - core + cores - 1, jnp.int32(cores))

        def loop(body):
            def at(i, step):
                tile = lists.tile(core + i * cores, shape.B)
                body(tile, step)
                return step + tile.count

            jax.lax.fori_loop(jnp.int32(0), mine, at, jnp.int32(0))

        @pl.when(group < COMPUTE)
        def _():
            if self.chip:
                plgpu.set_max_registers(COMPUTING, action="increase")
            ring.free_all()
            loop(lambda tile, step: compute(group, tile, step))

        @pl.when(group == COMPUTE)
        def _():
            if self.chip:
                plgpu.set_max_registers(COPYING, action="decrease")
            loop(lambda tile, step: ring.copy(lists, tile, step, sources))
            ring.await_all()

    def place(self, x, layout):
        """x in a layout of registers."""
        return plgpu.layout_cast(x, layout) if self.chip else x

    def full(self, shape, value, layout=TILE):
        return self.place(jnp.full(shape, value, jnp.float32), layout)

    def read(self, ref, layout):
        """What is in shared memory."""
        return self.place(ref[...], layout)

    def positions(self, shape, axis, first):
        """int32 of `shape`: first, first + 1, ... along an axis."""
        return self.place(jax.lax.broadcasted_iota(jnp.int32, shape, axis), TILE) + first

    def settle(self, *values):
        """The values, all computed before anything that follows."""
        return jax.lax.optimization_barrier(values) if self.chip else values

    def transposed_product(self, a, b, meanwhile=lambda: None):
        """a b^T in float32, of a [m, H] and b [n, H] in shared memory.

        meanwhile: called between the start of the product and the wait for it.
        """
        if not self.chip:
            meanwhile()
            return jnp.dot(_wide(self._load(a)), _wide(self._load(b)).T, precision="highest")

        def multiply(result):
            plgpu.wgmma(result, a, b.transpose((1, 0)))
            meanwhile()
            return result[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_product(self, total, a, b):
        """total + a b, of a [m, n] in registers and b [n, H] in shared memory."""
        if not self.chip:
            return total + jnp.dot(_wide(a), _wide(self._load(b)), precision="highest")
        return pl.run_state(lambda result: plgpu.wgmma(result, a, b))(plgpu.ACC.init(total))

    def _load(self, ref):
        """An operand, where the interpreter's threads read what wgmma reads on the chip."""
        value = ref[...]
        plgpu.commit_smem()  # wgmma needs none; see Ring.free
        return value


def along_rows(x, shape):
    """x [m] repeated along the rows of [m, n]."""
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x, shape):
    """x [n] repeated along the columns of [m, n]."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


def operand(leading, shape, dtype):
    """Shared memory for operands of wgmma, [*leading, H] tiled and swizzled.

    A product takes operands of one swizzle, and sums over at least as many elements as it is wide,
    so that it may not be wider than a block of columns.
    """
    bits = jnp.finfo(dtype).bits
    shape, columns = (*leading, shape.H), shape.columns
    swizzle = min(plgpu.find_swizzle(shape[-1] * bits), columns * bits // 8)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def arrived(*copies):
    """Starts copies (source, destination, barrier), and waits for them."""
    for copy in copies:
        plgpu.copy_gmem_to_smem(*copy)
    for _, _, barrier in copies:
        plgpu.barrier_wait(barrier)


def _wide(x):
    return x.astype(jnp.float32)
