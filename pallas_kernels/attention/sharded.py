"""Attention on a mesh: each device works on its sequences and heads.

`shard_map` and not `custom_partitioning`: the TPU compiler knows the latter's custom call on no
machine without a TPU, and Mosaic kernels want the former. The layout has to be known when the
program is traced: it is read off q on a mesh of Explicit axes, and is an argument otherwise.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.masks import Heads
from pallas_kernels.mesh import layout, place, shard_map, size


def over_mesh(compute, arrays, settings, sharding):
    """compute(*arrays, settings) -> (out, lse), in shard_map where the layout of q is known."""
    q, k, v, bias, alibi, segment_ids, seeds = arrays
    found = layout("attention", q, sharding)
    if found is None:
        return compute(*arrays, settings)
    mesh, b, n, explicit = found
    heads = size(mesh, n)
    if q.shape[0] % size(mesh, b) or q.shape[2] % heads:
        raise ValueError(
            f"attention: sharding must divide q's batch {q.shape[0]} and heads {q.shape[2]}; "
            f"mesh axes {b} have size {size(mesh, b)}, {n} {heads}"
        )
    # As many key heads as there are shards of them, and a multiple of what there are.
    copies = heads // math.gcd(k.shape[2], heads)
    if copies > 1:
        k, v = (place(x, mesh, P(b, None, None, None), explicit) for x in (k, v))
        k, v = (jnp.repeat(x, copies, 2) for x in (k, v))

    whole = P(b, None, n, None)
    specs = [whole, whole, whole, None, None, None, None]
    if bias is not None:
        specs[3] = P(b if bias.shape[0] > 1 else None, n if bias.shape[1] > 1 else None, None, None)
    specs[4] = None if alibi is None else P(n)
    specs[5] = None if segment_ids is None else (P(b, None), P(b, None))
    specs[6] = None if seeds is None else P(b, n, None)
    arrays = q, k, v, bias, alibi, segment_ids, seeds
    arrays = jax.tree.map(lambda x, spec: place(x, mesh, spec, explicit), arrays, tuple(specs))
    shares = _masks_by_shard(settings.mask, q.shape[2], heads)

    def local(*arrays):
        branches = [_with_mask(compute, settings, mask) for mask in dict.fromkeys(shares)]
        if len(branches) == 1:
            return branches[0](*arrays)
        order = list(dict.fromkeys(shares))
        which = jnp.array([order.index(mask) for mask in shares])[jax.lax.axis_index(n)]
        return jax.lax.switch(which, branches, *arrays)

    return shard_map(local, mesh, tuple(specs), (whole, P(b, n, None)))(*arrays)


def _masks_by_shard(mask, heads, shards):
    """The mask of the heads of each shard; a mask that names no heads is everyone's."""
    if not mask.names_heads():
        return [mask] * shards
    each = heads // shards
    return [Heads([mask.head(r * each + i) for i in range(each)]) for r in range(shards)]


def _with_mask(compute, settings, mask):
    return lambda *arrays: compute(*arrays, settings._replace(mask=mask))
