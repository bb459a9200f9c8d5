"""Evaluation on held-out examples, the baseline beside it, and a sample."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient import data as data_lib
from efficient import model as model_lib
from efficient.data.text import bigram_bits_per_byte
from efficient.data.tokenizers import make_tokenizer
from efficient.decoding.sample import generate
from efficient.errors import UserError
from efficient.training import step as step_lib


class Evaluator:
    """Means of the objective's metrics over held-out examples, exact also for the last batch."""

    def __init__(self, run, phase):
        self.run, self.phase = run, phase
        self._step = step_lib.make_eval_step(phase, run.placement, run.dtype)

    def __call__(self, state: step_lib.State) -> dict[str, float]:
        """Metrics weighted by tokens or examples; `bits_per_byte` where tokens stand for bytes."""
        run, config = self.run, self.run.config
        size = config.batch_size
        limit = config.eval_batches * size or None
        index, count = run.placement.process_share(size)
        params = step_lib.eval_params(state)
        batches = data_lib.eval_batches(
            run.eval_source, size, limit, process_index=index, process_count=count
        )
        placed = (run.placement.place_batch(batch, size) for batch in batches)
        outputs = jax.device_get([self._step(params, state["state"], batch) for batch in placed])
        weights = np.array([o["weight"] for o in outputs], np.float64)
        total = max(weights.sum(), 1e-9)
        means = {
            name: float(np.dot([o[name] for o in outputs], weights) / total)
            for name in outputs[0]
            if name != "weight"
        }
        if "bytes_per_token" in run.eval_source.facts:
            bytes_per_token = run.eval_source.facts["bytes_per_token"]
            means["bits_per_byte"] = means["loss"] / math.log(2) / bytes_per_token
        return means


def bits_per_byte_baseline(run) -> float | None:
    """The bigram model's figure for the held-out files, where the data is bytes."""
    if run.eval_source.facts.get("tokenizer") != "bytes" or "segment_ids" in run.eval_source.spec:
        return None
    return bigram_bits_per_byte(run.train_source, run.eval_source)


def check_sample(config, model, facts) -> None:
    """Refuses, before anything is trained, a sample that cannot be drawn in the end."""
    length = config.sample["length"]
    if not hasattr(model, "step") or "tokenizer" not in facts:
        raise UserError(
            f"config.sample.length={length}, but only a decoder of text gives samples; set it to 0"
        )
    prompt = make_tokenizer(facts["tokenizer"]).encode(config.sample["prompt"] or "\n")
    if len(prompt) + length > model.max_length:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and config.sample.length={length} exceed"
            f" model.max_length={model.max_length}; sample fewer"
        )


def sample_text(run, phase, state: step_lib.State) -> str:
    """A sample that continues `config.sample.prompt`."""
    sample = run.config.sample
    tokenizer = make_tokenizer(run.eval_source.facts.get("tokenizer", "bytes"))
    prompt = tokenizer.encode(sample["prompt"] or "\n")
    arrays = step_lib.cast(step_lib.eval_params(state), run.dtype) | state["state"]
    new = jax.jit(
        lambda arrays, prompt, key: generate(
            model_lib.bind(phase.stacked, arrays),
            prompt,
            key,
            length=sample["length"],
            temperature=sample["temperature"],
        ),
        out_shardings=run.placement.replicated,
    )(arrays, jnp.asarray(prompt)[None], jax.random.key(run.config.seed))
    text = tokenizer.decode(np.concatenate([prompt, np.asarray(new[0])]))
    rule = "-" * 60
    return f"{rule}\n{text}\n{rule}"
