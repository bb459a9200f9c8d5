"""Products with block-sparse weights of 8 bits, for inference on CPUs.

"An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on CPUs",
Shen et al. 2023, arXiv 2306.16601. Weights [I, O] are pruned in blocks of one size [bi, bo] and
quantized symmetrically with a scale for each output channel; activations are dense:

    w_q = round(W / w_s),  w_s[o] = max |W[:, o]| / 127        blocks that are left, 8 bits
    x_q = round(x / x_s),  x_s[t] = max |x[t, :]| / 127        all features of a token, 8 bits
    y[t, o] = act((x_q w_q)[t, o] x_s[t] w_s[o] + b[o])

The sums x_q w_q are of integers and exact: 32 bits hold 133,144 terms. Every column of blocks keeps
as many as the others, so that shapes are static while the places are data: weights [C, bo, K, bi]
of the columns' K live blocks, and the rows of blocks that they multiply, [C, K].

As in the paper the product is transposed, y^T = w_q^T x_q^T: live features are rows of x_q^T, which
lie in one piece, and are gathered for a column of blocks at a time; dequantizing, bias and
activation are part of that column's turn. The product itself is XLA's of int8 into int32, which the
CPU compiler of jax 0.10.2 was seen to hand to YNNPACK as [bo, K bi] by [K bi, M], and to widen to
int32 first where an operand was to be transposed. The paper's kernel is generated for blocks of 4
outputs by 1 input instead, and gathers features in registers.
`benchmarks/sparse_cpu_inference.py` times this form, with bias and GELU, beside dense products.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int8

from efficient.errors import UserError, check_finite, nearest
from efficient.init import ONES, ZEROS
from efficient.scope import Context, buffer, param

LEVELS = 127
ACTIVATIONS = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def quantized(x: Float[Array, "..."], axis: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """(x_q, scale), x near x_q * scale; one scale along `axis`, which is kept, 1 for zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=axis, keepdims=True) / LEVELS
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(x / scale), -LEVELS, LEVELS).astype(jnp.int8), scale


def live_blocks(
    kernel: Float[Array, "I O"], block: tuple[int, int], live: int
) -> Bool[Array, "R C"]:
    """The `live` blocks of each column of blocks whose entries' sizes sum to most."""
    (bi, bo), (rows, columns) = block, kernel.shape
    size = jnp.abs(kernel.astype(jnp.float32)).reshape(rows // bi, bi, columns // bo, bo)
    order = jnp.argsort(-size.sum(axis=(1, 3)), axis=0, stable=True)
    ranks = jnp.argsort(order, axis=0, stable=True)
    return ranks < live


def entries_of(mask: Bool[Array, "R C"], block: tuple[int, int]) -> Bool[Array, "I O"]:
    """The mask of entries of a mask of blocks."""
    return jnp.repeat(jnp.repeat(mask, block[0], axis=0), block[1], axis=1)


def pack(
    kernel: Float[Array, "I O"], mask: Bool[Array, "R C"], block: tuple[int, int]
) -> tuple[Int8[Array, "C q K p"], Int[Array, "C K"], Float[Array, " O"]]:
    """(live blocks, their rows in ascending order, scales of the output channels).

    Raises:
      UserError: the mask is not one of blocks of the kernel, its columns have unequal numbers of
        live blocks, or the kernel has values that are not finite.
    """
    (bi, bo), (rows, columns) = block, mask.shape
    live = _live_of_columns(kernel, mask, block)
    check_finite("sparse_int8: the kernel", kernel)
    levels, scale = quantized(kernel * entries_of(mask, block), axis=0)
    levels = levels.reshape(rows, bi, columns, bo).transpose(2, 0, 1, 3)
    places = jnp.argsort(~mask.T, axis=1, stable=True)[:, :live].astype(jnp.int32)
    blocks = levels[jnp.arange(columns)[:, None], places]
    return blocks.transpose(0, 3, 1, 2), places, scale[0]


def _live_of_columns(
    kernel: Float[Array, "I O"], mask: Bool[Array, "R C"], block: tuple[int, int]
) -> int:
    """How many live blocks each column of blocks has; the mask is checked."""
    if tuple(rows * part for rows, part in zip(mask.shape, block, strict=True)) != kernel.shape:
        grid = " x ".join(
            f"{size / part:g}" for size, part in zip(kernel.shape, block, strict=True)
        )
        raise UserError(
            f"sparse_int8: a mask {list(mask.shape)} of blocks {list(block)} does not cover a"
            f" kernel {list(kernel.shape)}, which has {grid} of them; make it by live_blocks"
        )
    counts = np.asarray(mask.sum(axis=0))
    if counts.min() != counts.max():
        raise UserError(
            f"sparse_int8: the mask's columns have from {counts.min()} to {counts.max()} live"
            " blocks, but must have equally many; make it by live_blocks"
        )
    return int(counts[0])


def unpack(
    blocks: Int8[Array, "C q K p"], places: Int[Array, "C K"], rows: int
) -> Int8[Array, "I O"]:
    """The matrix of 8-bit entries."""
    columns, bo, _, bi = blocks.shape
    whole = jnp.zeros((columns, rows, bi, bo), blocks.dtype)
    whole = whole.at[jnp.arange(columns)[:, None], places].set(blocks.transpose(0, 2, 3, 1))
    return whole.transpose(1, 2, 0, 3).reshape(rows * bi, columns * bo)


def integer_columns(
    x: Int8[Array, "M I"],
    blocks: Int8[Array, "C q K p"],
    places: Int[Array, "C K"],
    epilogue: Callable[[Int[Array, ""], Int[Array, "q M"]], Array],
) -> Array:
    """epilogue(c, sums) of each column c, [C, q, M]; sums are those of its outputs, transposed."""
    columns, bo, _, bi = blocks.shape
    features, weights = x.T.reshape(-1, bi, x.shape[0]), blocks.reshape(columns, bo, -1)

    def column(c):
        read = features[places[c]].reshape(-1, x.shape[0])
        return epilogue(c, jnp.matmul(weights[c], read, preferred_element_type=jnp.int32))

    return jax.lax.map(column, jnp.arange(columns))


def sparse_int8_matmul(
    x: Float[Array, "*B I"],
    blocks: Int8[Array, "C q K p"],
    places: Int[Array, "C K"],
    scale: Float[Array, " O"],
    bias: Float[Array, " O"] | None = None,
    activation: str | None = None,
) -> Float[Array, "*B O"]:
    """act(x W + b) with 8-bit activations and live 8-bit weights, in x's dtype."""
    if activation not in ACTIVATIONS:
        hint = nearest(str(activation), filter(None, ACTIVATIONS))
        raise UserError(f"sparse_int8: unknown activation {activation!r}; {hint}")
    columns, bo, _, _ = blocks.shape
    levels, of_token = quantized(x.reshape(-1, x.shape[-1]), axis=-1)
    scale = scale.reshape(columns, bo, 1)
    shift = (
        jnp.zeros(scale.shape) if bias is None else bias.astype(jnp.float32).reshape(scale.shape)
    )

    def epilogue(c, total):
        y = total.astype(jnp.float32) * of_token[:, 0] * scale[c] + shift[c]
        return ACTIVATIONS[activation](y).astype(x.dtype)

    y = integer_columns(levels, blocks, places, epilogue)
    return y.reshape(columns * bo, -1).T.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def straight_through(activation, x, blocks, places, scale, bias):
    """`sparse_int8_matmul`, with the gradient in x and bias of the dequantized matrix' product."""
    return sparse_int8_matmul(x, blocks, places, scale, bias, activation)


def _forward(activation, x, *parts):
    return straight_through(activation, x, *parts), (x, parts)


def _backward(activation, residuals, dy):
    x, (blocks, places, scale, bias) = residuals
    wide = dy.astype(jnp.float32)
    if activation is not None:
        y = sparse_int8_matmul(x, blocks, places, scale, bias).astype(jnp.float32)
        (wide,) = jax.vjp(ACTIVATIONS[activation], y)[1](wide)
        dy = wide.astype(dy.dtype)
    matrix = unpack(blocks, places, x.shape[-1] // blocks.shape[-1]) * scale
    d_bias = None if bias is None else wide.sum(range(dy.ndim - 1)).astype(bias.dtype)
    return dy @ matrix.T.astype(dy.dtype), None, None, None, d_bias


straight_through.defvjp(_forward, _backward)


class SparseInt8(nnx.Module):
    """[..., I] -> [..., O] by live 8-bit blocks, which stay as they are; biases can be trained.

    Bias and activation are part of the product.
    """

    fuses = tuple(name for name in ACTIVATIONS if name)

    def __init__(
        self, in_features: int, out_features: int, use_bias: bool, block: tuple[int, int], live: int
    ):
        (bi, bo), columns = block, out_features // block[1]
        self.in_features, self.block = in_features, block
        self.blocks = buffer((columns, bo, live, bi), ZEROS, jnp.int8)
        self.places = buffer((columns, live), ZEROS, jnp.int32)
        self.scale = buffer((out_features,), ONES)
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(
        self, x: Float[Array, "*B I"], context: Context, activation: str | None = None
    ) -> Float[Array, "*B O"]:
        del context
        arrays = (self.blocks[...], self.places[...], self.scale[...])
        bias = None if self.bias is None else self.bias[...]
        return straight_through(activation, x, *arrays, bias)

    def flops(self) -> int:
        """Floating-point operations a token of the live blocks."""
        return 2 * int(np.prod(self.blocks.shape[-4:]))

    def materialize(self) -> Float[Array, "I O"]:
        """The dequantized matrix."""
        rows = self.in_features // self.blocks.shape[-1]
        return unpack(self.blocks[...], self.places[...], rows) * self.scale[...]
