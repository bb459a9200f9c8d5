"""Adam whose moments hold only the coarse half of a wavelet transform of the gradient.

"Breaking Memory Limits: Gradient Wavelet Transform Enhances LLMs Training", Wen et al. 2025,
arXiv 2501.07237, with Haar wavelets. For a matrix with the gradient G [I, O]:

    A, D_l, ..., D_1 = haar(G)        l levels along I, each of ceil(n / 2) coefficients
    m = b1 m + (1 - b1) A             v = b2 v + (1 - b2) A^2
    A~ = m_hat / (sqrt(v_hat) + eps)
    D~_k = D_k / (1 - b1^t) / (sqrt(v_hat) + eps), v_hat repeated to the length of D_k
    W -= learning_rate * scale * inverse_haar(A~, D~_l, ..., D~_1)

so the state is 2^-l of Adam's. Details have no moments: they pass as they are, on the scale that
the coefficient above them has. As the authors' code does it, and the paper's equations do not say:
details get the first moment's bias correction, although they are no average (at the first step of
b1 = 0.9 they weigh ten times what they do later), and a limiter, which is Fira's, divides A~ and
all D~ by max(n_t / n_{t-1}, growth) / growth, where n_t is the norm of m / (sqrt(v) + eps) of that
layer once limited.

The transform runs along the input features, as in the authors' code, where a weight is [O, I].
Lengths that are odd at some level get one zero, as there. Only matrices of attention and
feed-forward layers are transformed; all else gets Adam's step, without `scale`.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.optimizers.common import (
    Mask,
    Schedule,
    check_numbers,
    is_stacked,
    per_layer,
    scheduled,
)
from efficient.papers import Claim, Paper
from efficient.registry import register

Details = list[Float[Array, "_ O"]]


def haar(x: Float[Array, "I O"], level: int) -> tuple[Float[Array, "A O"], Details]:
    """The orthonormal Haar transform along the first axis: (approximation, details, coarse first).

    At level 0 the approximation is x itself. An odd length gets one zero at its end.
    """
    details: Details = []
    for _ in range(level):
        pairs = jnp.pad(x, ((0, x.shape[0] % 2), (0, 0))).reshape(-1, 2, x.shape[1])
        x, detail = (pairs[:, 0] + pairs[:, 1]) * 0.5**0.5, (pairs[:, 0] - pairs[:, 1]) * 0.5**0.5
        details.insert(0, detail)
    return x, details


def inverse_haar(
    approximation: Float[Array, "A O"], details: Details, length: int
) -> Float[Array, "I O"]:
    """The matrix of `length` rows whose transform this is."""
    x = approximation
    lengths = [d.shape[0] for d in details[1:]] + [length]
    for detail, rows in zip(details, lengths if details else [], strict=True):
        pairs = jnp.stack([x + detail, x - detail], axis=1) * 0.5**0.5
        x = pairs.reshape(-1, x.shape[1])[:rows]
    return x


class WaveletState(NamedTuple):
    """Moments of the approximations by path, and the norm of each transformed layer's last step."""

    count: Int[Array, ""]
    mu: dict[str, Array]
    nu: dict[str, Array]
    norm: dict[str, Array]


def scale_by_wavelet(
    *,
    b1: float | Array,
    b2: float | Array,
    eps: float,
    level: int,
    scale: float,
    growth: float | None,
    at: str,
) -> optax.GradientTransformation:
    """Adam's direction, of matrices that match `at` from the approximation; see the module."""

    def is_transformed(path, x):
        return x.ndim - is_stacked(path) == 2 and re.fullmatch(at, path) is not None

    def init(params):
        found = [path for path, x in params.items() if is_transformed(path, x)]
        if not found:
            raise UserError(
                f"gwt_adam: at='{at}' matches no trained matrix; change at, or use adam"
            )

        def zeros(path, x):
            approximation = lambda x: haar(x, level)[0] if path in found else x  # noqa: E731
            return jnp.zeros_like(jax.eval_shape(lambda x: per_layer(approximation, path, x), x))

        moments = {path: zeros(path, x) for path, x in params.items()}
        norm = {p: jnp.zeros(params[p].shape[:1] if is_stacked(p) else ()) for p in found}
        return WaveletState(
            jnp.zeros((), jnp.int32), moments, dict(moments), norm if growth else {}
        )

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        c1, c2 = 1 - b1**count, 1 - b2**count

        def moments_of(a, m, v):
            return (1 - b1) * a + b1 * m, (1 - b2) * a**2 + b2 * v

        def adam(g, m, v):
            m, v = moments_of(g, m, v)
            return (m / c1) / (jnp.sqrt(v / c2) + eps), m, v

        def wavelet(g, m, v, *norm):
            a, details = haar(g, level)
            m, v = moments_of(a, m, v)
            root = jnp.sqrt(v / c2) + eps
            a = (m / c1) / root
            for i, detail in enumerate(details):
                details[i] = detail / (c1 * root[: detail.shape[0]])
                root = jnp.repeat(root, 2, axis=0)
            direction = inverse_haar(a, details, g.shape[0]) * scale
            if not norm:
                return direction, m, v
            limit, limited = _limiter(a * (c1 / jnp.sqrt(c2)), norm[0], state.count, growth)
            return direction / limit, m, v, limited

        new = {}
        for path, g in updates.items():
            fn = wavelet if is_transformed(path, g) else adam
            norm = (state.norm[path],) if path in state.norm else ()
            new[path] = per_layer(fn, path, g, state.mu[path], state.nu[path], *norm)
        mu, nu = ({path: out[i] for path, out in new.items()} for i in (1, 2))
        norm = {path: new[path][3] for path in state.norm}
        return {path: out[0] for path, out in new.items()}, WaveletState(count, mu, nu, norm)

    return optax.GradientTransformation(init, update)


def _limiter(step, last, count, growth):
    """(what a layer's step is divided by, the norm of the step so divided)."""
    norm = jnp.sqrt(jnp.sum(jnp.square(step)))
    limit = jnp.where(count > 0, jnp.maximum(norm / (last + 1e-8), growth) / growth, 1.0)
    return limit, norm / limit


@register("optimizer", "gwt_adam")
def gwt_adam(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float = 1e-6,
    weight_decay: float | Schedule = 0.0,
    level: int = 2,
    scale: float = 0.25,
    growth: float | None = 1.01,
    at: str = r"(.*/)?(mixer|channel)/.*",
) -> optax.GradientTransformation:
    """Adam with 2^-level of its state for the matrices that `at` matches.

    Args:
      level: how often the gradient is halved; 0, with scale=1 and growth=None, is Adam bit for bit.
      scale: of the transformed matrices' steps; the paper's alpha. The authors train with 0.25 and
        a learning rate of 0.01.
      growth: by what factor a layer's step may grow at once; None for no limiter.
      at: pattern of paths; of what it matches, matrices are transformed.
    """
    check_numbers(b1=b1, b2=b2, weight_decay=weight_decay)
    if level < 0:
        raise UserError(f"gwt_adam: level={level} must be 0 or more; level=2 quarters the state")
    if growth is not None and growth < 1:
        raise UserError(f"gwt_adam: growth={growth} must be 1 or more, or None for no limiter")

    def build(b1, b2, weight_decay):
        rules = {"level": level, "scale": scale, "growth": growth, "at": at}
        return optax.chain(
            scale_by_wavelet(b1=b1, b2=b2, eps=eps, **rules),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return scheduled(build, b1=b1, b2=b2, weight_decay=weight_decay)


TEST = "tests/papers/test_gradient_wavelet.py"
PAPER = Paper(
    slug="gradient_wavelet",
    status="equations",
    claims=(
        Claim(
            "The update is Adam's on wavelet coefficients, with moments of the approximation only.",
            f"{TEST}::test_against_the_equations",
            True,
        ),
        Claim(
            "An l-level transform leaves 2^-l of Adam's state.",
            f"{TEST}::test_state_shrinks_by_two_to_the_level",
            True,
            "for the transformed matrices; the limiter adds one number a layer",
        ),
        Claim(
            "The update has full rank, unlike that of low-rank projections.",
            f"{TEST}::test_updates_have_full_rank",
            True,
        ),
        Claim(
            "Pretraining LLaMA on C4 matches full-rank Adam.",
            note="needs models of 60M to 7B parameters",
        ),
    ),
    source="https://github.com/zqOuO/GWT (galore_torch/waveadamw.py, torchrun_main.py)",
    departures=(
        "eps is added to the bias-corrected root, as in Adam; the authors' code adds it before"
        " the correction.",
        "Weight decay acts on the parameters before the step, not after it.",
        "Haar wavelets only; the authors' code takes any of PyWavelets'.",
    ),
)
