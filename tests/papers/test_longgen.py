"""LongGen: its sparse layers against NumPy, which layers are full, cache and work by count."""

import functools
import math

import jax
import jax.numpy as jnp
import mixer_numpy
import numpy as np
import pytest

from configs import llama_7b, longgen
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.mixers.attention import Attention
from efficient.mixers.longgen import LongGen
from efficient.planning.flops import count_flops
from efficient.training import experiment
from pallas_kernels.attention import Causal, attention

PATTERNS = {"sinks": {"window": 5, "sinks": 3}, "stride": {"window": 5, "stride": 3, "block": 2}}


def rule(t, s, *, window, sinks=0, stride=None, block=1):
    """Whether query t of a sparse layer sees key s."""
    kept = s < sinks if stride is None else s // block % stride == 0
    return s <= t and (t - s < window or kept)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_mixer_equals_numpy(pattern):
    arguments = PATTERNS[pattern]
    mixer = mixer_numpy.build("longgen", heads=4, kv_heads=2, rope=50.0, **arguments)

    def reference(x, values):
        seen = lambda n, t, s: rule(t, s, **arguments)  # noqa: E731
        return mixer_numpy.numpy_mixer(x, values, 4, 2, seen, theta=50.0)

    mixer_numpy.check_values_and_gradients(mixer, reference, mixer_numpy.inputs(23))


def test_decoding_with_sinks_equals_the_parallel_form():
    """The ring turns over four times; the row of the contract tests has the strided blocks."""
    mixer = mixer_numpy.build("longgen", heads=2, rope=50.0, **PATTERNS["sinks"])
    values, x = mixer_numpy.draw(mixer), mixer_numpy.inputs(23, batch=2)
    bound = model_lib.bind(mixer, jax.tree.map(jnp.float32, values))

    @jax.jit
    def decode(x):
        def step(state, token):
            y, state = bound.step(token[:, None], state, mixer_numpy.Context())
            return state, y[:, 0]

        state = bound.init_state(2, 23, jnp.float32)
        assert state[0].shape[1] == 8
        return jax.lax.scan(step, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    expected = mixer_numpy.run(mixer, values, x)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(decode(jnp.float32(x)), expected, atol=1e-5 * scale)


@pytest.mark.parametrize(("depth", "full"), [(3, [1]), (6, [2, 3]), (32, range(10, 21))])
def test_the_middle_third_is_full(depth, full):
    assert list(longgen.full_layers(depth)) == list(full)
    config = longgen.get_config()
    config.model.depth = depth
    config.rules = [longgen.hybrid(depth, "stride", 6), *config.rules[1:]]
    model, _ = experiment.build_model(config, {"vocab_size": 256})
    kinds = [type(block.mixer) for block in model.blocks.blocks]
    assert kinds == [Attention if i in full else LongGen for i in range(depth)]
    assert abs(sum(kind is Attention for kind in kinds) / depth - 1 / 3) < 0.02


def cache_bytes(config, length):
    """Of keys and values for one text, as the model allocates them."""
    model, _ = experiment.build_model(config, {})
    model = model_lib.stack_alike(model)
    state = jax.eval_shape(functools.partial(model.init_state, 1, length, jnp.bfloat16))
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
    return sum(math.prod(leaf.shape) * 2 for leaf in leaves)


def test_cache_follows_the_formula():
    """Llama-2 7B, 32 layers of 32 heads of 128, at 128K tokens; 64 GiB with full attention."""
    length = 131_072
    config = llama_7b.get_config()
    full = cache_bytes(config, length)
    assert full == 64 * 2**30
    sizes = {"window": 2048, "stride": 32, "block": 64}
    layers = "|".join(str(i) for i in range(32) if i not in longgen.full_layers(32))
    rule = {"at": rf"blocks/({layers})/mixer", "use": "longgen", "heads": 32, "rope": 10_000.0}
    config.rules = [rule | sizes, *config.rules]
    saved = 1 - cache_bytes(config, length) / full
    kept = 1 / 32 + 2048 / length
    assert saved == pytest.approx(21 / 32 * (1 - kept), rel=1e-9)
    assert saved == pytest.approx(0.6255, abs=1e-4)


def test_work_is_that_of_the_live_blocks():
    length, block, size = 8192, 512, 64
    arguments = {"window": 2 * block, "stride": 4, "block": block}
    mask = mixer_numpy.build("longgen", heads=1, width=size, **arguments).mask
    q = jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)

    def flops(mask):
        def forward(q, k, v):
            return attention(q, k, v, mask=mask, implementation="blockwise")

        return count_flops(forward, q, q, q)

    # Blocks, whole or in part: a query at a block's start sees the far end of its window there.
    count = length // block
    live = sum(
        any(rule(t, s, **arguments) for t in (i * block, (i + 1) * block - 1)
            for s in (j * block, (j + 1) * block - 1))
        for i in range(count)
        for j in range(count)
    )  # fmt: skip
    assert flops(mask) == live * 4 * block**2 * size
    assert flops(mask) / flops(Causal()) == live / 136 < 0.55


@pytest.mark.parametrize(("pattern", "tokens"), [("stride", 1664), ("sinks", 1344)])
def test_cache_of_the_config(pattern, tokens):
    """Over six layers, of which full attention would hold 512 tokens each."""
    config = longgen.get_config(f"pattern={pattern}")
    model, _ = experiment.build_model(config, {"vocab_size": 256})
    state = jax.eval_shape(lambda: model.init_state(1, 512, jnp.float32))[1]
    assert sum(keys.shape[1] for keys, *_ in state) == tokens


def test_the_hybrid_takes_the_parameters_of_its_base():
    shapes = []
    for part in longgen.PARTS:
        config = longgen.get_config(f"part={part}")
        model, _ = experiment.build_model(config, {"vocab_size": 256})
        shapes.append(model_lib.abstract(model))
    assert shapes[0] == shapes[1] == shapes[2]
    base, hybrid = (longgen.get_config(f"part={part}") for part in ("base", "hybrid"))
    assert hybrid.data.length == 4 * base.data.length == 512
    assert (base.init_from, hybrid.init_from) == ("", "runs/longgen_base")


def test_what_is_refused():
    for arguments in ({}, {"sinks": 1, "stride": 2}):
        with pytest.raises(UserError, match="give sinks or stride, one of them"):
            mixer_numpy.build("longgen", window=4, **arguments)
    with pytest.raises(UserError, match="window=0 must be at least 1"):
        mixer_numpy.build("longgen", window=0, sinks=2)
    with pytest.raises(UserError, match="part='hybird'; did you mean 'hybrid'"):
        longgen.get_config("part=hybird")
