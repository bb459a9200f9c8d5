"""Weights of 4 bits, two a byte, quantized in groups of input rows that need not be neighbours.

The form in which GPTQ's weights are kept (Frantar et al. 2022, arXiv 2210.17323), quantized here by
rounding to nearest. For W [I, O], an order of its rows by falling importance ("act order") and
groups of g rows along that order:

    g_idx[order[i]] = floor(i / g)                  the group of a row, I / g = G groups
    s = (max(W, 0) - min(W, 0)) / 15                of the rows of a group, for each output
    z = round(-min(W, 0) / s)
    q = clip(round(W / s) + z, 0, 15)               W is near (q - z) s, within s / 2

Rows in their own place look up their group's s and z all over the table. Sorted by group,

    P = argsort(g_idx)        q[P], g_idx[P] = 0 ... 0 1 ... 1 ...        x W = x[:, P] W[P, :]

each entry of the table is read in one run, and inputs are permuted instead. Bytes hold rows 2j (the
low half) and 2j + 1 of the sorted matrix, so that a split of bytes along rows is one of rows.

The product is XLA's, of the matrix dequantized in float32 and rounded to the dtype of x.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from efficient.errors import UserError
from efficient.init import ONES, ZEROS
from efficient.linears.matmul import dense
from efficient.scope import Context, buffer, param

LARGEST = 15


class Quantized(NamedTuple):
    """A matrix [I, O] of 4 bits whose rows are sorted by group, and its bias.

    Attributes:
      packed: [I / 2, O] bytes, rows 2j and 2j + 1 in the low and high half of the j-th.
      scales: [G, O].
      zeros: [G, O] levels from 0 to 15.
      order: [I], P: the input features in the order of the packed rows.
      bias: [O] or None.
    """

    packed: UInt8[Array, "J O"]
    scales: Float[Array, "G O"]
    zeros: UInt8[Array, "G O"]
    order: Int[Array, " I"]
    bias: Float[Array, " O"] | None = None


def check_groups(what: str, inputs: int, group_size: int) -> None:
    """Refuses inputs that groups do not divide, and an odd number of them.

    Raises:
      UserError: says which matrix, and what to change.
    """
    if inputs % 2:
        raise UserError(
            f"{what} has {inputs} inputs, and a byte holds two; make its input width even"
        )
    if group_size < 1 or inputs % group_size:
        fits = [n for n in range(1, inputs + 1) if inputs % n == 0]
        best = min(fits, key=lambda n: abs(n - group_size))
        raise UserError(
            f"group_size={group_size} does not divide the {inputs} inputs of {what}; the nearest"
            f" that does is {best}"
        )


def pack(levels: UInt8[Array, "I O"]) -> UInt8[Array, "J O"]:
    """Levels from 0 to 15, two rows a byte; I is even, J = I / 2."""
    return levels[0::2] | (levels[1::2] << 4)


def unpack(packed: UInt8[Array, "J O"]) -> UInt8[Array, "I O"]:
    """The levels of `pack`, I = 2 J."""
    both = jnp.stack([packed & LARGEST, packed >> 4], axis=1)
    return both.reshape(-1, packed.shape[1])


def act_order(importance: Float[Array, " I"]) -> Int[Array, " I"]:
    """Rows by falling importance; equal ones as they lie."""
    return jnp.argsort(-importance, stable=True)


def group_index(order: Int[Array, " I"], group_size: int) -> Int[Array, " I"]:
    """The group of each row, where groups are formed along `order`."""
    return jnp.argsort(order) // group_size


def rounded(
    kernel: Float[Array, "I O"], group_size: int
) -> tuple[UInt8[Array, "I O"], Float[Array, "G O"], UInt8[Array, "G O"]]:
    """(levels, scales, zeros) of groups of neighbouring rows."""
    groups = kernel.astype(jnp.float32).reshape(-1, group_size, kernel.shape[1])
    low = jnp.minimum(groups.min(axis=1), 0)
    scales = (jnp.maximum(groups.max(axis=1), 0) - low) / LARGEST
    scales = jnp.where(scales > 0, scales, 1.0)
    zeros = jnp.round(-low / scales)
    levels = jnp.round(groups / scales[:, None]) + zeros[:, None]
    levels = jnp.clip(levels, 0, LARGEST).astype(jnp.uint8)
    return levels.reshape(kernel.shape), scales, zeros.astype(jnp.uint8)


def quantize(
    kernel: Float[Array, "I O"],
    group_size: int,
    order: Int[Array, " I"] | None = None,
    bias: Float[Array, " O"] | None = None,
) -> Quantized:
    """The matrix of 4 bits.

    Args:
      order: rows by falling importance; None for that of the norms of the kernel's rows.
    """
    check_groups("the kernel", kernel.shape[0], group_size)
    if order is None:
        order = act_order(jnp.linalg.norm(kernel.astype(jnp.float32), axis=1))
    by_group = jnp.argsort(group_index(order, group_size), stable=True).astype(jnp.int32)
    levels, scales, zeros = rounded(kernel[by_group], group_size)
    return Quantized(pack(levels), scales, zeros, by_group, bias)


def dequantize(
    packed: UInt8[Array, "J O"],
    scales: Float[Array, "G O"],
    zeros: UInt8[Array, "G O"],
    groups: Int[Array, " I"] | None = None,
) -> Float[Array, "I O"]:
    """(q - z) s in float32.

    Args:
      groups: the group of each row, which is looked up; None where rows are sorted by group.
    """
    levels = unpack(packed)
    size = len(levels) // len(scales)

    def of_rows(table):
        table = table.astype(jnp.float32)
        return jnp.repeat(table, size, axis=0) if groups is None else table[groups]

    return (levels.astype(jnp.float32) - of_rows(zeros)) * of_rows(scales)


def permute_outputs(weights: Quantized, order: Int[Array, " O"]) -> Quantized:
    """The matrix whose products are `y[..., order]`; no level changes."""
    columns = (a[:, order] for a in weights[:3])
    bias = None if weights.bias is None else weights.bias[order]
    return Quantized(*columns, weights.order, bias)


def product(
    x: Float[Array, "*B I"],
    packed: UInt8[Array, "J O"],
    scales: Float[Array, "G O"],
    zeros: UInt8[Array, "G O"],
    bias: Float[Array, " O"] | None = None,
) -> Float[Array, "*B O"]:
    """x W + b in the dtype of x, whose features are in the order of the packed rows."""
    return dense(x, dequantize(packed, scales, zeros).astype(x.dtype), bias)


class Int4(nnx.Module):
    """[..., I] -> [..., O] by weights of 4 bits, which stay as they are; biases can be trained.

    Args:
      permutes: whether inputs are put in the order of the rows here; otherwise they come so.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool,
        group_size: int,
        permutes: bool = True,
    ):
        table = in_features // group_size, out_features
        self.packed = buffer((in_features // 2, out_features), ZEROS, jnp.uint8)
        self.scales = buffer(table, ONES)
        self.zeros = buffer(table, ZEROS, jnp.uint8)
        self.order = buffer((in_features,), ZEROS, jnp.int32) if permutes else None
        self.bias = param((out_features,), ZEROS) if use_bias else None

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        if self.order is not None:
            x = jnp.take(x, self.order[...], axis=-1)
        bias = None if self.bias is None else self.bias[...]
        return product(x, self.packed[...], self.scales[...], self.zeros[...], bias)

    def flops(self) -> int:
        """Floating-point operations a token of the product, dequantizing left out."""
        rows, columns = self.packed.shape[-2:]
        return 4 * rows * columns

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix W such that y = x W + b, of inputs as they come."""
        kernel = dequantize(self.packed[...], self.scales[...], self.zeros[...])
        return kernel if self.order is None else kernel[jnp.argsort(self.order[...])]
