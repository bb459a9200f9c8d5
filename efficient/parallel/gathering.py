"""Parameters that are split over the axes of the batch, gathered a block at a time.

Left to itself the compiler gathers a weight for each product that reads it. With `model.remat`
that is up to three times a step, of which two would do, and for large batches it is no gather but
a ring of permutes, each beside a part of the product. And the gradient of a weight that lies over
fsdp and data together is an all-reduce of which most is thrown away, twice the bytes of a
reduce-scatter. Under `config.scopes.gather = "block"` a block's parameters are gathered when the
block begins, forward and again backward, and each gradient is summed into its layout at once,
within and between groups one after the other. The traffic is then that of `parallel.scope_costs`,
at the price of one block's parameters held whole: for six Llama blocks on sixteen v5e chips a
device sends 161 MB a step in place of 191 MB under ZeRO 3, and 151 MB in place of 160 MB under
MiCS (`tests/papers/test_amsp.py`; compiled, not run).
"""

import functools
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.parallel.placement import Placement
from pallas_kernels.mesh import constrain

Layouts = tuple[NamedSharding, ...]


def bind_gathered(
    stacked: nnx.Module,
    parameters: Mapping[str, Array],
    buffers: Mapping[str, Array],
    placement: Placement,
    gradients: str,
) -> nnx.Module:
    """A bound copy of the model: blocks gather theirs when they begin, the rest is gathered now.

    Args:
      gradients: the scope to which the derivatives are summed.
    """
    stacks = {p: m for p, m in model_lib.modules(stacked) if isinstance(m, model_lib.Stack)}
    of_stacks = tuple(f"{path}/" for path in stacks)

    def gather(path, array):
        if path.startswith(of_stacks):
            return array
        return _gathered(_layouts(placement, path, array.shape, gradients), array)

    whole = {path: gather(path, array) for path, array in parameters.items()}
    model = model_lib.bind(stacked, whole | buffers)
    for name, variable in model_lib.walk(model):
        if name in parameters and name.startswith(of_stacks):
            single = model_lib.layers_of(name)[0]
            shape = variable.shape[single != name :]
            layouts = _layouts(placement, single, shape, gradients)
            hook = functools.partial(_when_set, layouts, len(shape))
            variable.set_metadata("on_set_value", hook)
    return model


def check_gathering(model: nnx.Module, placement: Placement) -> None:
    """Refuses what cannot gather a block at a time."""
    scopes = placement.scopes
    if scopes.gather != "block" or placement.mesh.size == 1:
        return
    if placement.mesh.shape["pipeline"] > 1:
        raise UserError("config.scopes.gather='block' and mesh.pipeline do not go together")
    for path, stack in model_lib.modules(model):
        keeps = isinstance(stack, model_lib.Stack) and stack.remat == "none"
        if keeps and scopes.parameters != "replicated":
            raise UserError(
                f"config.scopes.gather='block': {path!r} would keep every block's gathered"
                " parameters for its backward pass; set config.model.remat or gather='compiler'"
            )


def _layouts(placement: Placement, path: str, shape: tuple[int, ...], gradients: str):
    """Those through which a parameter is gathered, and those through which its gradient comes."""
    way = placement.route(path, shape, placement.scopes.parameters, "replicated")
    forward = (*way[:-1], placement.gathered(path, shape))
    return forward, placement.route(path, shape, "replicated", gradients)


def _when_set(layouts: tuple[Layouts, Layouts], ndim: int, variable: nnx.Variable, value: Array):
    """Gathers one layer's value, once: what is bound within the block is whole already."""
    if value.ndim != ndim:
        return value
    variable.set_metadata("on_set_value", ())
    return _gathered(layouts, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(layouts, x):
    """x brought through the first layouts, its derivative through the second."""
    return brought(x, layouts[0])


_gathered.defvjp(
    lambda layouts, x: (_gathered(layouts, x), None),
    lambda layouts, _, dx: (brought(dx, layouts[1]),),
)


def brought(x: Array, layouts: Layouts) -> Array:
    """x in the last of the layouts, by way of the others."""
    for layout in layouts:
        x = constrain(x, layout)
    return x
