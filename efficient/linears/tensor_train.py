"""A dense layer as a tensor train (TT-matrix), and the stacked tensorial neural network's record.

"Stacked tensorial neural networks for reduced-order modeling of a parametric partial differential
equation", Wagner 2023, arXiv 2312.14979, whose layers are those of "Tensorizing Neural Networks",
Novikov, Podoprikhin, Osokin and Vetrov 2015, arXiv 1509.06569. With I = i_1 ... i_d and
O = j_1 ... j_d, and indices read with the last factor running fastest,

    W[(a_1 ... a_d), (b_1 ... b_d)] = G_1[:, a_1, b_1, :] ... G_d[:, a_d, b_d, :]

a product of d matrices of r_(k-1) x r_k, r_0 = r_d = 1. Cores G_k [r_(k-1), i_k, j_k, r_k] hold
sum_k r_(k-1) i_k j_k r_k numbers in place of I O. x W takes one core after another, first to last,
with sum_k 2 (j_1 ... j_k) r_(k-1) r_k (i_k ... i_d) operations.

Projection is TT-SVD (Oseledets 2011): unfold, cut the singular values, go on with the rest. Its
squared error is at most the sum over the d - 1 cuts of the squared singular values that are left
out of the k-th unfolding of W, so within sqrt(d - 1) of the best tensor train of these ranks.

The stacked network is the host `models.operators.Stacked`: K such maps of the data, summed with
weights that are a softmax of a network of the equation's parameters. The PDE to try it on here is
`efficient.data.poisson`.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, Normal
from efficient.linears.layout import on_rows
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param

Cores = Sequence[Array]  # [r_(k-1), i_k, j_k, r_k] each


def tensor_train_multiply(x: Float[Array, "*B I"], cores: Cores) -> Float[Array, "*B O"]:
    """x W, a core at a time."""
    *batch, rest = x.shape
    z, done = x[..., None, None, :], 1  # [*B, outputs so far, rank, inputs left]
    for core in cores:
        r, i, j, _ = core.shape
        rest //= i
        z = z.reshape(*batch, done, r, i, rest)
        z = jnp.einsum("...ariq,rijs->...ajsq", z, core)
        done *= j
    return z.reshape(*batch, done)


def tensor_train_matrix(cores: Cores) -> Float[Array, "I O"]:
    """The matrix W such that `tensor_train_multiply` gives x W, at the highest precision."""
    with jax.default_matmul_precision("highest"):
        size = math.prod(core.shape[1] for core in cores)
        return tensor_train_multiply(jnp.eye(size, dtype=cores[0].dtype), cores)


def tensor_train_project(
    matrix: Float[Array, "I O"],
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    ranks: Sequence[int],
) -> list[Float[Array, "_ _ _ _"]]:
    """Cores of these inner ranks, by TT-SVD."""
    _check_ranks(ranks, in_shape, out_shape)
    d = len(in_shape)
    order = [axis for k in range(d) for axis in (k, d + k)]
    rest, before, cores = matrix.reshape(*in_shape, *out_shape).transpose(order), 1, []
    for i, j, rank in zip(in_shape, out_shape, ranks, strict=False):
        u, s, vt = jnp.linalg.svd(rest.reshape(before * i * j, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(before, i, j, rank))
        rest, before = s[:rank, None] * vt[:rank], rank
    return [*cores, rest.reshape(before, in_shape[-1], out_shape[-1], 1)]


def balanced(size: int, order: int) -> list[int]:
    """`order` factors of `size` of the least sum, in ascending order."""
    if order == 1:
        return [size]
    options = (
        [first, *balanced(size // first, order - 1)]
        for first in range(1, round(size ** (1 / order)) + 1)
        if size % first == 0
    )
    return sorted(min(options, key=sum))


def most_ranks(in_shape: Sequence[int], out_shape: Sequence[int]) -> list[int]:
    """What the inner ranks of a matrix can be at most."""
    sizes = [i * j for i, j in zip(in_shape, out_shape, strict=True)]
    cuts = range(1, len(sizes))
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in cuts]


def ranks_within(rank: int, in_shape: Sequence[int], out_shape: Sequence[int]) -> list[int]:
    """`rank` at every cut of the tensor that can have it, else the most that it can."""
    return [min(rank, most) for most in most_ranks(in_shape, out_shape)]


def reachable_ranks(
    ranks: Sequence[int], in_shape: Sequence[int], out_shape: Sequence[int]
) -> list[int]:
    """The largest ranks, none above the given, that cores of full rank can have.

    r_k <= r_(k-1) i_k j_k, the rows of G_k, and r_(k-1) <= i_k j_k r_k, its columns.
    """
    sizes = [i * j for i, j in zip(in_shape, out_shape, strict=True)]
    found = [1, *ranks, 1]
    for k, size in enumerate(sizes):
        found[k + 1] = min(found[k + 1], found[k] * size)
    for k, size in reversed(list(enumerate(sizes))):
        found[k] = min(found[k], size * found[k + 1])
    return found[1:-1]


@register("linear", "tensor_train")
class TensorTrain(nnx.Module):
    """[..., I] -> [..., O] by d cores.

    Args:
      rank: of all inner cuts; a cut that cannot have it has as much as it can.
      ranks: one for each of the d - 1 cuts, instead.
      in_shape, out_shape: d factors of I and of O, in order; by default the most balanced.
      order: d, where the shapes are left to it.
      init_std: standard deviation of W's entries; None: of variance 1 / I.
      bias: overrides what the host asks for.
    """

    by_rows = True

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        rank: int = 8,
        ranks: list[int] | None = None,
        in_shape: list[int] | None = None,
        out_shape: list[int] | None = None,
        order: int = 3,
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        self.in_shape = _shape("in_shape", in_shape, in_features, order)
        self.out_shape = _shape("out_shape", out_shape, out_features, order)
        if len(self.in_shape) != len(self.out_shape):
            raise UserError(
                f"tensor_train: in_shape {self.in_shape} and out_shape {self.out_shape} must have"
                " as many factors; a factor may be 1"
            )
        self.ranks = tuple(_ranks(rank, ranks, self.in_shape, self.out_shape))
        # An entry is a sum over prod(ranks) products of d entries of cores.
        std = in_features**-0.5 if init_std is None else init_std
        draw = Normal((std / math.prod(self.ranks) ** 0.5) ** (1 / len(self.in_shape)))
        ends = itertools.pairwise((1, *self.ranks, 1))
        shapes = zip(ends, self.in_shape, self.out_shape, strict=True)
        for k, ((r, s), i, j) in enumerate(shapes):
            setattr(self, f"core_{k}", param((r, i, j, s), draw))
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    @property
    def cores(self) -> list[nnx.Param]:
        return [getattr(self, f"core_{k}") for k in range(len(self.in_shape))]

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        # Without layouts XLA splits the cores' small dimensions and sums what is between them.
        x = on_rows(x, context)
        y = on_rows(tensor_train_multiply(x, [core[...] for core in self.cores]), context)
        return y if self.bias is None else y + self.bias[...]

    def flops(self) -> int:
        """Floating-point operations a token of all products."""
        total, done, left = 0, 1, math.prod(self.in_shape)
        for core in self.cores:
            r, i, j, s = core.shape[-4:]
            done *= j
            total += 2 * done * r * s * left
            left //= i
        return total

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        return tensor_train_matrix([core[...] for core in self.cores])

    def project(self, matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """Parameters whose `materialize` is near `matrix`: within sqrt(d - 1) of the nearest."""
        cores = tensor_train_project(matrix, self.in_shape, self.out_shape, self.ranks)
        return {f"core_{k}": core for k, core in enumerate(cores)}


def _shape(name: str, shape: list[int] | None, size: int, order: int) -> tuple[int, ...]:
    """Factors of `size`, as given or balanced."""
    if shape is None:
        if order < 1:
            raise UserError(f"tensor_train: order={order} must be 1 or more")
        return tuple(balanced(size, order))
    if math.prod(shape) != size or min(shape, default=0) < 1:
        near = balanced(size, max(1, len(shape)))
        raise UserError(f"tensor_train: {name}={list(shape)} does not make {size}; {near} does")
    return tuple(shape)


def _ranks(rank: int, ranks: list[int] | None, in_shape, out_shape) -> list[int]:
    most = most_ranks(in_shape, out_shape)
    if ranks is None:
        if not 1 <= rank <= max(most, default=1):
            raise UserError(
                f"tensor_train: rank={rank} must be from 1 to {max(most, default=1)}, the most that"
                f" a tensor of {in_shape} x {out_shape} can have"
            )
        return ranks_within(rank, in_shape, out_shape)
    _check_ranks(ranks, in_shape, out_shape)
    return list(ranks)


def _check_ranks(ranks: Sequence[int], in_shape: Sequence[int], out_shape: Sequence[int]) -> None:
    most = most_ranks(in_shape, out_shape)
    if len(ranks) != len(most) or any(not 1 <= r <= m for r, m in zip(ranks, most, strict=True)):
        raise UserError(
            f"tensor_train: ranks={list(ranks)} must be {len(most)} numbers from 1 to {most}"
        )
    near = reachable_ranks(ranks, in_shape, out_shape)
    for k, (rank, fits) in enumerate(zip(ranks, near, strict=True)):
        if rank > fits:
            raise UserError(
                f"tensor_train: ranks={list(ranks)}: the rank {rank} of cut {k + 1} can be at most"
                f" {fits} beside its neighbours; the nearest ranks below that work are {near}"
            )


TEST = "tests/papers/test_stacked_tensorial.py"
PAPER = Paper(
    slug="stacked_tensorial",
    status="equations",
    claims=(
        Claim(
            "A layer's matrix is a tensor train: each entry a product of d small matrices.",
            f"{TEST}::test_value_and_gradients_by_the_definition",
            True,
        ),
        Claim(
            "TT-SVD is within the root sum of the cuts' errors, and exact on tensor trains.",
            f"{TEST}::test_projection_keeps_its_error_bound",
            True,
            "of Oseledets 2011, which the paper's layers rest on",
        ),
        Claim(
            "K tensor networks are summed with softmax weights of the equation's parameters.",
            f"{TEST}::test_stack_is_a_weighted_sum_of_its_maps",
            True,
        ),
        Claim(
            "The stack is an accurate model of a parametric PDE's solutions over its parameters.",
            f"{TEST}::test_stack_beats_a_dense_network_of_as_many_parameters",
            True,
            "screened Poisson on 8 x 8 points, one seed each: relative error 8.8%, a dense network"
            " of as many parameters 21.1%; solutions are checked by a sparse solve",
        ),
        Claim(
            "It generalizes to parameters outside its training data.",
            note="not measured here",
        ),
        Claim(
            "The density of a kinetic equation on annuli between ellipses, 256 x 64 points.",
            note="needs its solver's data sets, which are not published",
        ),
    ),
    source="github.com/caleb399/stacked_tensorial_nn: stnn/nn/stnn.py, stnn/nn/stnn_layers.py,"
    " paper/train.py, paper/models",
    departures=(
        "The equation is another: two variables, one coefficient and one quantity of the geometry,"
        " where the paper has three, one and two.",
        "The learned contraction over the velocity variable, and its regularization, have nothing"
        " to act on and are left out.",
        "Cores start Gaussian, such that the matrix has variance 1 / I.",
    ),
)
