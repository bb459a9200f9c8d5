"""What the Hopper kernels of structured matrices share: launch, ring in shared memory, products.

A thread block is three warpgroups: two compute, one copies into a ring in shared memory by TMA. It
stays for the whole kernel and takes one item of work after another.

The Mosaic GPU interpreter of JAX 0.10 runs copies, barriers, warpgroups and the grid, but knows no
layouts and no wgmma of a transposed operand or on top of a sum. There `Machine` multiplies what it
reads from shared memory in float32, so that the interpreter checks everything about a kernel except
these instructions, which compiling it does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # what one wgmma takes
DEPTH = 64  # of a stage of the ring: 128 bytes of bfloat16, the widest swizzle
COMPUTE = 2  # warpgroups that compute; one more copies
CORES = 132  # streaming multiprocessors of an H100 or H200 (SXM)
# Registers of a thread: 168 each at the start, moved from who copies to who computes. With 224 and
# 56, with which all that is recorded of an H200 was measured, `hopper_blocks.to_features` puts 32
# bytes out to memory; with these no kernel of the laboratory does.
COMPUTING, COPYING = 232, 40
# Bytes of shared memory of a thread block, less 2 KB for barriers and alignment.
SHARED = 232_448 - 2048
DTYPES = (jnp.bfloat16, jnp.float16)

TILE = plgpu.Layout.WGMMA  # of [64, columns], a warpgroup's share of a product


@functools.cache
def _capability():
    """Of this process' GPU; None without one, where a program for CUDA is taken to be for Hopper.

    A program lowered for CUDA does not say for which GPU.
    """
    try:
        return jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None


def unsupported(dtype) -> str | None:
    """Why no kernel of this kind can run; None where one can."""
    here = _capability()
    if here not in (None, "9.0"):
        return f"a GPU of compute capability {here}; the kernels are for 9.0 (Hopper)"
    if dtype not in DTYPES:
        return f"dtype {dtype}; accepted: bfloat16 or float16"
    return None


def shared(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory for operands of wgmma and for TMA, tiled and swizzled by 128 bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Ring(NamedTuple):
    """Stages in shared memory, filled by the one warpgroup and freed by the others.

    buffers: arrays [stages, ...] filled together by `copies` copies. filled, freed: a barrier each.
    """

    buffers: tuple
    filled: Any
    freed: Any

    @classmethod
    def scratch(cls, *buffers, copies: int):
        stages = buffers[0].shape[0]
        filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        return cls(buffers, filled, plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages))

    @property
    def stages(self) -> int:
        return self.filled.shape[0]

    def stage(self, step):
        return jax.lax.rem(step, jnp.int32(self.stages))

    def free(self, stage):
        plgpu.barrier_arrive(self.freed.at[stage])

    def fill(self, step, *copies):
        """Copies (source, stage -> where to)."""
        stage = self.stage(step)
        plgpu.barrier_wait(self.freed.at[stage])
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target(stage), self.filled.at[stage])


class Operand(NamedTuple):
    """A matrix in shared memory, perhaps to be transposed."""

    ref: Any
    transposed: bool = False


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

    def launch(self, body: Callable, operands, out_type: Sequence, scratch, count: int):
        """Runs body(mine, inputs, outputs, scratch) on refs; mine(i) is the block's i-th item.

        Args:
          operands: a pytree of arrays. scratch: a pytree.
          count: items of work; `mine.count` of them are a block's.
        """
        leaves, tree = jax.tree.flatten(operands)
        cores = min(self.cores, count)

        def kernel(*refs, scratch):
            inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
            core = jax.lax.axis_index("core")
            body(Mine(core, count, cores), inputs, refs[len(leaves) :], scratch)

        return plgpu.kernel(
            kernel,
            kernel_name=body.__name__,
            out_type=tuple(out_type),
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

    def roles(self, rings: Sequence[Ring], compute: Callable, copy: Callable):
        """compute(warpgroup) in those that compute, copy() in the one that copies, into `rings`."""
        group = jax.lax.axis_index("warpgroup")

        @pl.when(group < COMPUTE)
        def _():
            if self.chip:
                plgpu.set_max_registers(COMPUTING, action="increase")
            for ring in rings:
                for stage in range(ring.stages):
                    ring.free(stage)
            compute(group)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def _():
            if self.chip:
                plgpu.set_max_registers(COPYING, action="decrease")
            copy()
            # No warpgroup of a block ends while another has yet to arrive at its barriers.
            for ring in rings:
                for stage in range(ring.stages):
                    plgpu.barrier_wait(ring.freed.at[stage])

    def full(self, shape, value):
        x = jnp.full(shape, value, jnp.float32)
        return plgpu.layout_cast(x, TILE) if self.chip else x

    def products(self, ring: Ring, step, steps, operands, columns, totals=None):
        """The sums over `steps` stages of the ring, from `step` on, of a b.

        Args:
          operands: (stage, i) -> ([Operand a [64, depth], ...], Operand b [depth, columns]), i the
            number of the step among `steps`.
          totals: what to add to, float32 [64, columns] each; None: one, of zeros.

        Returns:
          totals, one for each a.
        """
        if totals is None:
            totals = [self.full((ROWS, columns), 0)]
        if not self.chip:
            return self._interpreted(ring, step, steps, operands, totals)

        def run(accumulators):
            def turn(i, _):
                stage = ring.stage(step + i)
                plgpu.barrier_wait(ring.filled.at[stage])
                parts, b = operands(stage, i)
                for accumulator, a in zip(accumulators, parts, strict=True):
                    plgpu.wgmma(accumulator, _as_stored(a), _as_stored(b))
                # Of this step alone may be under way; so the step before has been read.
                plgpu.wgmma_wait(len(accumulators))
                pl.when(i > 0)(lambda: ring.free(ring.stage(step + i - 1)))

            jax.lax.fori_loop(jnp.int32(0), steps, turn, None)
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: ring.free(ring.stage(step + steps - 1)))

        return list(pl.run_state(run)([plgpu.ACC.init(total) for total in totals]))

    def _interpreted(self, ring, step, steps, operands, totals):
        def turn(i, totals):
            stage = ring.stage(step + i)
            plgpu.barrier_wait(ring.filled.at[stage])
            parts, b = operands(stage, i)
            b = _read(b)
            sums = [
                total + jnp.dot(_read(a), b, precision="highest")
                for total, a in zip(totals, parts, strict=True)
            ]
            # The threads read what wgmma reads on the chip: known before the copy engine writes.
            plgpu.commit_smem()
            ring.free(stage)
            return sums

        return jax.lax.fori_loop(jnp.int32(0), steps, turn, list(totals))


class Mine(NamedTuple):
    """Which items are a thread block's: its number, and as many apart as there are blocks."""

    core: Any
    items: int
    cores: int

    @property
    def count(self):
        return jax.lax.div(self.items - self.core + self.cores - 1, jnp.int32(self.cores))

    def __call__(self, i):
        return self.core + i * self.cores


def _as_stored(operand: Operand):
    return operand.ref.transpose((1, 0)) if operand.transposed else operand.ref


def _read(operand: Operand):
    value = operand.ref[...].astype(jnp.float32)
    return value.T if operand.transposed else value
