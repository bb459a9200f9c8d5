"""Sparse spectral training: a dense layer kept as its singular value decomposition.

"Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", Zhao, Zhang,
Li, Liu and Cannistraci 2025, arXiv 2405.15481. For row vectors

    y = x U diag(s) V^T        U [I, m], V [O, m] of orthonormal columns, m = min(I, O)

With G = dL/dW the gradient of s_i is u_i^T G v_i, and those of u_i and v_i are s_i times

    G v_i    and    G^T u_i

which the paper takes without s_i (the enhanced gradient), so that directions of small singular
values learn as fast as the others; where s_i is 0 they learn at all. The gradient of x stays what
it is. Which columns are trained, and when W is decomposed anew, is the optimizer's part:
`efficient.optimizers.sst_adam`.

The layer holds more numbers than a dense one, m (I + O + 1); it saves state of the optimizer. The
paper holds the columns in training apart and so has gradients of those alone; here gradients are
whole, and the optimizer reads the columns that it trains.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.init import ZEROS
from efficient.linears.matmul import weight_gradient
from efficient.linears.spectral import Orthonormal, SingularValues
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spectral_product(
    enhanced: bool,
    x: Float[Array, "*B I"],
    u: Float[Array, "I m"],
    s: Float[Array, " m"],
    v: Float[Array, "O m"],
) -> Float[Array, "*B O"]:
    """x U diag(s) V^T; with `enhanced` the gradients of U and V leave out s."""
    return _forward(enhanced, x, u, s, v)[0]


def _forward(enhanced, x, u, s, v):
    del enhanced
    h = x @ u
    return (h * s) @ v.T, (x, h, u, s, v)


def _backward(enhanced, residuals, dy):
    x, h, u, s, v = residuals
    g = dy @ v
    dx = (g * s) @ u.T
    ds = (h.astype(jnp.float32) * g).sum(axis=tuple(range(g.ndim - 1))).astype(s.dtype)
    scale = 1 if enhanced else s
    return dx, weight_gradient(x, g * scale), ds, weight_gradient(dy, h * scale)


spectral_product.defvjp(_forward, _backward)


@register("linear", "sparse_spectral", straight_through=True)
class SparseSpectral(nnx.Module):
    """[..., I] -> [..., O] by U, s and V.

    Args:
      init_std: standard deviation of the Gaussian matrix of which these are the parts; None: of
        variance 1 / I.
      enhanced: whether the gradients of U and V leave out s.
      bias: overrides what the host asks for.
    """

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        init_std: float | None = None,
        enhanced: bool = True,
        bias: bool | None = None,
    ):
        del scope
        std = in_features**-0.5 if init_std is None else init_std
        width = min(in_features, out_features)
        self.enhanced = enhanced
        self.u = param((in_features, width), Orthonormal())
        self.s = param((width,), SingularValues(in_features, out_features, std))
        self.v = param((out_features, width), Orthonormal())
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        dtype = jnp.result_type(x, self.u[...])
        parts = (a[...].astype(dtype) for a in (self.u, self.s, self.v))
        y = spectral_product(self.enhanced, x.astype(dtype), *parts)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def flops(self) -> int:
        """Floating-point operations a token of the two products."""
        return 2 * self.u.shape[-1] * (self.u.shape[-2] + self.v.shape[-2])

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        return (self.u[...] * self.s[...]) @ self.v[...].T

    @staticmethod
    def project(matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """The parameters whose `materialize` is `matrix`."""
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return {"u": u, "s": s, "v": vt.T}


TEST = "tests/papers/test_sparse_spectral.py"
PAPER = Paper(
    slug="sparse_spectral",
    status="equations",
    claims=(
        Claim(
            "Gradients of singular vectors are taken without the singular value.",
            f"{TEST}::test_value_and_gradients",
            True,
        ),
        Claim(
            "All singular values are trained at every step, and only the drawn vectors, which stay"
            " of unit length.",
            f"{TEST}::test_against_the_equations",
            True,
        ),
        Claim(
            "Vectors are drawn by singular values, mixed half and half with a uniform draw.",
            f"{TEST}::test_columns_are_drawn_by_their_singular_values",
            True,
        ),
        Claim(
            "A decomposition at the end of a round restores orthogonality and keeps the function.",
            f"{TEST}::test_decomposition_keeps_the_function",
            True,
        ),
        Claim(
            "The optimizer's state is that of r columns and of the singular values.",
            f"{TEST}::test_state_memory",
            True,
            "at rank 64 of a 768 x 3072 matrix 10.5% of Adam's",
        ),
        Claim(
            "With few vectors at a time it reaches what a matrix of that rank cannot.",
            f"{TEST}::test_reaches_a_full_rank_target_that_low_rank_cannot",
            True,
            "least squares on a 12 x 16 matrix, two columns at a time",
        ),
        Claim(
            "It has no saddle point where low-rank factors at zero have one.",
            f"{TEST}::test_no_saddle_point_at_zero",
            True,
            "their gradients at W = 0; ReLoRA, which meets it at every restart, was not run",
        ),
        Claim(
            "OPT-125M at rank 64: the gap in perplexity to full rank falls by 67.6%.",
            note="needs OpenWebText and 19.7 billion tokens",
        ),
        Claim(
            "Hyperbolic networks and graph tasks come near full rank or above it.",
            note="hyperbolic layers are not implemented",
        ),
    ),
    source="arXiv 2405.15481: its abstract, excerpts of its appendix F (steps, warm-up and"
    " iterations of a round) and a detailed summary by others; the authors' code could not be had",
    departures=(
        "Gradients of all columns are computed, and clipping sees their norm; the paper holds the"
        " drawn ones apart, whose gradients are all there is.",
        "That moments of the vectors are reset at each iteration was read in the summary; that"
        " those of s are reset at each decomposition, which reorders s, is this project's choice.",
        "Whether the warm-up of an iteration holds for s too could not be established; here it"
        " holds for the vectors.",
        "A round has ceil(m / r) iterations of a layer's own m; the paper's formula has the"
        " embedding's dimension, the same in every layer.",
        "U, s and V are drawn as the parts of a Gaussian matrix, each alone, and s as its law's"
        " quantiles; the paper decomposes what the model would have drawn.",
    ),
)
