"""A dense layer of which a fixed set of blocks is kept, and a random one as a baseline.

    y = x B + b        B [I, O] of blocks [bi, bo], zero but at the live ones

The live blocks are parameters, [nnz, bi, bo] in row-major order; work and memory are in proportion
to them, by `pallas_kernels.block_sparse_matmul`. Here they are drawn uniformly without replacement,
the baseline of equal density for patterns such as the flat butterfly's (`efficient.linears.
pixelfly`); a column of blocks may be left without one, whose outputs are the bias. Layers of one
shape have one pattern, so that blocks of a model are alike and scanned.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from efficient.errors import UserError
from efficient.init import ZEROS
from efficient.linears.layout import layout_of
from efficient.registry import register
from efficient.scope import Context, Scope, param
from pallas_kernels.block_sparse_matmul import BlockMask, block_sparse_matmul
from pallas_kernels.epilogue import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class LiveUniform:
    """Uniform, of variance 1 / (3 fan-in), where fan-in counts the live inputs of a column.

    PyTorch's default for a dense layer, which the authors of Pixelfly widen by the square root of
    all blocks over live ones. The matrix, its zeros among its numbers, has a mean square of
    `scale`^2 / (3 I) in every column with a live block.
    """

    mask: BlockMask
    scale: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...], dtype) -> Array:
        fan_in = shape[-2] * np.maximum(1, self.mask.live.sum(0))[self.mask.live.nonzero()[1]]
        drawn = jax.random.uniform(key, shape, dtype, -1.0, 1.0)
        return drawn * jnp.asarray(self.scale * fan_in**-0.5, dtype)[:, None, None]


def check_divides(technique: str, in_features: int, out_features: int, name: str, value: int):
    """Raises UserError where `value` does not divide both, with the nearest that does."""
    common = math.gcd(in_features, out_features)
    if value < 1 or common % value:
        fits = [n for n in range(1, common + 1) if common % n == 0]
        best = min(fits, key=lambda n: abs(n - value))
        raise UserError(
            f"{technique}: {name}={value} does not divide {in_features} inputs and {out_features} "
            f"outputs; the nearest that does is {name}={best}"
        )


def grid_of_blocks(technique: str, in_features: int, out_features: int, block: int):
    """(rows, columns) of blocks in a matrix [in_features, out_features].

    Raises:
      UserError: `block` does not divide both.
    """
    check_divides(technique, in_features, out_features, "block", block)
    return in_features // block, out_features // block


@functools.cache
def random_mask(rows: int, columns: int, density: float, seed: int) -> BlockMask:
    """`density` of the blocks, rounded, at least one, drawn uniformly without replacement."""
    count = max(1, round(density * rows * columns))
    live = np.zeros(rows * columns, bool)
    rng = np.random.default_rng((seed, rows, columns))
    live[rng.choice(live.size, count, replace=False)] = True
    return BlockMask(live.reshape(rows, columns))


def dense_of(blocks: Float[Array, "Z p q"], live: Bool[np.ndarray, "R C"]) -> Float[Array, "I O"]:
    """The matrix of these live blocks."""
    (rows, columns), (_, p, q) = live.shape, blocks.shape
    whole = jnp.zeros((rows, columns, p, q), blocks.dtype).at[live.nonzero()].set(blocks)
    return whole.transpose(0, 2, 1, 3).reshape(rows * p, columns * q)


def blocks_of(matrix: Float[Array, "I O"], live: Bool[np.ndarray, "R C"]) -> Float[Array, "Z p q"]:
    """The live blocks of a matrix, which are those of the nearest block-sparse one."""
    rows, columns = live.shape
    whole = matrix.reshape(rows, matrix.shape[0] // rows, columns, -1).swapaxes(1, 2)
    return whole[live.nonzero()]


@register("linear", "block_sparse")
class BlockSparse(nnx.Module):
    """[..., I] -> [..., O] by blocks at random places.

    Args:
      density: live blocks over all.
      block: rows and columns of a block; divides inputs and outputs.
      seed: of the places.
      init_std: root mean square of the matrix' numbers at the start, zeros among them, in columns
        with a live block; None: 1 / sqrt(3 I).
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
        seed: int = 0,
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        shape = grid_of_blocks("block_sparse", in_features, out_features, block)
        if not 0 < density <= 1:
            raise UserError(f"block_sparse: density={density} must be above 0 and at most 1")
        self.mask = random_mask(*shape, float(density), seed)
        scale = 1.0 if init_std is None else init_std * (3 * in_features) ** 0.5
        self.blocks = param((self.mask.count, block, block), LiveUniform(self.mask, scale))
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(
        self, x: Float[Array, "*B I"], context: Context, activation: str | None = None
    ) -> Float[Array, "*B O"]:
        dtype = jnp.result_type(x, self.blocks[...])
        bias = None if self.bias is None else self.bias[...]
        return block_sparse_matmul(
            x.astype(dtype),
            self.blocks[...].astype(dtype),
            mask=self.mask,
            bias=bias,
            activation=activation,
            sharding=layout_of(x, context),
        )

    def flops(self) -> int:
        """Floating-point operations a token of the live blocks."""
        return 2 * math.prod(self.blocks.shape[-3:])

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        return dense_of(self.blocks[...], self.mask.live)

    def project(self, matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """The parameters whose `materialize` is nearest to `matrix` in Frobenius norm."""
        return {"blocks": blocks_of(matrix, self.mask.live)}
