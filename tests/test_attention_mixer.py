"""Which implementation of attention the mixer runs, in a decoder and in a vision transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.parallel import sequence
from efficient.scope import Context, Rules, Scope
from models.decoder import Decoder
from models.vision import Vision

KINDS = ("decoder", "vision")
LENGTH = 20


def build(kind, kernel):
    rules = [{"at": ".*/mixer", "use": "attention", "heads": 4, "kv_heads": 2, "kernel": kernel}]
    scope = Scope(Rules(rules))
    if kind == "decoder":
        return Decoder(scope, vocab_size=11, width=16, depth=2, max_length=LENGTH)
    stages = [{"width": 16, "depth": 2, "kernel": 2, "stride": 2}]
    return Vision(scope, image_size=8, channels=1, num_classes=3, stages=stages)


def batch_of(kind):
    rng = np.random.default_rng(1)
    if kind == "decoder":
        return {"tokens": jnp.asarray(rng.integers(11, size=(2, LENGTH)), jnp.int32)}
    return {"image": jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)}


def run(kind, kernel):
    """Logits, and the gradient of a function of them in every array."""
    model, batch = build(kind, kernel), batch_of(kind)
    rng = np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(0.3 * rng.normal(size=shape.shape), jnp.float32)
        for path, shape in sorted(model_lib.abstract(model).items())
    }

    def loss(arrays):
        logits = model_lib.bind(model, arrays)(batch, Context())
        return jnp.sin(logits).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return {"logits": logits, **gradients}


@pytest.mark.parametrize("kernel", [None, "blockwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_that_a_rule_names_runs_and_changes_no_result(kind, kernel, monkeypatch):
    asked = []
    attention = sequence.attention

    def record(*arrays, **options):
        asked.append(options["implementation"])
        return attention(*arrays, **options)

    monkeypatch.setattr(sequence, "attention", record)
    found, expected = run(kind, kernel), run(kind, "reference")
    assert asked == [kernel] * 2 + ["reference"] * 2
    for path, right in expected.items():
        assert jnp.abs(right).max() > 1e-3, path
        np.testing.assert_allclose(
            found[path], right, atol=2e-6 * float(jnp.abs(right).max()) + 2e-6, err_msg=path
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_that_there_is_not_is_refused(kind):
    with pytest.raises(UserError, match="kernel='blockwse'.*did you mean 'blockwise'") as error:
        build(kind, "blockwse")
    assert "\n" not in str(error.value)
