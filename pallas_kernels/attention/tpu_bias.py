"""The gradient of an additive bias on TPU: a kernel of its own, compiled only where asked for.

dS of a block is added up over the batch entries, heads and queries along which the bias was
broadcast, in VMEM, and written once. All blocks are visited, since all of dbias must be written;
empty ones cost no product.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tpu_plan
from pallas_kernels.attention.tpu_backward import weights_and_slopes
from pallas_kernels.attention.tpu_scores import Cell, Scores, contract, visit
from pallas_kernels.attention.tpu_specs import Place, Shape, input_specs


class Grid(NamedTuple):
    """(b, n, kv, q) of the bias's own axes, then b, n, q that are added up; the rest of size 1."""

    shape: Shape
    kinds: tpu_plan.Kinds
    own: tuple[bool, bool, bool]

    @property
    def sizes(self) -> tuple[int, ...]:
        shape, tile = self.shape, self.shape.tile
        many = (shape.B, shape.N, shape.T // tile.block_q)
        b, n, q = (size if own else 1 for size, own in zip(many, self.own, strict=True))
        summed = (1 if own else size for size, own in zip(many, self.own, strict=True))
        return (b, n, shape.S // tile.block_kv, q, *summed)

    def spec(self, block, index) -> pl.BlockSpec:
        def mapped(b, n, kv, q, b_summed, n_summed, q_summed, _):
            return index(b + b_summed, n + n_summed, q + q_summed, kv)

        return pl.BlockSpec((None, None, *block), mapped)

    def place(self, scalars) -> Place:
        b, n, kv, q, *summed = (pl.program_id(axis) for axis in range(7))
        b, n, q = b + summed[0], n + summed[1], q + summed[2]
        _, rows, columns = self.kinds.state.shape
        state = scalars["state"][(scalars["table"][n] * rows + q) * columns + kv]
        return Place(b, n, q, kv, state)


def kernel(scalars, inputs, dbias, *, grid: Grid):
    """dbias of one block: float32 [block_kv, block_q], or [1, block_kv] added up over queries."""
    tile, at = grid.shape.tile, grid.place(scalars)
    scores = Scores(inputs, grid.shape, grid.kinds.masks, at)

    @pl.when(sum(pl.program_id(axis) for axis in (4, 5, 6)) == 0)
    def _():
        dbias[...] = jnp.zeros_like(dbias)

    def add(start, kind):
        cells = [Cell(0, tile.piece, 0, tile.block_q, kind)]
        slopes = weights_and_slopes(scores, start, tile.piece, cells)[1]
        keys = pl.ds(start, tile.piece)
        if grid.own[2]:
            dbias[keys, :] += slopes
        else:
            ones = jnp.ones((8, tile.block_q), jnp.float32)
            dbias[:, keys] += contract(ones, slopes, (1, 1))[:1]

    visit(scores, scalars, add)


def run(inputs, shape: Shape, kinds: tpu_plan.Kinds, ranges, interpret=False):
    """dbias [#B, #N, S, T] or [#B, #N, 1, S] float32, padded as inputs["bias"] is."""
    bias, tile = inputs["bias"], shape.tile
    rows = bias.shape[2] > 1
    grid = Grid(shape, kinds, (bias.shape[0] > 1, bias.shape[1] > 1, rows))
    scalars = {
        "state": jnp.asarray(kinds.state.reshape(-1)),
        "table": jnp.asarray(kinds.table),
        **ranges,
    }
    block = (tile.block_kv, tile.block_q) if rows else (1, tile.block_kv)
    steps = int(np.prod(grid.sizes)) * tile.block_q * tile.block_kv
    return pl.pallas_call(
        functools.partial(kernel, grid=grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.sizes,
            in_specs=[input_specs(inputs, grid)],
            out_specs=pl.BlockSpec(
                (None, None, *block),
                lambda b, n, kv, q, *_: (b, n, *((kv, q) if rows else (0, kv))),
            ),
        ),
        out_shape=jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",) * 3,
            vmem_limit_bytes=48 * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * steps * shape.H, transcendentals=steps, bytes_accessed=4 * bias.size
        ),
        interpret=interpret,
        name="attention_backward_bias",
    )(scalars, inputs)
