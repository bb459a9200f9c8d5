"""`races.no_races` sees a race in any kernel, and whether races were looked for at all."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from races import no_races


def copied(early: bool, **how):
    """x through memory on chip, which is read before the copy has ended if `early`."""

    def kernel(x, y, held, copied):
        copy = pltpu.make_async_copy(x, held, copied)
        copy.start()
        if not early:
            copy.wait()
        y[...] = held[...]
        if early:
            copy.wait()

    x = jnp.ones((8, 128))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(**how),
    )(x)


@pytest.mark.parametrize("early", [(True, False), (False, True)])
def test_a_race_in_any_kernel_is_seen(early):
    with pytest.raises(AssertionError), no_races():
        for each in early:
            copied(each, detect_races=True)


def test_kernels_without_a_race_pass():
    with no_races():
        copied(False, detect_races=True)
        copied(False, detect_races=True)


def test_no_kernel_and_no_detection_are_seen():
    with pytest.raises(AssertionError), no_races():
        pass
    with pytest.raises(AssertionError), no_races():
        copied(False)
