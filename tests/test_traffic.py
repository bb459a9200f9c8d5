"""Bytes counted from the grids of TPU kernels, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import Causal, attention
from pallas_kernels.lab import traffic


def _copy(x_ref, o_ref):
    o_ref[...] = x_ref[...]


def test_a_window_is_copied_when_its_index_changes():
    """A 3 x 4 grid over [300, 512]: the input by rows, the output by both, edges cut off."""

    def call(x):
        return pl.pallas_call(
            _copy,
            grid=(3, 4),
            in_specs=[pl.BlockSpec((128, 128), lambda i, j: (i, 0))],
            out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((300, 512), jnp.bfloat16),
            name="rows",
        )(x)

    (found,) = traffic(jax.jit(call), jax.ShapeDtypeStruct((300, 512), jnp.bfloat16))
    assert (found.kernel, found.steps) == ("rows", 12)
    assert found.read == 300 * 128 * 2
    assert found.written == 300 * 512 * 2


def test_index_maps_that_read_scalars():
    """Pages picked by a table: the same page twice in a row is fetched once."""

    def kernel(table, x_ref, o_ref):
        _copy(x_ref, o_ref)

    def call(table, x):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(5,),
                in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i // 1], 0))],
                out_specs=pl.BlockSpec((8, 128), lambda i, table: (i, 0)),
            ),
            out_shape=jax.ShapeDtypeStruct((40, 128), jnp.float32),
            name="pages",
        )(table + 1, x)

    x = jax.ShapeDtypeStruct((80, 128), jnp.float32)
    (found,) = traffic(call, np.array([3, 3, 0, 3, 3], np.int32), x)
    assert found.read == 3 * 8 * 128 * 4
    assert found.written == 5 * 8 * 128 * 4
    with pytest.raises(ValueError, match="pages: an index map reads prefetched scalars"):
        traffic(call, jax.ShapeDtypeStruct((5,), jnp.int32), x)


def test_attention_reads_the_keys_that_its_schedule_names():
    """Causal, 2 heads of 128, T 4096 in tiles of 512 x 2048: queries once, keys by the schedule."""
    q = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
    (found,) = traffic(lambda q, k, v: attention(q, k, v, mask=Causal()), q, q, q)
    # Tiles 0 to 3 see the first block of keys, 4 to 7 both: 12 steps. Of these a step whose block
    # is that of the step before copies none: tiles 0 to 3 share it with the first of tile 4.
    assert found.steps == 2 * 12
    keys = 2 * (2048 * 128 * 2) * 2 * (1 + 1 + 3 * 2)
    assert found.read == 4096 * 2 * 128 * 2 + keys
    assert found.written == 4096 * 2 * 128 * 2 + 4096 * 2 * 4
