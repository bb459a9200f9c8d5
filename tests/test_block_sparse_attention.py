"""Block-sparse attention: the butterfly mixer against NumPy, its work, and its hosts."""

import jax
import jax.numpy as jnp
import mixer_numpy
import numpy as np
import pytest

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.mixers.block_sparse import butterfly_mask
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from models.vision import Vision
from pallas_kernels.attention import Causal, Full, attention, gpu, tpu
from pallas_kernels.attention.settings import Settings


def meet(i, j, factors, global_blocks):
    """Whether blocks i and j are joined: the same, one butterfly step apart, or one is global."""
    steps = [2**power for power in range(factors)]
    return i == j or (i ^ j) in steps or min(i, j) < global_blocks


@pytest.mark.parametrize("causal", [True, False])
def test_mixer_equals_numpy(causal):
    """22 tokens in blocks of 3: eight blocks, the last of one token."""
    arguments = {"block": 3, "factors": 2, "global_blocks": 1, "rope": 50.0}
    mixer = mixer_numpy.build(
        "block_sparse_attention", heads=4, kv_heads=2, causal=causal, **arguments
    )

    def seen(n, t, s):
        return meet(t // 3, s // 3, 2, 1) and (s <= t or not causal)

    def reference(x, values):
        return mixer_numpy.numpy_mixer(x, values, 4, 2, seen, theta=50.0)

    mixer_numpy.check_values_and_gradients(mixer, reference, mixer_numpy.inputs(22))


def test_a_longer_text_only_adds_pairs():
    t, s = np.ogrid[:96, :96]
    whole = butterfly_mask(96, 4, None, 1, True).element(0, t, s)
    for length in (1, 4, 30, 64, 95):
        part = butterfly_mask(length, 4, None, 1, True).element(0, t[:length], s[:, :length])
        np.testing.assert_array_equal(part, whole[:length, :length])


@pytest.mark.parametrize(("causal", "share"), [(False, 5 / 16), (True, 48 / 136)])
def test_work_is_that_of_the_live_blocks(causal, share):
    """16 blocks, each of which meets itself and log2(16) = 4 others."""
    q = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.float32)

    def flops(mask):
        def forward(q, k, v):
            return attention(q, k, v, mask=mask, implementation="blockwise")

        return count_flops(forward, q, q, q)

    sparse = flops(butterfly_mask(8192, 512, None, 0, causal))
    assert sparse == flops(Causal() if causal else Full()) * share > 0


@pytest.mark.parametrize("kernel", [tpu, gpu], ids=["tpu", "hopper"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1000, 8192])
def test_the_kernels_take_the_mask_of_the_default_block(length, causal, kernel):
    mixer = mixer_numpy.build(
        "block_sparse_attention", heads=2, causal=causal, global_blocks=1, factors=2
    )
    q = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    settings = Settings(mask=mixer.mask_for(length))
    assert kernel.unsupported(q, q, q, None, None, None, None, settings) is None


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_it_serves_in_a_vision_transformer(pooling):
    """Without the global block, a token in a far block does not reach another in one layer."""

    def change(global_blocks):
        rules = Rules(
            [
                {
                    "at": ".*/mixer", "use": "block_sparse_attention", "block": 4, "heads": 2,
                    "factors": 1, "global_blocks": global_blocks,
                }
            ]
        )  # fmt: skip
        stages = [{"width": 16, "depth": 1, "kernel": 2, "stride": 2}]
        model = Vision(
            Scope(rules), image_size=8, channels=1, num_classes=3, stages=stages, pooling=pooling
        )
        block = model.stages[0].blocks.blocks[0]
        rng = np.random.default_rng(0)
        shapes = model_lib.abstract(block)
        values = {
            p: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32) for p, s in shapes.items()
        }
        block = model_lib.bind(block, values)
        length = 16 + (pooling == "class_token")
        x = jnp.asarray(rng.normal(size=(1, length, 16)), jnp.float32)
        context = Context(grid=(4, 4))
        moved = block(x.at[0, 15].add(1.0), context)[0] - block(x, context)[0]
        return np.abs(np.asarray(moved[0])).max(1)

    alone, joined = change(0), change(1)
    assert (alone[:8] == 0).all() and (alone[8:16] > 1e-5).all()
    assert (joined[:4] > 1e-5).all() and (joined[4:8] == 0).all()


def test_what_the_mixer_refuses():
    with pytest.raises(UserError, match="block=0 must be at least 1"):
        mixer_numpy.build("block_sparse_attention", block=0)
    with pytest.raises(UserError, match="global_blocks=-1 must be at least 0"):
        mixer_numpy.build("block_sparse_attention", global_blocks=-1)
