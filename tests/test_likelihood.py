"""A class read off a language model at the last token of an example."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from efficient import model as model_lib
from efficient.objectives.likelihood import Classification
from efficient.scope import Context, Rules, Scope
from models.decoder import Decoder

T, V = 8, 12


def test_the_class_is_read_at_the_last_token_that_is_not_padding():
    scope = Scope(Rules(common.gpt2(16, 1, 2)))
    model = Decoder(scope, vocab_size=V, width=16, depth=1, max_length=T)
    arrays = model_lib.init(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths = np.array([3, 8, 1])
    segments = (np.arange(T) < lengths[:, None]).astype(np.int32)
    batch = {
        "tokens": rng.integers(V, size=(3, T)).astype(np.int32),
        "segment_ids": segments,
        "label": np.array([0, 5, 11], np.int32),
    }

    def run(batch):
        with jax.default_matmul_precision("highest"):
            bound = model_lib.bind(model, arrays)
            return Classification()(bound, batch, Context())[1], bound(batch, Context())

    def at(logits, positions):
        rows = np.asarray(logits, np.float64)[np.arange(3), positions]
        return (np.log(np.exp(rows).sum(-1)) - rows[np.arange(3), batch["label"]]).mean()

    metrics, logits = run(batch)
    np.testing.assert_allclose(metrics["loss"], at(logits, lengths - 1), rtol=1e-5)
    assert metrics["weight"] == 3
    whole, logits = run({name: a for name, a in batch.items() if name != "segment_ids"})
    np.testing.assert_allclose(whole["loss"], at(logits, T - 1), rtol=1e-5)
    assert abs(float(whole["loss"] - metrics["loss"])) > 1e-3
    spoilt = jnp.where(segments > 0, batch["tokens"], (batch["tokens"] + 1) % V)
    np.testing.assert_array_equal(run(batch | {"tokens": spoilt})[0]["loss"], metrics["loss"])
