"""A layer of butterfly factors: n log2(n) parameters in place of n^2.

"Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations", Dao, Gu, Eichhorn,
Rudra and Ré 2019, arXiv 1903.05895; in blocks, "Pixelated Butterfly", Chen et al. 2021, arXiv
2112.00029, of which it is the baseline: there the product of factors is replaced by their sum
(`efficient.linears.pixelfly`). For column vectors

    W = F_k ... F_2 F_1        F_i joins features, or blocks of b, at distance 2^(i - 1)

with 2 x 2 entries, or blocks, a pair. As in the authors' code several such products may follow each
other, of increasing and decreasing strides by turns (B B^T), and a layer with more outputs than n b
inputs has several stacks, each with n b outputs. I is padded with zeros to n b, n a power of two,
and outputs beyond O are cut, where `pad` says so.

No projection of a dense matrix is here: the nearest product of butterfly factors has no closed form
for more than two of them (for two, see `efficient.linears.monarch`).
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, Normal
from efficient.linears.layout import layout_of
from efficient.registry import register
from efficient.scope import Context, Scope, param
from pallas_kernels.butterfly_matmul import butterfly_matmul
from pallas_kernels.butterfly_matmul.blockwise import flops


@register("linear", "butterfly")
class Butterfly(nnx.Module):
    """[..., I] -> [..., O] by products of butterfly factors.

    Args:
      block: b, features of a block; 1: scalar factors.
      increasing: whether strides increase from the first factor applied to the last.
      products: how many such products follow each other, by turns of increasing and decreasing
        strides.
      pad: allow I that is not b times a power of two (at least 2), and O that is no multiple of
        that: zeros are appended, outputs cut.
      init_std: root mean square of the matrix' numbers at the start; None: 1 / sqrt(I), I padded.
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
        block: int = 1,
        increasing: bool = True,
        products: int = 1,
        pad: bool = False,
        init_std: float | None = None,
        bias: bool | None = None,
    ):
        del scope
        for name, value in (("block", block), ("products", products)):
            if value < 1:
                raise UserError(f"butterfly: {name}={value} must be at least 1")
        stages = max(1, math.ceil(math.log2(-(-in_features // block))))
        width = block * 2**stages
        stacks = -(-out_features // width)
        if not pad and (width != in_features or stacks * width != out_features):
            raise UserError(
                f"butterfly: {in_features} inputs and {out_features} outputs are not {block} times "
                f"a power of two and a multiple of that; the nearest above are {width} and "
                f"{stacks * width}, to which pad=True pads"
            )
        self.in_features, self.out_features, self.increasing = in_features, out_features, increasing
        blocks = (block, block) if block > 1 else ()
        shape = (stacks, products, stages, 2 ** (stages - 1), 2, 2, *blocks)
        # Variance 1 / 2 of a scalar entry, as the authors' default: a factor keeps the variance.
        scale = 1.0
        if init_std is not None:
            scale = (init_std * width**0.5) ** (1 / (stages * products))
        self.twiddle = param(shape, Normal(scale * (2 * block) ** -0.5))
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        y = self._product(x, sharding=layout_of(x, context))
        return y if self.bias is None else y + self.bias[...]

    def _product(self, x, **how):
        twiddle = self.twiddle[...]
        dtype = jnp.result_type(x, twiddle)
        x, twiddle = x.astype(dtype), twiddle.astype(dtype)
        width = math.prod(twiddle.shape[3:5]) * (twiddle.shape[6] if twiddle.ndim == 8 else 1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
        parts = []
        for stack in twiddle:
            y = x
            for i, factors in enumerate(stack):
                y = butterfly_matmul(y, factors, increasing=self.increasing ^ (i % 2 == 1), **how)
            parts.append(y)
        return jnp.concatenate(parts, axis=-1)[..., : self.out_features]

    def flops(self) -> int:
        """Floating-point operations a token of the products, as XLA makes them: several factors at
        a time (`pallas_kernels.butterfly_matmul`)."""
        stacks, products, stages, _, _, _, *blocks = self.twiddle.shape
        return stacks * products * flops(stages, blocks[0] if blocks else 1)

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        identity = jnp.eye(self.in_features, dtype=self.twiddle[...].dtype)
        return self._product(identity, precision="highest")
