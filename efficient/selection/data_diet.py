"""Deep Learning on a Data Diet: Finding Important Examples Early in Training.

Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075. Early in training, each example (x, y) is scored
by one of

    EL2N(x, y)  = E ||softmax(f(x)) - onehot(y)||_2
    GraNd(x, y) = E ||d CE(f(x), y) / d parameters||_2

where the expectation is over initializations, each trained alike for a few epochs, and training
goes on with the examples of the highest scores. Models are scored as in evaluation.

Within a run, the phase that ends is the early training and its model the first initialization.
With `inits` above 1 the others are drawn and trained here, with that phase's objective, optimizer,
steps and batch size, one after another; the paper averages 10.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.objectives.likelihood import class_logits, cross_entropy
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context

PAPER = Paper(
    slug="data_diet",
    status="equations",
    claims=(
        Claim(
            "EL2N and GraNd find label noise: mislabelled examples score highest.",
            "tests/papers/test_data_diet.py::test_noisy_labels_score_highest",
            True,
            "digits with a tenth of the labels replaced",
        ),
        Claim(
            "Averaging over initializations makes scores repeatable.",
            "tests/papers/test_data_diet.py::test_averaging_makes_scores_repeatable",
            True,
            "rank correlation of scores from disjoint sets of initializations",
        ),
        Claim(
            "Half of CIFAR-10 can be pruned without loss of accuracy, and better than at random.",
            note="needs CIFAR-10 and ten ResNet-18 trained 200 epochs for each point",
        ),
    ),
    source="https://github.com/mansheej/data_diet data_diet/scores.py, data_diet/data.py",
)

# Per-example gradients held at once.
_GRADIENTS = 8


def el2n(logits: Float[Array, "B V"], label: Array) -> Float[Array, " B"]:
    """||softmax(logits) - onehot(label)||_2 of each example, float32."""
    error = jax.nn.softmax(logits.astype(jnp.float32)) - jax.nn.one_hot(label, logits.shape[-1])
    return jnp.sqrt(jnp.sum(error**2, axis=-1))


def grand(loss, params: Any, examples: Any) -> Float[Array, " B"]:
    """||d loss(params, example) / d params||_2 for each example of a tree of [B, ...]."""

    def norm(example):
        grads = jax.grad(loss)(params, example)
        return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))

    return jax.lax.map(norm, examples, batch_size=_GRADIENTS)


def window(scores: Float[np.ndarray, " n"], keep: float, offset: float | None = None) -> np.ndarray:
    """Indices, in order, of round(keep * n) examples after the round(offset * n) of lowest score.

    None keeps those of the highest scores. Ties fall as the examples are ordered.
    """
    count = len(scores)
    size = max(1, round(keep * count))
    first = count - size if offset is None else min(round(offset * count), count - size)
    return np.sort(np.argsort(scores, kind="stable")[first : first + size])


@register("selection", "data_diet")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDiet:
    """Keeps the training examples of the highest early scores.

    Args:
      keep: fraction of the examples to keep.
      score: `el2n`; `grand`, which takes a gradient for each example; or `random`, the baseline.
      offset: fraction of the lowest-scored examples to leave out before those kept; default
        1 - keep. Less leaves out the highest scores too, which may be label noise.
      inits: initializations to average over.
      rewind: whether the phase restarts from the initial values, as in the paper.
    """

    keep: float = 0.5
    score: Literal["el2n", "grand", "random"] = "el2n"
    offset: float | None = None
    inits: int = 1
    rewind: bool = True

    def __post_init__(self):
        if not 0.0 < self.keep <= 1.0:
            raise UserError(f"data_diet: keep must be 0 < keep <= 1, got {self.keep}")
        if self.offset is not None and not 0.0 <= self.offset <= 1.0 - self.keep + 1e-9:
            raise UserError(
                f"data_diet: offset must be 0 to 1 - keep = {1 - self.keep:g}, got {self.offset}"
            )
        if self.inits < 1:
            raise UserError(f"data_diet: inits must be at least 1, got {self.inits}")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the scores read of an example."""
        return () if self.score == "random" else ("label",)

    def __call__(self, scoring) -> np.ndarray:
        """Indices of the kept examples, in order; `scoring` is what the loop gives."""
        return window(self.scores(scoring), self.keep, self.offset)

    def scores(self, scoring) -> Float[np.ndarray, " n"]:
        """The score of each training example, float64."""
        if self.score == "random":
            return np.asarray(jax.random.uniform(scoring.key, (len(scoring.source),)), np.float64)
        function = jax.jit(functools.partial(_batch_scores, scoring, self.score))
        train = member_trainer(scoring)
        members = [scoring.values, *(train(i) for i in range(1, self.inits))]
        return np.mean([_all_scores(function, scoring, values) for values in members], axis=0)


def _all_scores(function, scoring, values) -> Float[np.ndarray, " n"]:
    scores = []
    for batch in scoring.batches():
        real = np.asarray(batch.get("weight", np.ones(len(batch["label"])))) > 0
        batch = {k: v for k, v in batch.items() if k not in ("index", "weight")}
        scores.append(np.asarray(function(values, batch), np.float64)[real])
    return np.concatenate(scores)


def _batch_scores(scoring, score: str, values, batch) -> Float[Array, " B"]:
    def logits(values, batch):
        return class_logits(scoring.bind(values), batch, Context())[0]

    if score == "el2n":
        return el2n(logits(values, batch), batch["label"])
    params = {p: v for p, v in values.items() if p in scoring.phase.params}

    def loss(params, example):
        one = jax.tree.map(lambda a: a[None], example)
        return cross_entropy(logits(values | params, one), one["label"])[0]

    return grand(loss, params, batch)


def member_trainer(scoring) -> Callable[[int], dict[str, Array]]:
    """index -> the arrays of that initialization, trained as the phase that ends was."""
    phase, steps = scoring.phase, scoring.phase.stop - scoring.phase.start

    @jax.jit
    def start(key):
        values = model_lib.init(phase.stacked, key)
        trained = {p: v for p, v in values.items() if p in phase.trained}
        rest = {p: v for p, v in values.items() if p not in trained}
        return trained, rest, phase.optimizer.init(trained)

    def loss(trained, rest, batch, context):
        model = scoring.bind(rest | trained)
        total, _ = scoring.objective(model, batch, context)
        return total, model_lib.state_of(model)

    @jax.jit
    def step(trained, rest, optimizer, batch, key, number):
        rng = jax.random.fold_in(key, number)
        context = Context(rng=rng, progress=number / max(1, steps), train=True)
        grads, state = jax.grad(loss, has_aux=True)(trained, rest, batch, context)
        updates, optimizer = phase.optimizer.update(grads, optimizer, trained)
        return optax.apply_updates(trained, updates), rest | state, optimizer

    def train(index: int) -> dict[str, Array]:
        key = jax.random.fold_in(scoring.key, index)
        trained, rest, optimizer = start(key)
        for number, batch in enumerate(_batches(scoring, index, steps)):
            arguments = batch, key, jnp.asarray(number)
            trained, rest, optimizer = step(trained, rest, optimizer, *arguments)
        return rest | trained

    return train


def _batches(scoring, seed: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """`steps` batches of shuffled epochs, in an order of this member's own."""
    size, count = scoring.batch_size, len(scoring.source)
    rng = np.random.default_rng(seed)
    epochs = math.ceil(steps * size / count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)] or [[]])
    for number in range(steps):
        rows = [scoring.source[int(i)] for i in order[number * size : (number + 1) * size]]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
