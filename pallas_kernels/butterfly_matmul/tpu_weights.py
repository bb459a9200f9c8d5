"""The factors as the TPU kernels take them."""

import jax.numpy as jnp

from pallas_kernels.butterfly_matmul.compose import compose
from pallas_kernels.butterfly_matmul.tpu_plan import LANES, Plan


def prepared(twiddle, plan: Plan) -> dict:
    """The weights by name, in float32.

    lanes: [N / 128, 128, 128], the stages within a tile of lanes multiplied together.
    pairs: [outer, tiles / 2, 2 B, 2 B] of others; pair d s + t joins tiles 2 d s + t and s further.
    """
    found = {}
    if plan.lane_stages:
        first = 0 if plan.increasing else plan.stages - plan.lane_stages
        lanes = compose(twiddle, first, plan.lane_stages, plan.increasing)
        found["lanes"] = lanes.reshape(plan.N // LANES, LANES, LANES)
    if plan.outer:
        outer = [_pairs(twiddle[number].astype(jnp.float32), plan) for number, _ in plan.outer]
        found["pairs"] = jnp.stack(outer)
    return found


def _pairs(factor, plan: Plan):
    """[tiles / 2, 2 B, 2 B] of a factor [n / 2, 2, 2, b, b]; rows are inputs.

    Where B / b blocks are in a tile, each is joined with that in its place in the other tile.
    """
    # Pairs of blocks are in the order of pairs of tiles, then of their place in them.
    each = plan.tile // plan.b
    factor = factor.reshape(-1, each, 2, 2, plan.b, plan.b)
    apart = jnp.eye(each).reshape(each, 1, each, 1)  # u l v k, no product of matrices
    factor = factor.transpose(0, 3, 1, 5, 2, 4)  # p j u l i k
    whole = factor[:, :, :, :, :, None] * apart[None, None, :, :, None]
    return whole.reshape(-1, 2 * plan.tile, 2 * plan.tile)
