"""AdamW that decays low-rank layers by the norm of their matrix, not by those of its factors.

For "Exploring Low Rank Training of Deep Neural Networks", Kamalakara, Locatelli, Venkitesh, Ba, Gal
and Gomez 2022, arXiv 2209.13569, which compares the two; Frobenius decay is from "Initialization
and Regularization of Factorized Neural Layers", Khodak, Tenenholtz, Mackey and Fusi 2021, arXiv
2105.01029. For W = D U of the arrays `down` D [I, r] and `up` U [r, O] of a path

    weight decay       (|D|^2 + |U|^2) / 2     gradients D and U
    Frobenius decay    |D U|^2 / 2             gradients D (U U^T) and (D^T D) U

The first is at least the sum of W's singular values, and equal to it where the factors are
balanced, so it makes few of them; the second is half the sum of their squares.

Decay is decoupled from Adam's moments, as weight decay is: it joins the direction.
"""

import optax
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.optimizers.common import Mask, Schedule, check_numbers, per_layer, scheduled
from efficient.papers import Claim, Paper
from efficient.registry import register


def frobenius_gradient(
    down: Float[Array, "I r"], up: Float[Array, "r O"]
) -> tuple[Float[Array, "I r"], Float[Array, "r O"]]:
    """The gradients of |D U|^2 / 2, by matrices r x r."""
    return down @ (up @ up.T), (down.T @ down) @ up


def factor_pairs(paths) -> list[str]:
    """Paths of the layers that hold `down` and `up`."""
    heads = (path.removesuffix("/down") for path in paths if path.endswith("/down"))
    return [head for head in heads if f"{head}/up" in paths]


def add_frobenius_decay(weight: float | Array, decay_mask: Mask) -> optax.GradientTransformation:
    """Adds `weight` times the gradients of |D U|^2 / 2 of pairs of which both are decayed."""

    def update(updates, state, params):
        decays, new = decay_mask(params), dict(updates)
        for head in factor_pairs(params):
            pair = f"{head}/down", f"{head}/up"
            if not all(decays[path] for path in pair):
                continue
            found = per_layer(frobenius_gradient, pair[0], *(params[path] for path in pair))
            for path, gradient in zip(pair, found, strict=True):
                new[path] = updates[path] + weight * gradient
        return new, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@register("optimizer", "frobenius_adamw")
def frobenius_adamw(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.0,
    frobenius_decay: float | Schedule = 0.1,
    factor_decay: float | Schedule = 0.0,
) -> optax.GradientTransformation:
    """AdamW whose decay of factors is that of their product.

    Args:
      weight_decay: of all arrays but the factors of low-rank layers.
      frobenius_decay: of the factors, by the norm of their product.
      factor_decay: of the factors, by their own norms: the weight decay to compare with, at a rate
        of its own.
    """
    numbers = {
        "weight_decay": weight_decay,
        "frobenius_decay": frobenius_decay,
        "factor_decay": factor_decay,
    }
    check_numbers(b1=b1, b2=b2, **numbers)

    def factors(params):
        found = {f"{head}/{n}" for head in factor_pairs(params) for n in ("down", "up")}
        if not found:
            raise UserError(
                "frobenius_adamw: no trained layer has the factors `down` and `up`; give layers"
                " use='low_rank', or take adamw"
            )
        return {p: decays and p in found for p, decays in decay_mask(params).items()}

    def others(params):
        own = factors(params)
        return {p: decays and not own[p] for p, decays in decay_mask(params).items()}

    def build(b1, b2, weight_decay, frobenius_decay, factor_decay):
        return optax.chain(
            optax.scale_by_adam(b1, b2, eps),
            optax.add_decayed_weights(weight_decay, others),
            optax.add_decayed_weights(factor_decay, factors),
            add_frobenius_decay(frobenius_decay, decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return scheduled(build, b1=b1, b2=b2, **numbers)


TEST = "tests/papers/test_low_rank_study.py"
PAPER = Paper(
    slug="low_rank_study",
    status="equations",
    claims=(
        Claim(
            "Spectral initialization: factors of the r leading parts of a random matrix, singular"
            " values split evenly; or replaced by ones.",
            f"{TEST}::test_spectral_initialization",
            True,
        ),
        Claim(
            "Frobenius decay is the gradient of |D U|^2 / 2.",
            f"{TEST}::test_frobenius_gradient",
            True,
        ),
        Claim(
            "Weight decay of factors lowers the rank of their product, Frobenius decay does not.",
            f"{TEST}::test_what_the_decays_do_to_singular_values",
            True,
            "the minima of least squares with each: singular values less a constant, or scaled; in"
            " a small language model at a rate of 10 an effective rank of 3.9 and 28.3, of 32, at a"
            " rate of 1 of 28.6 and 29.9 (`benchmarks.low_rank_study`). At 1 Frobenius decay is the"
            " better by 0.004 to 0.028 bits per byte, and better than none by 0.002 at most unless"
            " matrices start too large",
        ),
        Claim(
            "Full-rank warm-up: a dense model trained for a while, cut to its nearest low rank.",
            f"{TEST}::test_warmed_up_layers_are_cut_to_the_nearest",
            True,
        ),
        Claim(
            "Spectral initialization helps by its directions, not by its singular values.",
            note="does not hold in the small language model of `benchmarks.low_rank_study`: with"
            " ones it ends at 3.637 and 3.758 bits per byte (ranks 16 and 32 of 128), with the"
            " singular values at 3.500 and 3.460; at this width ones are above all of those. Normal"
            " factors of the same deviation end at 3.487 and 3.461",
        ),
        Claim(
            "Full-rank warm-up helps language models more than the other choices.",
            note="the best mean of three seeds at both ranks and with every decay, by 0.030 to"
            " 0.057 bits per byte over the next start, most of it one seed's; at equal training"
            " FLOPs nothing is gained: rank 16 with it and rank 32 without end at 3.46"
            " (`benchmarks.low_rank_study`)",
        ),
    ),
    source="arXiv 2209.13569 (abstract and beginning; summaries by others);"
    " the code of arXiv 2105.01029, github.com/microsoft/fnl_paper: frob.py,"
    " Transformer-PyTorch/fairseq/trainer.py",
    departures=(
        "The singular values of the random matrix are quantiles of the law of Marchenko and Pastur,"
        " the same in every layer of a shape.",
        "Whether the paper decouples Frobenius decay from Adam's moments could not be established;"
        " the code of 2105.01029 adds it to the gradients, before they are clipped.",
        "That code can also decay the products of attention's query and key matrices and of its"
        " value and output matrices; here only factors of one layer have it.",
        "The paper's ranks, warm-up lengths and decays could not be established.",
    ),
)
