"""Products of neighbouring factors as one block-diagonal matrix.

Factors of strides s, 2 s ... R s / 2 join a feature only with R - 1 others, at multiples of s. So
their product is block-diagonal, [R b, R b] blocks, up to a stride permutation: for the matrix unit
one product in place of log2(R), with R / (2 log2(R)) times their operations.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.butterfly_matmul.reference import strides


def groups(stages: int, b: int, width: int, increasing: bool) -> list[tuple[int, int]]:
    """(first stage, count) of runs whose product has blocks of at most `width`, one stage at least.

    They are the same strides in either order: counted from the smallest.
    """
    most = max(1, (width // b).bit_length() - 1)
    found = [(first, min(most, stages - first)) for first in range(0, stages, most)]
    if increasing:
        return found
    return [(stages - first - count, count) for first, count in reversed(found)]


def compose(twiddle: jax.Array, first: int, count: int, increasing: bool) -> jax.Array:
    """[D, S, R b, R b] of these stages, R = 2^count; rows are inputs.

    Feature ((d R + r) S + s) b + l is row, and column, r b + l of block (d, s). In float32 or
    wider.
    """
    stages, pairs, b = twiddle.shape[0], twiddle.shape[1], twiddle.shape[-1]
    wide = jnp.promote_types(twiddle.dtype, jnp.float32)
    all_strides = strides(stages, increasing)
    S, R = min(all_strides[first : first + count]), 2**count
    D = 2 * pairs // (R * S)
    if count == 1:
        factor = twiddle[first].astype(wide).reshape(D, S, 2, 2, b, b)
        return factor.transpose(0, 1, 3, 5, 2, 4).reshape(D, S, 2 * b, 2 * b)
    found = jnp.broadcast_to(jnp.eye(R * b, dtype=wide), (D, S, R * b, R * b))
    for stage in range(first, first + count):
        low = all_strides[stage] // S
        high = R // (2 * low)
        factor = twiddle[stage].astype(wide).reshape(D, high, low, S, 2, 2, b, b)
        # dszhjwl,dhwsijkl->dszhiwk, by sums, not products of matrices: exact in float32 everywhere.
        found = found.reshape(D, S, R * b, high, 1, 2, low, 1, b)
        factor = factor.transpose(0, 3, 1, 4, 5, 2, 6, 7)[:, :, None]  # d s z h i j w k l
        found = jnp.sum(found * factor, axis=(5, 8))
    return found.reshape(D, S, R * b, R * b)
