"""Which implementation of attention runs, on the choice of `pallas_kernels.dispatch`."""

import functools
import importlib

import jax

from pallas_kernels import dispatch
from pallas_kernels.attention import blockwise

# Platform of XLA -> the module that holds its kernels, under the name of `implementation`.
KERNELS = {"tpu": "tpu", "cuda": "gpu"}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(direction, implementation, settings, *arrays):
    """`forward` or `backward` (direction) of an implementation, on its arrays.

    Jitted, so that a call outside of jit is one program and calls alike are traced once.

    Args:
      implementation: "blockwise", "tpu" or "gpu"; None is the platform's kernel where it supports
        these arguments, and blockwise where not, which is said once when the program is lowered.
    """
    call = functools.partial(_call, direction, settings)
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    kernels = {}
    for platform, name in KERNELS.items():
        module = _kernels(name)
        reason = _unsupported(module, name, arrays, settings)
        here = None if module is None else functools.partial(call, module)
        kernels[platform] = dispatch.Kernel(name, here, reason)
    return dispatch.choose("attention", implementation, arrays, on_cpu, elsewhere, kernels)


def _call(direction, settings, module, *arrays, **options):
    found = getattr(module, direction)(*arrays, settings, **options)
    if direction == "backward" and not settings.bias_gradient:
        return (*found[:3], None)  # a kernel for it alone is dropped, being of no use
    return found


@functools.cache
def _kernels(name):
    """The module of a platform's kernels; None where the package has none."""
    path = f"pallas_kernels.attention.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        return None


def _unsupported(module, name, arrays, settings):
    """Why a platform's kernels cannot do this; None where they can."""
    if module is None:
        return f"there is no {name} kernel in this version"
    if dispatch.manual(arrays):
        return "inside shard_map a kernel needs check_vma=False"
    return module.unsupported(*arrays[:7], settings)
