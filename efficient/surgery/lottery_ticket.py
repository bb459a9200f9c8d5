"""Winning tickets: prune the smallest trained weights, rewind the rest, train again.

"The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", Frankle and Carbin
2019, arXiv 1803.03635. One round of iterative magnitude pruning, between two phases:

    m'    = m without the share p of its entries where |theta_trained| is smallest
    theta = theta_0, the initial values, for all parameters
    f(x; m' * theta) is trained again

In fully connected networks each layer loses its own share, the output layer half as much; deep
networks are pruned globally (`together=True`). Only matrices of linears are pruned, not biases,
norms or embeddings. The mask multiplies the weights, so a pruned weight is exactly 0 whatever the
optimizer does to the number beneath it.

theta_0 is not kept: initial values are a function of the run's key and the array's path, so they
are drawn again.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient.errors import UserError, check_finite
from efficient.init import ONES
from efficient.model import Arrays, bind, replace, walk
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, buffer
from efficient.surgery.common import carry, former_path, initial_values, linears

Survivors = Literal["rewind", "reinitialize", "keep"]


class Masks(nnx.Module):
    """One boolean array for each matrix of a linear, under the matrix' name with dots for `/`."""

    def __init__(self, base: nnx.Module):
        for path, variable in walk(base):
            if isinstance(variable, nnx.Param) and len(variable.shape) >= 2:
                setattr(self, path.replace("/", "."), buffer(variable.shape, ONES, jnp.bool_))


class MaskedLinear(nnx.Module):
    """A linear, of any technique, whose matrices are multiplied by masks."""

    def __init__(self, base: nnx.Module):
        self.base = base
        self.masks = Masks(base)

    def _bound(self) -> nnx.Module:
        """The base with masked matrices."""
        masks = {path.replace(".", "/"): mask[...] for path, mask in walk(self.masks)}
        arrays = {path: variable[...] for path, variable in walk(self.base)}
        masked = {
            path: arrays[path] * mask.astype(arrays[path].dtype) for path, mask in masks.items()
        }
        return bind(self.base, arrays | masked)

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        bound = self._bound()
        y = bound(x, context)
        for (_, own), (_, new) in zip(walk(self.base), walk(bound), strict=True):
            if not isinstance(own, nnx.Param):  # state that the base has updated
                own.set_value(new[...])
        return y

    def flops(self) -> int:
        """Floating-point operations a token; unstructured zeros save none in a dense product."""
        return self.base.flops()

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix of y = x W + b with the pruned entries at 0."""
        return self._bound().materialize()


@jax.jit
def prune(
    mask: Bool[Array, "*D"], weights: Float[Array, "*D"], rate: float | Float[Array, ""]
) -> Bool[Array, "*D"]:
    """The mask without the smallest of the weights it keeps.

    Exactly round(rate * kept) entries are removed; of equal weights the first in memory go first.
    """
    size = jnp.where(mask, jnp.abs(weights.astype(jnp.float32)), jnp.inf).ravel()
    order = jnp.argsort(size, stable=True)
    goes = jnp.arange(size.size) < jnp.round(rate * mask.sum())
    return mask & ~jnp.zeros(size.shape, jnp.bool_).at[order].set(goes).reshape(mask.shape)


def prune_together(
    masks: dict[str, Bool[Array, "..."]], weights: Arrays, rate: float
) -> dict[str, Bool[Array, "..."]]:
    """`prune` over all arrays at once: what is small is small anywhere."""
    paths = sorted(masks)
    kept = prune(
        jnp.concatenate([masks[p].ravel() for p in paths]),
        jnp.concatenate([weights[p].ravel() for p in paths]),
        rate,
    )
    ends = [0]
    for path in paths:
        ends.append(ends[-1] + masks[path].size)
    return {
        path: kept[start:stop].reshape(masks[path].shape)
        for path, start, stop in zip(paths, ends[:-1], ends[1:], strict=True)
    }


def _is_mask(path: str) -> bool:
    return "masks" in path.split("/")[:-1]


def _weight_of(mask_path: str) -> str:
    """`q/masks/kernel` -> `q/base/kernel`."""
    head, name = mask_path.rsplit("/", 1)
    return f"{head.removesuffix('masks')}base/{name.replace('.', '/')}"


@register("surgery", "lottery_ticket")
class LotteryTicket:
    """One round: tightens the masks by the trained weights and rewinds what is left.

    A linear that has masks already is not wrapped again, so the surgery before every phase gives
    iterative magnitude pruning.

    Args:
      rate: the share of the surviving weights that goes in this round.
      at: which linears.
      output: those among them that lose half the share (layerwise only).
      together: ranks all weights at once, rather than layer by layer.
      survivors: `rewind` to the initial values; `reinitialize` draws others, the paper's control;
        `keep` the trained ones (Han et al. 2015).
      seed: of `reinitialize`.
    """

    def __init__(
        self,
        *,
        rate: float = 0.2,
        at: str = r".*",
        output: str = r"(.*/)?head",
        together: bool = False,
        survivors: Survivors = "rewind",
        seed: int = 1,
    ):
        if not 0.0 < rate < 1.0:
            raise UserError(f"rate must be between 0 and 1, got {rate}")
        if survivors not in ("rewind", "reinitialize", "keep"):
            raise UserError(f"survivors is 'rewind', 'reinitialize' or 'keep', got {survivors!r}")
        self.rate, self.at, self.output = rate, at, output
        self.together, self.survivors, self.seed = together, survivors, seed

    def apply(self, model: nnx.Module) -> None:
        for path, linear in linears(model, self.at):
            if not isinstance(linear, MaskedLinear):
                replace(model, path, MaskedLinear(linear))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        """Masks from the trained weights; everything else as `survivors` says."""
        trained = carry(values, model, key)
        masks = {p: trained[p] for p in trained if _is_mask(p)}
        masks = masks | self._tightened(masks, trained, model, values)
        if self.survivors == "keep":
            return trained | masks
        if self.survivors == "reinitialize":
            key = jax.random.fold_in(key, self.seed)
        return initial_values(model, key, values) | masks

    def _tightened(self, masks, trained, model, values) -> dict[str, Bool[Array, "..."]]:
        """The masks of the linears at `at`."""
        own = {path for path, _ in linears(model, self.at)}
        masks = {p: m for p, m in masks.items() if p.split("/masks/")[0] in own}
        weights = {p: trained[_weight_of(p)] for p in masks}
        for p, array in weights.items():
            check_finite(f"lottery_ticket: {former_path(_weight_of(p), values)}", array)
        if self.together:
            return prune_together(masks, weights, self.rate)
        return {p: prune(m, weights[p], self._rate(p)) for p, m in masks.items()}

    def _rate(self, path: str) -> float:
        is_output = re.fullmatch(self.output, path.split("/masks/")[0])
        return self.rate / 2 if is_output else self.rate


TEST = "tests/papers/test_lottery_ticket.py"
PAPER = Paper(
    slug="lottery_ticket",
    status="equations",
    claims=(
        Claim(
            "Each round removes the share p of the smallest surviving weights of a layer, half of"
            " it in the output layer.",
            f"{TEST}::test_masks_against_numpy",
            True,
        ),
        Claim(
            "After n rounds (1 - p)^n of the weights remain.",
            f"{TEST}::test_three_rounds_leave_the_cube_of_what_one_leaves",
            True,
        ),
        Claim(
            "Survivors begin again at their initial values.",
            f"{TEST}::test_survivors_are_rewound_to_the_last_bit",
            True,
        ),
        Claim(
            "A ticket of a fifth of the weights is as accurate as the whole network, and more"
            " than with other initial values.",
            f"{TEST}::test_winning_ticket_beats_other_initial_values",
            True,
            "LeNet 300-100 on digits, three seeds: ticket 97.9%, whole 97.5%, reinitialized 96.3%",
        ),
        Claim(
            "Tickets below 10 to 20% of the size on MNIST and CIFAR-10, convolutions included.",
            None,
            False,
            "not run on those data sets; kernels of convolutions are not pruned",
        ),
    ),
    source="arXiv 1803.03635 and github.com/google-research/lottery-ticket-hypothesis",
    departures=(
        "Exactly round(p n) weights go; the authors' code removes every weight up to and including"
        " the cutoff, so one more, and all that tie with it.",
        "Convolutions of a patch embedding are not pruned.",
    ),
)
