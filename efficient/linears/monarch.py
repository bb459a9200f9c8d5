"""Monarch matrices: a dense layer as two block-diagonal factors and a fixed permutation.

"Monarch: Expressive Structured Matrices for Efficient and Accurate Training", Dao, Chen, Sohoni,
Desai, Poli, Grogan, Liu, Rao, Rudra, Ré 2022, arXiv 2204.00595. For column vectors

    M = P L P^T R,        R = diag(R_1 ... R_b),   L = diag(L_1 ... L_b)

where P reads a vector as a matrix with b columns and transposes it. With b = sqrt(n) blocks of
b x b this is the paper's definition; the reference's layer, and this one, takes any number of
blocks b and any shape. Its inner width per block is q = min(I, O) / b, so a layer has q (I + O)
parameters, 2 / b of a square dense layer's. I and O are padded to multiples of b.

In the row-vector convention here, y = x W with W = M^T:

    right [b, I/b, q]  = R_k^T        left [b, q, O/b] = L_l^T
    z[k, :] = x[k, :] right[k]        k: block of the input, contiguous features
    z read flat as [q, b]; column l goes to block l of left
    y[s, l] = (z[:, l] left[l])[s]    flat index s * b + l: outputs are interleaved

Projection. The slice of W that joins input block k to output block l is a free matrix of rank at
most r, the number of inner features the two share (one where q = b), and the slices are disjoint.
So the Frobenius-nearest Monarch matrix takes each slice's truncated SVD, with the singular values
split evenly between the factors (the paper's Algorithm 1, which it states for r = 1).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Inexact

from efficient.errors import UserError
from efficient.init import ZEROS, Uniform
from efficient.linears.layout import layout_of
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param
from pallas_kernels.epilogue import ACTIVATIONS
from pallas_kernels.mesh import size as axes_size
from pallas_kernels.monarch_matmul import monarch_matmul

_TEST = "tests/papers/test_monarch.py"

PAPER = Paper(
    slug="monarch",
    status="equations",
    claims=(
        Claim(
            "M = P L P^T R, a product of two block-diagonal matrices up to permutation",
            f"{_TEST}::test_equals_explicit_permutations_and_block_diagonals",
            True,
        ),
        Claim(
            "O(n sqrt n) parameters and FLOPs: 2 / b of a dense layer with b blocks",
            f"{_TEST}::test_parameters_and_flops_are_two_over_blocks_of_dense",
            True,
        ),
        Claim(
            "the nearest Monarch matrix has a closed form, optimal in Frobenius norm",
            f"{_TEST}::test_projection_is_optimal",
            True,
        ),
        Claim(
            "the projection of a Monarch matrix is itself",
            f"{_TEST}::test_projection_recovers_monarch_matrices",
            True,
        ),
        Claim(
            "represents the discrete Fourier transform up to a permutation of its input",
            f"{_TEST}::test_fourier_factors",
            True,
            "in closed form (efficient.linears.monarch_members), and found by the projection",
        ),
        Claim(
            "represents the Hadamard transform, and convolution with two matrices of the class",
            f"{_TEST}::test_circular_convolution",
            True,
            "Hadamard: test_hadamard_factors",
        ),
        Claim(
            "reverse sparsification: a Monarch model becomes a dense one of the same function",
            f"{_TEST}::test_reverse_sparsification_keeps_the_function",
            True,
        ),
        Claim(
            "2x faster GPT-2 and ViT training, 23% faster BERT than MLPerf 1.1",
            note="needs GPUs and their data",
        ),
    ),
    source="github.com/HazyResearch/fly: src/models/layers/monarch_linear.py, "
    "src/models/layers/blockdiag_butterfly_multiply.py, src/ops/blockdiag_butterfly_projection.py",
    departures=(
        "the bias starts at zero, the reference draws it uniformly",
        "factors are padded to multiples of b; the padded inputs and outputs are not used",
        "the projection is generalised to rank r > 1 and to padded shapes",
    ),
)


def monarch_multiply(
    x: Inexact[Array, "*B I"],
    right: Inexact[Array, "b p q"],
    left: Inexact[Array, "b q s"],
    out_features: int,
) -> Inexact[Array, "*B O"]:
    """x W for the Monarch matrix of the two factors; x is padded to b p, y cut to `out_features`.

    Batched matrix products in the dtype of the inputs, complex ones too, with the platform's
    accumulation. The layer runs `pallas_kernels.monarch_matmul`, which is the same function.
    """
    blocks, rows, inner = right.shape
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * rows - x.shape[-1])])
    x = x.reshape(*x.shape[:-1], blocks, rows)
    z = jnp.einsum("...kp,kpq->...kq", x, right)
    z = z.reshape(*z.shape[:-2], inner, blocks)
    y = jnp.einsum("...rl,lrs->...sl", z, left)
    return y.reshape(*y.shape[:-2], -1)[..., :out_features]


def monarch_matrix(
    right: Inexact[Array, "b p q"],
    left: Inexact[Array, "b q s"],
    in_features: int,
    out_features: int,
) -> Inexact[Array, "I O"]:
    """The matrix W such that `monarch_multiply` gives x W, at the highest precision."""
    with jax.default_matmul_precision("highest"):
        identity = jnp.eye(in_features, dtype=right.dtype)
        return monarch_multiply(identity, right, left, out_features)


def monarch_shapes(
    in_features: int, out_features: int, blocks: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of `right` [b, p, q] and `left` [b, q, s].

    Raises:
      UserError: fewer blocks than 1, or more than inputs or outputs.
    """
    most = min(in_features, out_features)
    if not 1 <= blocks <= most:
        raise UserError(
            f"monarch: blocks={blocks} must be between 1 and the smaller of its {in_features}"
            f" inputs and {out_features} outputs; the nearest is {max(1, min(blocks, most))}"
        )
    rows, cols = -(-in_features // blocks), -(-out_features // blocks)
    inner = min(rows, cols)
    return (blocks, rows, inner), (blocks, inner, cols)


def monarch_project(
    matrix: Inexact[Array, "I O"], blocks: int
) -> tuple[Inexact[Array, "b p q"], Inexact[Array, "b q s"]]:
    """The factors of the Monarch matrix nearest to `matrix` in Frobenius norm.

    One SVD of each of the b * b slices [I/b, O/b]. Real or complex.
    """
    in_features, out_features = matrix.shape
    (_, rows, inner), (_, _, cols) = monarch_shapes(in_features, out_features, blocks)
    padding = [(0, blocks * rows - in_features), (0, blocks * cols - out_features)]
    # Zero padding does not change the truncated SVD of the part that is used.
    slices = jnp.pad(matrix, padding).reshape(blocks, rows, cols, blocks).transpose(0, 3, 1, 2)
    u, sigma, vh = jnp.linalg.svd(slices, full_matrices=False)  # [k, l, p, m], [k, l, m], ...
    root = jnp.sqrt(sigma)
    u, vh = u * root[:, :, None, :].astype(u.dtype), vh * root[..., None].astype(u.dtype)
    source, row, target, col, component = _inner_features(blocks, inner)
    u, vh = u[source, target, :, component], vh[source, target, component]
    right = jnp.zeros((blocks, inner, rows), matrix.dtype).at[source, row].set(u)
    left = jnp.zeros((blocks, inner, cols), matrix.dtype).at[target, col].set(vh)
    return right.swapaxes(1, 2), left


def _inner_features(blocks: int, inner: int) -> tuple[np.ndarray, ...]:
    """How the b * q inner features join the factors.

    For each: its block and index in `right`, its block and index in `left`, and how many earlier
    features join the same two blocks.
    """
    flat = np.arange(blocks * inner)
    row = flat % inner
    return flat // inner, row, flat % blocks, flat // blocks, row // blocks


@register("linear", "monarch")
class Monarch(nnx.Module):
    """[..., I] -> [..., O] by two block-diagonal products.

    Args:
      blocks: b; more blocks, fewer parameters: 2 / b of a square dense layer's.
      split: what a device works with where a mesh splits features. "rows": all of both factors,
        applied to its own rows. "features": a share of the factors and of the features, with some
        features exchanged; better for few rows, as in decoding.
      init_std: root mean square of the matrix' numbers at the start; None: as in the reference,
        1 / (3 sqrt(I)) where min(I, O) is a multiple of blocks^2.
      bias: overrides what the host asks for.
    """

    fuses = tuple(ACTIVATIONS)

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        blocks: int = 4,
        split: Literal["rows", "features"] = "rows",
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        if split not in ("rows", "features"):
            raise UserError(f"monarch: split={split!r} must be 'rows' or 'features'")
        self.name, self.by_rows = scope.name, split == "rows"
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        right, left = monarch_shapes(in_features, out_features, blocks)
        # PyTorch's default for a linear layer, factor by factor, as in the reference. Of the inner
        # features each block of inputs and of outputs share q / b, in the mean, whose products
        # have a variance of 1 / (9 p q).
        scale = 1.0 if init_std is None else (3 * init_std * (right[0] * right[1]) ** 0.5) ** 0.5
        self.right = param(right, Uniform(scale * right[1] ** -0.5))
        self.left = param(left, Uniform(scale * left[1] ** -0.5))
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(
        self, x: Float[Array, "*B I"], context: Context, activation: str | None = None
    ) -> Float[Array, "*B O"]:
        dtype = jnp.result_type(x, self.right[...])
        right, left = self.right[...].astype(dtype), self.left[...].astype(dtype)
        missing = right.shape[0] * right.shape[1] - self.in_features
        outputs = left.shape[0] * left.shape[2]
        bias = self.bias
        if bias is not None:
            bias = jnp.pad(bias[...].astype(dtype), (0, outputs - self.out_features))
        y = monarch_matmul(
            jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1) + [(0, missing)]),
            right,
            left,
            bias=bias,
            activation=activation,
            **self._split(x, context),
        )
        return y[..., : self.out_features]

    def _split(self, x: Array, context: Context) -> dict:
        """How features lie on the mesh: as a dense layer's here, where the factors divide so."""
        if self.by_rows:
            return {"sharding": layout_of(x, context)}
        inputs, outputs = context.features(self.name)
        rows = layout_of(x, context, inputs or outputs)
        (blocks, _, _), (_, inner, columns) = self.right.shape[-3:], self.left.shape[-3:]
        ways = 1 if rows is None else axes_size(rows.mesh, inputs or outputs)
        other = inner if inputs else columns
        if ways == 1 or blocks % ways or other % ways or (inputs and outputs):
            return {"sharding": layout_of(x, context)}
        split = NamedSharding(rows.mesh, PartitionSpec(*rows.spec, inputs))
        return {"sharding": split, "outputs": outputs}

    def flops(self) -> int:
        """Floating-point operations a token of the two products."""
        b, p, q = self.right.shape[-3:]
        return 2 * b * q * (p + self.left.shape[-1])

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        return monarch_matrix(self.right[...], self.left[...], self.in_features, self.out_features)

    def project(self, matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """The parameters whose `materialize` is nearest to `matrix` in Frobenius norm."""
        right, left = monarch_project(matrix, self.blocks)
        return {"right": right, "left": left}
