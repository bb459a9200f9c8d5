"""The decoder: what a token may see, one-token decoding, stacks, and the time to compile them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from efficient import model as model_lib
from efficient.decoding.sample import generate
from efficient.errors import UserError
from efficient.objectives.likelihood import NextToken
from efficient.scope import Context, Rules, Scope
from models.decoder import Decoder

LENGTH, WIDTH = 12, 32


def attention(**arguments):
    return [{"at": r"blocks/\d+/mixer", "use": "attention", "heads": 4, **arguments}]


CASES = {
    "plain": attention(),
    "rope": attention(rope=100.0),
    "window": attention(window=3, rope=100.0),
    "learned": [{"at": "position", "use": "learned", "init_std": 1.0}, *attention()],
    "grouped": attention(kv_heads=2, rope=100.0),
    "softcap": attention(softcap=0.5),
    "normed": [{"at": r".*/[qk]_norm", "use": "rms_norm"}, *attention()],
    "gpt2": common.gpt2(WIDTH, 6, 4),
    "gemma": common.gemma(4, 1, 16, 64),
}

QUICK = {"window", "grouped", "gpt2"}  # `make test-slow` checks the others
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES]
)


def build(rules, depth=6, scan_from=6, **sizes):
    sizes = {"vocab_size": 16, "width": WIDTH, "depth": depth, "max_length": LENGTH, **sizes}
    model = Decoder(Scope(Rules(rules)), scan_from=scan_from, **sizes)
    return model_lib.stack_alike(model)


def draw(model, seed=0):
    """Every array at random and large enough that all of it shows."""
    rng = np.random.default_rng(seed)
    sizes = {p: 1.0 if "table" in p else 0.25 for p in model_lib.abstract(model)}
    return {
        p: jnp.asarray(sizes[p] * rng.normal(size=s.shape), s.dtype)
        for p, s in model_lib.abstract(model).items()
    }


def tokens(batch=2, length=LENGTH, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(16, size=(batch, length)), jnp.int32)


@pytest.mark.parametrize("scan_from", [6, 100])
@EVERY
def test_one_token_at_a_time_equals_all_at_once(case, scan_from):
    model = build(CASES[case], scan_from=scan_from)
    assert (len(model.blocks.spans) == 1) == (scan_from == 6)
    arrays, inputs = draw(model), tokens()

    @jax.jit
    def both(arrays, inputs):
        bound = model_lib.bind(model, arrays)
        whole = bound({"tokens": inputs}, Context())

        def feed(state, token):
            logits, state = bound.step(token[:, None], state, Context())
            return state, logits

        _, single = jax.lax.scan(feed, bound.init_state(2, LENGTH), inputs.T)
        return whole, single.swapaxes(0, 1)

    whole, single = both(arrays, inputs)
    assert whole.shape == (2, LENGTH, 16) and float(whole.std()) > 0.1
    np.testing.assert_allclose(single, whole, rtol=2e-4, atol=2e-4 * float(jnp.abs(whole).max()))


@EVERY
def test_no_token_sees_the_future_or_another_document(case):
    model = build(CASES[case], depth=2)
    bound = model_lib.bind(model, draw(model))
    inputs = tokens(1)
    segments = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
    width = bound.embed.table.shape[1]

    mix = jax.random.normal(jax.random.key(7), (16,))  # one number of all logits of a token

    def outputs(shift, segment_ids):
        """[T] with `shift` [T, D] added to the embeddings."""
        context = Context(segment_ids=segment_ids)
        x = bound.position(bound.embed(inputs, context), context) + shift[None]
        return bound.logits(bound.blocks(x, context)[0], context)[0] @ mix

    jacobian = jax.jit(jax.jacrev(outputs))

    def influence(segment_ids):
        """[T, S]: how much the logits at T depend on the embedding at S."""
        found = jacobian(jnp.zeros((LENGTH, width)), segment_ids)
        return np.abs(np.asarray(found)).max(axis=-1)

    earlier = np.tri(LENGTH, dtype=bool)
    reach = 2 * (3 - 1) if case == "window" else LENGTH  # of two blocks with a window of 3
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    seen = influence(None) > 0
    np.testing.assert_array_equal(seen, earlier & (distance <= reach))
    same = np.equal.outer(np.asarray(segments[0]), np.asarray(segments[0]))
    seen = influence(segments) > 0
    np.testing.assert_array_equal(seen, earlier & same & (distance <= reach))


def test_a_packed_document_gives_the_logits_it_has_alone():
    model = build(CASES["gpt2"], depth=2)
    bound = model_lib.bind(model, draw(model))
    inputs = tokens(1)
    places = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]], jnp.int32)
    segments = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
    batch = {"tokens": inputs, "positions": places, "segment_ids": segments}
    packed = bound(batch, Context())
    np.testing.assert_allclose(
        packed[:, :5], bound({"tokens": inputs[:, :5]}, Context()), 2e-4, 1e-4
    )
    np.testing.assert_allclose(
        packed[:, 5:], bound({"tokens": inputs[:, 5:]}, Context()), 2e-4, 1e-4
    )
    mixed = bound({"tokens": inputs}, Context())
    assert np.abs(mixed[:, 5:] - packed[:, 5:]).max() > 0.1


@pytest.mark.slow
def test_a_sample_of_temperature_zero_is_the_likeliest_continuation():
    model = build(CASES["grouped"], depth=2)
    bound = model_lib.bind(model, draw(model))
    prompt = tokens(2, 4)
    found = generate(bound, prompt, jax.random.key(0), length=6, temperature=0.0)
    text = jnp.pad(prompt, ((0, 0), (0, 6)))  # what is after a token does not reach it
    whole = jax.jit(lambda text: bound({"tokens": text}, Context()))
    for i in range(4, 10):
        text = text.at[:, i].set(whole(text)[:, i - 1].argmax(-1))
    np.testing.assert_array_equal(found, text[:, 4:])
    with pytest.raises(UserError, match=r"exceed model\.max_length=12"):
        generate(bound, prompt, jax.random.key(0), length=9)


@pytest.mark.slow
def test_samples_follow_the_model():
    model = build(CASES["plain"], depth=1)
    bound = model_lib.bind(model, draw(model))
    prompt = jnp.tile(tokens(1, 3), (4000, 1))
    found = generate(bound, prompt, jax.random.key(0), length=1, temperature=2.0)
    expected = jax.nn.softmax(bound({"tokens": prompt[:1]}, Context())[0, -1] / 2.0)
    counts = np.bincount(np.asarray(found[:, 0]), minlength=16) / 4000
    # four standard deviations of a binomial proportion
    deviation = 4 * np.sqrt(np.asarray(expected) / 4000) + 1e-3
    assert (np.abs(counts - np.asarray(expected)) < deviation).all()
    assert counts.max() < 0.999


def test_the_softcap_bounds_logits():
    model = build(CASES["plain"], depth=1, logit_softcap=0.1)
    arrays, inputs = draw(model), {"tokens": tokens()}
    capped = model_lib.bind(model, arrays)(inputs, Context())
    free = model_lib.bind(build(CASES["plain"], depth=1), arrays)(inputs, Context())
    assert np.abs(capped).max() <= np.float32(0.1) < np.abs(free).max()
    np.testing.assert_allclose(capped, 0.1 * np.tanh(np.asarray(free) / 0.1), rtol=1e-5, atol=1e-6)


def compile_seconds(depth: int) -> float:
    """To trace and compile the gradient of a stack of alike layers."""
    model = build(common.gpt2(WIDTH, 6, 4), depth=depth, scan_from=2)
    shapes = model_lib.abstract(model)
    batch = {"tokens": tokens(), "targets": tokens()}

    def loss(arrays, batch):
        return NextToken()(model_lib.bind(model, arrays), batch, Context())[0]

    began = time.process_time()
    jax.jit(jax.grad(loss)).lower(shapes, batch).compile()
    return time.process_time() - began


@pytest.mark.slow
def test_the_time_to_compile_does_not_grow_with_depth():
    compile_seconds(3)  # warms up
    best = {depth: min(compile_seconds(depth) for _ in range(2)) for depth in (4, 64)}
    assert best[64] < 1.5 * best[4], best
