"""Monarch products whose features are split over devices: what tensor parallelism is here.

    outputs split    x, right by their blocks;  left by its outputs: one all-gather of z
    inputs split     x, right by their blocks;  left by its rows:    one all-reduce of y

In both a device multiplies its own blocks of x by its own blocks of `right`, whose results are a
contiguous part of z. With split inputs that part is whole rows of every block of `left`: a smaller
Monarch product, by the same kernel, and the sum of all is y. With split outputs z is gathered and
each device makes its columns of every block, a contiguous part of y. The backward passes have one
reduce-scatter of dz and none over the split axis. No device needs a feature that another one's
permutation has moved away: there is no all-to-all.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import mesh as mesh_lib
from pallas_kernels.block_diagonal_matmul import Stride, block_diagonal_matmul


class Split(NamedTuple):
    """How one product lies on the mesh (static).

    Attributes:
      mesh: of all devices.
      lead: mesh axes of each leading axis of x.
      inputs, outputs: mesh axes that split the features of x, or of y; one of them is None.
    """

    mesh: Mesh
    lead: tuple
    inputs: str | tuple[str, ...] | None
    outputs: str | tuple[str, ...] | None

    @property
    def axes(self) -> tuple[str, ...]:
        return _names(self.inputs or self.outputs)

    @property
    def ways(self) -> int:
        return mesh_lib.size(self.mesh, self.axes)

    @property
    def specs(self) -> tuple[P, P, P, P]:
        """Of x, right, left and y."""
        axes = self.axes
        of_left = P(None, axes, None) if self.inputs else P(None, None, axes)
        return P(*self.lead, axes), P(axes), of_left, P(*self.lead, self.outputs)

    @property
    def sums(self) -> tuple[str, ...]:
        """Axes over which gradients of weights are summed: those of the rows."""
        return tuple(axis for entry in self.lead for axis in _names(entry))


def misfit(split: Split, right: jax.Array, left: jax.Array) -> str | None:
    """Why the factors cannot be split so, and which sizes could; None where they can."""
    for axis in split.axes:
        if axis not in split.mesh.shape or axis in split.sums:
            why = "splits rows" if axis in split.sums else "is none of the mesh"
            return (
                f"axis {axis!r}, which is to split features, {why}; axes of the mesh: "
                f"{', '.join(split.mesh.shape)}"
            )
    if AxisType.Explicit in split.mesh.axis_types:
        return "features are split on meshes whose axes are of type Auto, not Explicit"
    (blocks, _, _), (_, rows, columns) = right.shape, left.shape
    sizes = {"K, blocks of right,": blocks}
    if split.inputs:
        sizes["r, rows of a block of left,"] = rows
    else:
        sizes["s, columns of a block of left,"] = columns
    for name, size in sizes.items():
        if size % split.ways:
            over = " and ".join(split.axes)
            return f"{name} {size} must be a multiple of the {split.ways} devices of {over}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def split_matmul(split: Split, run, x, right, left):
    """x W on the mesh, without bias; differentiable.

    Sums over devices are of results that are rounded to x's dtype.

    Args:
      split: one of inputs and outputs.
      run: ("forward", x, right, left, None) and ("backward", x, right, left, dy) of the whole
        product on the arrays of one device, by `run.implementation`.
    """
    return _forward(split, run, x, right, left)[0]


def _forward(split, run, x, right, left):
    of_x, of_right, of_left, of_y = split.specs
    if split.inputs:

        def whole(x, right, left):
            return jax.lax.psum(run("forward", x, right, left, None), split.axes)

        y = _on(split, whole, (of_x, of_right, of_left), of_y)(x, right, left)
        return y, (x, right, left, None)

    def columns(x, right, left):
        z = _first(run, x, right)
        z = jax.lax.all_gather(z, split.axes, axis=z.ndim - 1, tiled=True)
        return _second(run, z, left), z

    of_z = P(*split.lead, None)
    y, z = _on(split, columns, (of_x, of_right, of_left), (of_y, of_z))(x, right, left)
    return y, (x, right, left, z)


def _backward(split, run, residuals, dy):
    x, right, left, z = residuals
    of_x, of_right, of_left, of_y = split.specs

    def summed(*weights):
        return jax.lax.psum(weights, split.sums) if split.sums else weights

    if split.inputs:

        def whole(x, right, left, dy):
            dx, *dweights = run("backward", x, right, left, dy)
            dright, dleft = summed(*dweights)
            return dx, dright.astype(right.dtype), dleft.astype(left.dtype)

        specs = (of_x, of_right, of_left, of_y)
        return _on(split, whole, specs, specs[:3])(x, right, left, dy)

    def columns(x, right, left, z, dy):
        dz, dleft = jax.vjp(functools.partial(_second, run), z, left)[1](dy)
        dz = jax.lax.psum_scatter(dz, split.axes, scatter_dimension=dz.ndim - 1, tiled=True)
        dx, dright = jax.vjp(functools.partial(_first, run), x, right)[1](dz)
        return dx, *summed(dright, dleft)

    specs = (of_x, of_right, of_left, P(*split.lead, None), of_y)
    return _on(split, columns, specs, specs[:3])(x, right, left, z, dy)


split_matmul.defvjp(_forward, _backward)


def _on(split, compute, in_specs, out_specs):
    return mesh_lib.shard_map(compute, split.mesh, in_specs, out_specs)


def _names(axes) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _first(run, x, right):
    """z of x, block by block."""
    how = {"precision": run.precision, "implementation": run.implementation}
    return block_diagonal_matmul(x, right, **how)


def _second(run, z, left):
    """y of z: block l takes every L-th feature, and its outputs come back interleaved."""
    blocks, _, columns = left.shape
    return block_diagonal_matmul(
        z,
        left,
        permute_inputs=Stride(blocks),
        permute_outputs=Stride(columns),
        precision=run.precision,
        implementation=run.implementation,
    )
