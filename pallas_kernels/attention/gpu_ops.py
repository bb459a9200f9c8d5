"""Products and layouts of the Hopper kernels, on the chip and in JAX's interpreter of it.

The Mosaic GPU interpreter of JAX 0.10 runs copies, barriers, warpgroups and the grid, but knows no
layouts and no wgmma whose operand is transposed, lies in registers, or whose accumulator has a
value already. There `Machine` multiplies what it reads from shared memory in float32, so that the
interpreter checks everything about a kernel except these instructions, which compiling it does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA  # of [64 n, columns], a warpgroup's share of a product
OF_ROWS, OF_COLUMNS = TILE.reduce(1), TILE.reduce(0)  # of [64 n] and of [columns]
LOG2_E = 1.4426950408889634
# A running maximum to start from: less than any score, and finite, so that a row without a key
# gives zeros and no NaN.
LEAST = -1e38


@dataclasses.dataclass(frozen=True)
class Machine:
    """The chip, or the interpreter.

    interpreted: whether the kernel is going to be interpreted.
    """

    interpreted: bool

    def place(self, x, layout):
        """x in a layout of registers."""
        return x if self.interpreted else plgpu.layout_cast(x, layout)

    def full(self, shape, value, layout=TILE):
        return self.place(jnp.full(shape, value, jnp.float32), layout)

    def read(self, ref, layout):
        """What is in shared memory."""
        return self.place(ref[...], layout)

    def positions(self, shape, axis, first):
        """int32 of `shape`: first, first + 1, ... along an axis."""
        return self.place(jax.lax.broadcasted_iota(jnp.int32, shape, axis), TILE) + first

    def transposed_product(self, a, b, meanwhile=None):
        """a b^T in float32, of a [m, H] and b [n, H] in shared memory.

        meanwhile: called between the start of the product and the wait for it.
        """
        meanwhile = meanwhile or (lambda: None)
        if self.interpreted:
            meanwhile()
            return jnp.dot(_wide(a[...]), _wide(b[...]).T, precision="highest")

        def multiply(result):
            plgpu.wgmma(result, a, plgpu.transpose_ref(b, (1, 0)))
            meanwhile()
            return result[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_product(self, total, a, b):
        """total + a b, of a [m, n] in registers and b [n, H] in shared memory."""
        if self.interpreted:
            return total + jnp.dot(_wide(a), _wide(b[...]), precision="highest")
        return pl.run_state(lambda result: plgpu.wgmma(result, a, b))(plgpu.ACC.init(total))


def along_rows(x, shape):
    """x [m] repeated along the rows of [m, n]."""
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x, shape):
    """x [n] repeated along the columns of [m, n]."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


def shared(shape, dtype):
    """Shared memory for operands of wgmma: [..., rows, H], tiled and swizzled."""
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _wide(x):
    return x.astype(jnp.float32)
