"""Adam on gradients that are projected to a low rank, with moments of 32 or 8 bits.

The optimizer's half of GradNormLoRP: "Gradient Weight-normalized Low-rank Projection for Efficient
LLM Training", Huang et al. 2024, arXiv 2412.19616. By itself it normalizes nothing: on a dense
layer's kernel it is projected Adam in the manner of GaLore. The other half is the surgery
`efficient.surgery.gwnlp`, W = m V / ||V||_c. There V (or A and B) is the matrix below, G its
gradient through the normalization, and the magnitudes m get Adam of their own.
For a matrix with the gradient G, every `period` steps, the first step included:

    U S V^T = svd(G), cut to its r largest singular values
    R = U^T G V                                       [r, r]
    W -= learning_rate * scale * U adam(R) V^T

where adam(R) = m_hat / (sqrt(v_hat) + eps). Moments stay as they are when the subspace changes.
At a decomposition R is diagonal; what rounding leaves beside the diagonal is small, but at the
first step Adam scales it up towards the rest unless eps lies well above it.
With `sides="shorter"` only the shorter side is projected, as in GaLore (Zhao et al. 2024, arXiv
2403.03507) and by default in the authors' code. All other arrays get Adam's step, without `scale`.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from efficient.errors import UserError, nearest
from efficient.optimizers.common import (
    Mask,
    Schedule,
    check_numbers,
    is_stacked,
    per_layer,
    scheduled,
)
from efficient.optimizers.quantized import Quantized, dequantize, quantize
from efficient.papers import Claim, Paper
from efficient.registry import register

SIDES = ("both", "shorter")
Bases = dict[str, Float[Array, "_ r"]]


class ProjectedState(NamedTuple):
    """Moments by path, quantized or not, and the bases of the present subspaces."""

    count: Int[Array, ""]
    mu: dict[str, Array | Quantized]
    nu: dict[str, Array | Quantized]
    bases: dict[str, Bases]


def sides_of(shape: tuple[int, int], sides: str) -> tuple[str, ...]:
    """Which sides of a matrix [I, O] are projected: `left` is that of I."""
    if sides == "both":
        return "left", "right"
    return ("left",) if shape[0] <= shape[1] else ("right",)


def singular_bases(g: Float[Array, "I O"], rank: int, sides: tuple[str, ...]) -> Bases:
    """Orthonormal bases of the `rank` leading singular directions, of each side in `sides`."""
    u, _, vt = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
    found = {"left": u[:, :rank], "right": vt[:rank].T}
    return {side: found[side] for side in sides}


def project(g: Float[Array, "I O"], bases: Bases) -> Float[Array, "_ _"]:
    """U^T G V; a side without a basis is left as it is."""
    g = bases["left"].T @ g if "left" in bases else g
    return g @ bases["right"] if "right" in bases else g


def project_back(r: Float[Array, "_ _"], bases: Bases) -> Float[Array, "I O"]:
    """U R V^T."""
    r = bases["left"] @ r if "left" in bases else r
    return r @ bases["right"].T if "right" in bases else r


def scale_by_projected_adam(
    *,
    b1: float | Array,
    b2: float | Array,
    eps: float,
    rank: int,
    period: int,
    scale: float,
    sides: str,
    at: str,
    bits: int,
    least: int,
) -> optax.GradientTransformation:
    """Adam's direction, of matrices that match `at` in their leading subspace; see the module."""

    def is_projected(path, x):
        return x.ndim - is_stacked(path) == 2 and re.fullmatch(at, path) is not None

    def pack(x, signed):
        return quantize(x, signed) if bits == 8 and x.size >= least else x

    def unpack(x, signed):
        return dequantize(x, signed) if isinstance(x, Quantized) else x

    def init(params):
        def one(projected):
            def zeros(x):
                bases = singular_bases(x, rank, sides_of(x.shape, sides)) if projected else {}
                r = project(x, bases) if projected else x
                return pack(r, True), pack(r, False), bases

            return zeros

        found = {path for path, x in params.items() if is_projected(path, x)}
        if not found:
            raise UserError(f"gwnlp: at='{at}' matches no trained matrix; change at, or use adam")
        shapes = {
            path: jax.eval_shape(lambda x, path=path: per_layer(one(path in found), path, x), x)
            for path, x in params.items()
        }
        mu, nu, bases = ({p: s[i] for p, s in shapes.items()} for i in range(3))
        bases = {path: bases[path] for path in params if path in found}
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (mu, nu, bases))
        return ProjectedState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def adam(g, mu, nu):
            m = (1 - b1) * g + b1 * unpack(mu, True)
            v = (1 - b2) * g**2 + b2 * unpack(nu, False)
            direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return direction, pack(m, True), pack(v, False)

        def projected(g, mu, nu, bases):
            direction, mu, nu = adam(project(g, bases), mu, nu)
            return scale * project_back(direction, bases), mu, nu

        def renewed(path, g, bases):
            def decompose(g):
                return singular_bases(g, rank, tuple(bases))

            # Layer by layer: XLA's batched decomposition on CPUs, which takes threads of its own,
            # was seen to wait forever in a program over eight devices.
            def fresh():
                return jax.lax.map(decompose, g) if is_stacked(path) else decompose(g)

            return jax.lax.cond(state.count % period == 0, fresh, lambda: bases)

        bases = {path: renewed(path, updates[path], old) for path, old in state.bases.items()}
        new = {}
        for path, g in updates.items():
            arrays = (g, state.mu[path], state.nu[path])
            if path in bases:
                new[path] = per_layer(projected, path, *arrays, bases[path])
            else:
                new[path] = per_layer(adam, path, *arrays)
        directions, mu, nu = ({path: out[i] for path, out in new.items()} for i in range(3))
        return directions, ProjectedState(count, mu, nu, bases)

    return optax.GradientTransformation(init, update)


@register("optimizer", "gwnlp")
def gwnlp(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float = 1e-6,
    weight_decay: float | Schedule = 0.0,
    rank: int = 128,
    period: int = 200,
    scale: float = 1.0,
    sides: str = "both",
    at: str = r"(.*/)?(mixer|channel)/.*",
    bits: int = 32,
    least: int = 4096,
) -> optax.GradientTransformation:
    """Adam in the leading singular subspace of each matrix' gradient.

    Args:
      rank: r; a matrix whose shorter side is below that keeps all of its directions.
      period: steps between decompositions.
      scale: of the projected matrices' steps.
      sides: `both` projects to [r, r], `shorter` to r times the longer side.
      at: pattern of paths; of what it matches, matrices are projected.
      bits: of the moments of all arrays, 32 or 8.
      least: arrays of fewer moments (in one layer) keep 32 bits.
    """
    check_numbers(b1=b1, b2=b2, weight_decay=weight_decay)
    if rank < 1 or period < 1:
        raise UserError(f"gwnlp: rank and period must be at least 1, got {rank} and {period}")
    if sides not in SIDES:
        raise UserError(f"gwnlp: unknown sides {sides!r}; {nearest(sides, SIDES)}")
    if bits not in (8, 32):
        raise UserError(f"gwnlp: bits={bits} must be 8 or 32")

    def build(b1, b2, weight_decay):
        rules = {"rank": rank, "period": period, "scale": scale, "sides": sides, "at": at}
        return optax.chain(
            scale_by_projected_adam(b1=b1, b2=b2, eps=eps, bits=bits, least=least, **rules),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return scheduled(build, b1=b1, b2=b2, weight_decay=weight_decay)


TEST = "tests/papers/test_gwnlp.py"
PAPER = Paper(
    slug="gwnlp",
    status="equations",
    claims=(
        Claim(
            "W is a magnitude times the normalized sum of W0 and a low-rank product.",
            f"{TEST}::test_the_matrix_is_weight_normalized",
            True,
        ),
        Claim(
            "Adam runs in the singular subspace of the gradient, renewed every `period` steps.",
            f"{TEST}::test_against_the_equations",
            True,
        ),
        Claim(
            "The gradient that is projected is that of a weight-normalized matrix, whose magnitudes"
            " have an Adam of their own.",
            f"{TEST}::test_weight_normalized_training_against_the_equations",
            True,
        ),
        Claim(
            "Nothing is added at inference: the reparametrization folds into the dense layer.",
            f"{TEST}::test_the_function_is_kept_and_folds_back",
            True,
        ),
        Claim(
            "8-bit GradNormLoRP needs up to 89.5% less optimizer memory.",
            f"{TEST}::test_state_memory",
            False,
            "the model and rank behind that number were not found; counted for a weight-normalized"
            " 2048 x 2048 matrix at rank 256, float32 bases, moments of the magnitudes included:"
            " 87.1% less than Adam's float32 state. V is the parameter here and no state; W is"
            " made from it in every forward pass, which training keeps for the backward pass. The"
            " authors' optimizer keeps V beside W: with that copy in float32 37.1% would be left",
        ),
        Claim(
            "RoBERTa reaches 80.65 on GLUE at rank 8, LoRA 79.23.",
            note="needs pretrained RoBERTa and GLUE",
        ),
    ),
    source="the paper's abstract; https://github.com/Jhhuangkay/"
    "Gradient-Weight-normalized-Low-rank-Projection-for-Efficient-LLM-Training"
    " (LowRankWeightNormAdamW.py, galore_projector.py, test_fine.py, test_train.py); PEFT's DoRA;"
    " https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, csrc/kernels.cu)",
    departures=(
        "The weight normalization is a reparametrization of the model, its gradient autodiff's; the"
        " authors' optimizer splits the parameter itself and keeps V as state.",
        "Magnitudes keep what Adam adds to them; the authors' optimizer sets them to V's norms"
        " anew at every step.",
        "Dense layers of the surgery's `at` are normalized; the authors' optimizer normalizes every"
        " array it is given, vectors as a whole.",
        "The gradient passes through the column norm unless constant_norm is set.",
        "Both sides of a gradient are projected, as in the paper; the authors' code projects the"
        " shorter by default, here `sides`.",
        "eps is added to the bias-corrected root, as in Adam; the authors' code adds it before"
        " the correction.",
        "Weight decay acts on the parameters before the step, not after it.",
    ),
)
