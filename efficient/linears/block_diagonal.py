"""A grouped layer: features in K blocks, each with a dense layer of its own.

    y = P_out(P_in(x) B) + b        B = diag(B_1 ... B_K), B_k [I / K, O / K]

1 / K of a dense layer's parameters and products. Alone it mixes nothing between blocks, so that a
stack of them would be K networks side by side; hence the permutations, by which a block reads
(`permute="inputs"`) or writes (`"outputs"`) every K-th feature instead of neighbours. Two layers,
the second with both, are a Monarch product (`efficient.linears.monarch`). Neither permutation is a
pass over memory on a TPU: `pallas_kernels.block_diagonal_matmul`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError
from efficient.init import ZEROS, FanIn
from efficient.linears.block_sparse import check_divides
from efficient.linears.layout import layout_of
from efficient.registry import register
from efficient.scope import Context, Scope, param
from pallas_kernels.block_diagonal_matmul import Stride, block_diagonal_matmul
from pallas_kernels.epilogue import ACTIVATIONS

_PERMUTE = ("none", "inputs", "outputs", "both")


@register("linear", "block_diagonal")
class BlockDiagonal(nnx.Module):
    """[..., I] -> [..., O] by K dense blocks.

    Args:
      blocks: K; divides inputs and outputs.
      permute: which sides of a block are every K-th feature: "none", "inputs", "outputs", "both".
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
        blocks: int = 4,
        permute: str = "inputs",
        bias: bool | None = None,
    ):
        del scope
        check_divides("block_diagonal", in_features, out_features, "blocks", blocks)
        if permute not in _PERMUTE:
            raise UserError(
                f"block_diagonal: permute={permute!r} is none of {', '.join(map(repr, _PERMUTE))}"
            )
        cols = out_features // blocks
        self.inputs = Stride(blocks) if permute in ("inputs", "both") else None
        self.outputs = Stride(cols) if permute in ("outputs", "both") else None
        self.blocks = param((blocks, in_features // blocks, cols), FanIn())
        use_bias = use_bias if bias is None else bias
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(
        self, x: Float[Array, "*B I"], context: Context, activation: str | None = None
    ) -> Float[Array, "*B O"]:
        dtype = jnp.result_type(x, self.blocks[...])
        return block_diagonal_matmul(
            x.astype(dtype),
            self.blocks[...].astype(dtype),
            bias=None if self.bias is None else self.bias[...].astype(dtype),
            permute_inputs=self.inputs,
            permute_outputs=self.outputs,
            activation=activation,
            sharding=layout_of(x, context),
        )

    def flops(self) -> int:
        """Floating-point operations a token of the blocks."""
        return 2 * math.prod(self.blocks.shape[-3:])

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b."""
        diagonal = jax.scipy.linalg.block_diag(*self.blocks[...])
        if self.outputs is not None:
            diagonal = self.outputs.permute(diagonal)
        return diagonal if self.inputs is None else self.inputs.restore(diagonal.T).T

    def project(self, matrix: Float[Array, "I O"]) -> dict[str, Array]:
        """The parameters whose `materialize` is nearest to `matrix` in Frobenius norm."""
        K, p, q = self.blocks.shape[-3:]
        if self.inputs is not None:
            matrix = self.inputs.permute(matrix.T).T
        if self.outputs is not None:
            matrix = self.outputs.restore(matrix)
        whole = matrix.reshape(K, p, K, q)
        return {"blocks": jnp.stack([whole[k, :, k] for k in range(K)])}
