"""Pixelfly: a flat block butterfly plus a low-rank matrix, in place of a dense one.

"Pixelated Butterfly: Simple and Efficient Sparse training for Neural Network Models", Chen, Dao,
Liang, Yang, Song, Rudra and Ré 2021, arXiv 2112.00029. For row vectors

    W = gamma B + (1 - gamma) U V        B [I, O] block-sparse, U [I, r], V [r, O], gamma a scalar

A butterfly matrix is a product of factors F_i, whose entries join indices that are equal or differ
in bit i alone: index pairs at stride 2^i. Written with residuals, (I + s F_0)(I + s F_1) ... is
I + s (F_0 + F_1 + ...) to first order in s: flat, a sum, and so one sparse matrix with a fixed
pattern. By blocks, it has the blocks (i, j) for which

    i = j   or   i xor j is one of 1, 2, 4 ... 2^(factors - 1)

of a `size` x `size` butterfly, size a power of two: (factors + 1) / size of all blocks. A matrix of
R x C blocks takes it stretched: block (p, q) is live where (p size // R, q size // C) is.

Budget. `density` is the share of a dense layer's parameters (and products) that a layer may have.
The densest flat butterfly within (1 - low_rank_share) of it is taken, of equal ones that of the
largest size, and what is left goes to the rank. This rule is this project's. One density for every
layer, which a rule of a config gives, divides a budget in proportion to the layers' dense products.

The authors' budget. Of the paper only the abstract and the caption of figure 1 could be read: each
matrix gets a budget of compute by its dimensions and its layer's type, and the budget decides the
pattern. Looked for and not found: how much a type gets, the model of costs, which part goes to the
low rank, and how neural tangent kernels guide the search. No commit of the authors' code has such a
rule. Its configs name numbers by hand, the same for layers of every shape: rank 32, and size and
factors of (16, 2), (16, 3), (16, 4), (8, 2), (8, 3) or (32, 3). They are for both layers of an MLP
(in MLP-Mixer that of the channels, in GPT-2, in ViT) and in some of ViT also for the projections of
attention; all else is dense. At 768 x 3072 that is a density of 0.18 to 0.55, of which the low rank
has 0.09 to 0.29. `size`, `factors` and `rank` name them here; the share of 1/4 is a default among
them, no rule of the paper.

For attention the pattern masks scores: the mixer `block_sparse_attention`, whose blocks that see
everything stand for the low rank.
"""

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, Constant, Uniform
from efficient.linears.block_sparse import LiveUniform, dense_of, grid_of_blocks
from efficient.linears.layout import layout_of
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope, param
from pallas_kernels.block_sparse_matmul import BlockMask, block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mask import flat_butterfly as pattern
from pallas_kernels.epilogue import ACTIVATIONS

_TEST = "tests/papers/test_pixelfly.py"

PAPER = Paper(
    slug="pixelfly",
    status="equations",
    claims=(
        Claim(
            "the pattern is the sum of block butterfly factors, stretched to rectangles",
            f"{_TEST}::test_pattern_is_the_sum_of_butterfly_factors",
            True,
        ),
        Claim(
            "a flat butterfly is the first-order form of a product of residual butterfly factors",
            f"{_TEST}::test_flat_butterfly_is_the_product_to_first_order",
            True,
            "the error of the sum, and of the best matrix of the pattern, falls with the square of"
            " the factors' size; a random pattern of equal density does not get near",
        ),
        Claim(
            "a low-rank term adds what the pattern cannot have",
            f"{_TEST}::test_low_rank_adds_what_the_pattern_cannot_have",
            True,
        ),
        Claim(
            "a compute budget decides pattern and rank",
            f"{_TEST}::test_budget_is_kept_and_used",
            True,
            "by a rule of this project; the authors' code names them by hand",
        ),
        Claim(
            "work is in proportion to the density",
            f"{_TEST}::test_parameters_and_flops_are_the_density",
            True,
            "the products of live blocks; a CPU multiplies small blocks as a dense matrix, sooner",
        ),
        Claim(
            "one pattern sparsifies attention and MLP alike",
            f"{_TEST}::test_attention_has_the_same_pattern",
            True,
            "attention's scores by the mixer block_sparse_attention",
        ),
        Claim(
            "3x faster than butterfly matrices; up to 2.5x faster training of MLP-Mixer, ViT and"
            " GPT-2 medium with no drop in accuracy",
            note="needs accelerators and their data",
        ),
        Claim(
            "budgets of layers by their neural tangent kernels",
            note="not implemented: neither the paper's abstract and figure 1 nor the code has the"
            " rule",
        ),
    ),
    source="github.com/HazyResearch/fly: src/models/layers/blocksparse_linear.py, "
    "src/models/layers/fastlinear.py (SparseLRLinear), src/ops/butterfly_factor.py, configs/model; "
    "of the paper, its abstract and the caption of figure 1",
    departures=(
        "gamma is a learned scalar, as in the abstract's formula, that starts at 1/2; the code has"
        " a sigmoid gate of each token's features, or 1/2",
        "where size does not divide the blocks, a block takes the cell of its first index; the code"
        " takes every block that meets a live cell",
        "a block divides inputs and outputs; the code pads them",
        "biases start at zero; blocks, U and V are drawn as in the code",
    ),
)


@functools.cache
def flat_butterfly(rows: int, columns: int, size: int, factors: int) -> BlockMask:
    """The flat block butterfly of `size`, a power of two, stretched to rows x columns blocks.

    Raises:
      UserError: no power of two from 2 to the fewer of rows and columns, or factors that are not
        from 1 to log2(size).
    """
    if size < 2 or size & (size - 1) or size > min(rows, columns):
        raise UserError(
            f"pixelfly: size={size} must be a power of two from 2 to {min(rows, columns)}, the"
            f" fewer of {rows} x {columns} blocks"
        )
    most = size.bit_length() - 1
    if not 1 <= factors <= most:
        raise UserError(
            f"pixelfly: factors={factors} must be from 1 to {most}, log2 of size={size}"
        )
    return pattern(rows, columns, size, factors)


@functools.cache
def _butterflies(rows: int, columns: int) -> list[tuple[float, int, int]]:
    """(density, size, factors) of all patterns."""
    return [
        (pattern(rows, columns, 2**power, factors).density, 2**power, factors)
        for power in range(1, min(rows, columns).bit_length())
        for factors in range(1, power + 1)
    ]


@functools.cache
def best_butterfly(rows: int, columns: int, most: float) -> tuple[int, int]:
    """(size, factors) of the densest pattern of a density of at most `most`; the largest of equals.

    Raises:
      UserError: the sparsest is denser.
    """
    options = _butterflies(rows, columns)
    fits = [option for option in options if option[0] <= most + 1e-9]
    if not fits:
        least = f"{min(options)[0]:.4g}" if options else "none, which takes two blocks a side"
        raise UserError(
            f"pixelfly: {rows} x {columns} blocks leave no butterfly of density {most:.4g}, the"
            f" sparsest has {least}; raise density or take a smaller block"
        )
    return max(fits)[1:]


def rank_for(in_features: int, out_features: int, parameters: float) -> int:
    """The greatest rank whose factors have at most so many parameters."""
    return max(0, math.floor(parameters / (in_features + out_features) + 1e-9))


@register("linear", "pixelfly")
class Pixelfly(nnx.Module):
    """[..., I] -> [..., O] by a flat block butterfly and a low-rank term.

    Args:
      density: parameters over those of a dense layer, bias and gamma apart; of the two terms
        together where `size` and `rank` are left to it.
      block: rows and columns of a block; divides inputs and outputs.
      low_rank_share: of the density, at least, for the low-rank term.
      size, factors: of the butterfly, together; by default the densest within the budget.
      rank: r; by default what the budget leaves. 0: no low-rank term and no gamma.
      init_std: root mean square of the matrix' numbers at the start, zeros among them; None: as in
        the code, 1 / (3 sqrt(I)) with a low-rank term and 1 / sqrt(3 I) without.
      bias: overrides what the host asks for.
    """

    by_rows = True
    fuses = tuple(ACTIVATIONS)

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        use_bias: bool,
        *,
        density: float = 0.25,
        block: int = 32,
        low_rank_share: float = 0.25,
        size: int | None = None,
        factors: int | None = None,
        rank: int | None = None,
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        grid = grid_of_blocks("pixelfly", in_features, out_features, block)
        self.mask, rank = _plan(
            in_features, out_features, grid, density, low_rank_share, (size, factors), rank
        )
        # Mean squares of 1 / (3 I) and, of U V, 1 / (9 I); with gamma at 1/2 of both 1 / (9 I).
        scale = 1.0
        if init_std is not None:
            scale = init_std * ((9 if rank else 3) * in_features) ** 0.5
        self.blocks = param((self.mask.count, block, block), LiveUniform(self.mask, scale))
        u, v = (Uniform(scale**0.5 * n**-0.5) for n in (in_features, rank or 1))
        self.u = param((in_features, rank), u) if rank else None
        self.v = param((rank, out_features), v) if rank else None
        self.gamma = param((), Constant(0.5)) if rank else None
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(
        self, x: Float[Array, "*B I"], context: Context, activation: str | None = None
    ) -> Float[Array, "*B O"]:
        dtype = jnp.result_type(x, self.blocks[...])
        read = lambda p: None if p is None else p[...]  # noqa: E731
        u, v = (None if p is None else p[...].astype(dtype) for p in (self.u, self.v))
        return block_sparse_matmul(
            x.astype(dtype),
            self.blocks[...].astype(dtype),
            mask=self.mask,
            u=u,
            v=v,
            gamma=read(self.gamma),
            bias=read(self.bias),
            activation=activation,
            sharding=layout_of(x, context),
        )

    def flops(self) -> int:
        """Floating-point operations a token of live blocks and the two low-rank products."""
        low = 0 if self.u is None else self.u.shape[-1] * (self.u.shape[-2] + self.v.shape[-1])
        return 2 * (math.prod(self.blocks.shape[-3:]) + low)

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        matrix = dense_of(self.blocks[...], self.mask.live)
        if self.u is None:
            return matrix
        gamma = self.gamma[...]
        return gamma * matrix + (1 - gamma) * (self.u[...] @ self.v[...])


def _plan(in_features, out_features, grid, density, low_rank_share, butterfly, rank):
    """(mask, rank) of a layer."""
    if not 0 < density <= 1:
        raise UserError(f"pixelfly: density={density} must be above 0 and at most 1")
    if not 0 <= low_rank_share < 1:
        raise UserError(f"pixelfly: low_rank_share={low_rank_share} must be from 0 to below 1")
    if (butterfly[0] is None) != (butterfly[1] is None):
        raise UserError("pixelfly: give size and factors together, or neither")
    most = min(in_features, out_features)
    if rank is not None and not 0 <= rank <= most:
        raise UserError(f"pixelfly: rank={rank} must be from 0 to {most}, the smaller side")
    whole = in_features * out_features
    if butterfly[0] is None:
        left = density * (1 - low_rank_share)
        if rank is not None:
            _check_rank(in_features, out_features, grid, density, rank)
            left = density - rank * (in_features + out_features) / whole
        butterfly = best_butterfly(*grid, left)
    mask = flat_butterfly(*grid, *butterfly)
    if rank is None:
        rank = min(most, rank_for(in_features, out_features, (density - mask.density) * whole))
    return mask, rank


def _check_rank(in_features, out_features, grid, density, rank):
    """Refuses a rank beside which the budget has no butterfly; names the largest that has."""
    best_butterfly(*grid, density)  # refuses what is too little without a rank, too
    left = density - min(_butterflies(*grid))[0]
    fits = rank_for(in_features, out_features, left * in_features * out_features)
    if rank > fits:
        raise UserError(
            f"pixelfly: rank={rank} leaves too little of density={density:.4g} for a butterfly of"
            f" {grid[0]} x {grid[1]} blocks; the largest rank that fits is {fits}"
        )
