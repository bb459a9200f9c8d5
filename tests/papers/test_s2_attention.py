"""S2-Attention: the mixer against NumPy, its union over heads, its work and its cache."""

import functools

import jax
import jax.numpy as jnp
import mixer_numpy
import numpy as np
import pytest

from configs import s2_attention
from efficient.errors import UserError
from efficient.mixers.attention import Attention
from efficient.mixers.s2_attention import S2Attention
from efficient.planning.flops import count_flops
from efficient.training import experiment
from pallas_kernels.attention import Causal, attention, gpu, patterns, tpu
from pallas_kernels.attention.settings import Settings


def rule(shard, t, s, *, stride, block, local=1):
    """Whether query t of shard number `shard` sees key s, as the paper has it."""
    near = t // block - s // block < local
    return s <= t and (near or (s // block + shard) % stride == 0)


def seen_by(mixer, length):
    """bool[N, T, S] of a mixer's mask."""
    n, t, s = np.ogrid[: mixer.heads, :length, :length]
    return np.broadcast_to(mixer.mask.element(n, t, s), (mixer.heads, length, length))


def test_mixer_equals_numpy():
    """Four query heads in two shards, a length that is no multiple of the block."""
    sizes = {"stride": 3, "block": 3}
    mixer = mixer_numpy.build("s2_attention", heads=4, kv_heads=2, rope=50.0, **sizes)

    def reference(x, values):
        seen = lambda n, t, s: rule(n // 2, t, s, **sizes)  # noqa: E731
        return mixer_numpy.numpy_mixer(x, values, 4, 2, seen, theta=50.0)

    mixer_numpy.check_values_and_gradients(mixer, reference, mixer_numpy.inputs(25))


def test_union_over_heads_is_the_whole_context():
    mixer = mixer_numpy.build("s2_attention", heads=6, width=24, stride=6, block=8)
    seen = seen_by(mixer, 128)
    causal = np.tri(128, dtype=bool)
    np.testing.assert_array_equal(seen.any(0), causal)
    shares = seen.sum((1, 2)) / causal.sum()
    assert shares.max() < 0.28 and abs(shares.mean() - 0.2248) < 1e-4
    # One head fewer than the stride, and a shard of the context is seen by nobody.
    fewer = mixer_numpy.build("s2_attention", heads=5, width=20, stride=6, block=8)
    lost = causal & ~seen_by(fewer, 128).any(0)
    assert set(np.unique(np.nonzero(lost)[1] // 8 % 6)) == {1}


@pytest.mark.parametrize("backward", [False, True])
def test_work_is_that_of_the_live_blocks(backward):
    """FLOPs of the program, traced, beside a count of the blocks that the rule leaves."""
    length, block, heads, size = 8192, 512, 4, 64
    sizes = {"stride": 4, "block": block, "local": 2}
    mixer = mixer_numpy.build(
        "s2_attention", heads=heads, width=size * heads, stride=4, block=block, local_blocks=2
    )
    q = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)

    def flops(mask):
        def forward(q, k, v):
            return attention(q, k, v, mask=mask, implementation="blockwise").sum()

        if not backward:
            return count_flops(forward, q, q, q)
        row_sums = 2 * length * heads * size  # of dout * out, once, whatever the mask
        return count_flops(jax.grad(forward, (0, 1, 2)), q, q, q) - row_sums

    count = length // block
    live = [
        sum(
            rule(n, i * block + block - 1, j * block, **sizes)
            for i in range(count)
            for j in range(count)
        )
        for n in range(heads)
    ]
    products = 2 + 5 * backward  # scores and outputs; scores again, dv, dp, dq, dk
    assert flops(mixer.mask) == sum(live) * products * 2 * block**2 * size
    share = sum(live) / (heads * count * (count + 1) / 2)
    assert flops(mixer.mask) / flops(Causal()) == pytest.approx(share)
    assert share == pytest.approx(0.421, abs=1e-3)


@pytest.mark.parametrize("kernel", [tpu, gpu], ids=["tpu", "hopper"])
@pytest.mark.parametrize("length", [1000, 2048, 16384])
def test_the_kernels_take_the_mask(length, kernel):
    """Of the mixer and of the pattern as they are by default, and in blocks of any size."""
    mixer = mixer_numpy.build("s2_attention", heads=16, width=64, stride=8)
    masks = [mixer.mask]
    for heads, stride in ((16, 8), (16, 16), (8, 4), (4, 4)):
        masks.append(patterns.s2_attention(heads, stride=stride))
        for block in (16, 48, 64):
            masks.append(patterns.s2_attention(heads, stride=stride, block=block, dense_heads=1))
    for mask in masks:
        q = jax.ShapeDtypeStruct((1, length, len(mask.masks), 64), jnp.bfloat16)
        assert kernel.unsupported(q, q, q, None, None, None, None, Settings(mask=mask)) is None


def test_cache_holds_what_the_head_will_see():
    length, block, stride = 8192, 64, 16
    mixer = mixer_numpy.build(
        "s2_attention", heads=16, width=64, stride=stride, block=block, local_blocks=1
    )
    keys, values, _, _ = jax.eval_shape(
        functools.partial(mixer.init_state, 2, length, jnp.bfloat16)
    )
    # Head 0 ends outside its shard: what its last query sees, 8 blocks and its own, is all there.
    last = sum(rule(0, length - 1, s, stride=stride, block=block) for s in range(length))
    assert last == 9 * block == 576
    assert keys.shape == values.shape == (2, last, 16, 4)
    assert mixer.cache_slots(length)[0] == last
    for n, slots in enumerate(mixer.cache_slots(1000)):
        most = max(
            sum(rule(n, t, s, stride=stride, block=block) for s in range(1000))
            for t in range(1000 - 2 * block, 1000)
        )
        assert most <= slots <= most + block


def test_stride_1_and_dense_heads_are_full_attention():
    whole = np.tri(40, dtype=bool)
    one = mixer_numpy.build("s2_attention", heads=2, stride=1, block=4)
    assert (seen_by(one, 40) == whole).all()
    some = mixer_numpy.build("s2_attention", heads=4, stride=3, block=4, dense_heads=1)
    assert (seen_by(some, 40)[3] == whole).all()
    assert (seen_by(some, 40)[:3].sum((1, 2)) < whole.sum()).all()
    assert some.cache_slots(40) == (20, 16, 16, 40)


def test_config_puts_it_into_all_layers_but_the_dense_ones():
    config = s2_attention.get_config("dense_layers=1")
    model, _ = experiment.build_model(config, {"vocab_size": 256})
    mixers = [block.mixer for block in model.blocks.blocks]
    assert [type(mixer) for mixer in mixers] == [Attention, *[S2Attention] * 3]
    np.testing.assert_array_equal(seen_by(mixers[1], 128).any(0), np.tri(128, dtype=bool))


def test_what_the_mixer_refuses():
    with pytest.raises(UserError, match="stride=0 must be at least 1"):
        mixer_numpy.build("s2_attention", stride=0)
    with pytest.raises(UserError, match="dense_heads=3 exceeds the 2 kv heads"):
        mixer_numpy.build("s2_attention", heads=4, kv_heads=2, stride=2, dense_heads=3)
    with pytest.raises(UserError, match="'s2_attention' is"):
        mixer_numpy.build("s2_attention", stride=2, causal=False)
