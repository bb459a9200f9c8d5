"""Which implementation runs: decided when the program is lowered, by the platform it is for."""

import functools
import importlib
import warnings

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.attention import blockwise

# Platform of XLA -> the module that holds its kernels, under the name of `implementation`.
KERNELS = {"tpu": "tpu", "cuda": "gpu"}
# Taken without being asked for. Those for GPUs have been compiled and interpreted, but never run.
BY_DEFAULT = ("tpu",)
_WARNED = set()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(direction, implementation, settings, *arrays):
    """`forward` or `backward` (direction) of an implementation, on its arrays.

    Jitted, so that a call outside of jit is one program and calls alike are traced once.

    Args:
      implementation: "blockwise", "tpu" or "gpu"; None is the platform's kernel, of `BY_DEFAULT`,
        where it supports these arguments, and blockwise where not, which is said once when the
        program is lowered.
    """
    call = functools.partial(_call, direction, settings)
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    if implementation == "blockwise":
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)
    branches = {}
    for platform, name in KERNELS.items():
        if name not in (implementation, *BY_DEFAULT):
            continue
        module = _kernels(name)
        reason = _unsupported(module, name, arrays, settings)
        if reason is None:
            branches[platform] = functools.partial(call, module)
        elif implementation == name:
            raise ValueError(f"attention: implementation={name!r} cannot do this: {reason}")
        elif module is not None:
            message = f"attention: not the {name} kernel but blockwise: {reason}"
            branches[platform] = _saying(elsewhere, message, fatal=False)
    if implementation is None:
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere, **branches)
    here = next(platform for platform, name in KERNELS.items() if name == implementation)
    message = (
        f"attention: implementation={implementation!r} needs a {implementation.upper()}; "
        "accepted elsewhere: None, 'blockwise', 'reference'"
    )
    refuse = _saying(on_cpu, message, fatal=True)
    return jax.lax.platform_dependent(*arrays, default=refuse, **{here: branches[here]})


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
    if any(blockwise.varying_axes(x) for x in jax.tree.leaves(arrays)):
        return "inside shard_map a kernel needs check_vma=False"
    return module.unsupported(*arrays[:7], settings)


def _saying(function, message, fatal):
    """function, which warns (or fails) when it is lowered: a branch not taken never is."""

    def saying(q, *rest):
        return function(_say.bind(q, message=message, fatal=fatal), *rest)

    return saying


_say = Primitive("attention_says")
_say.def_abstract_eval(lambda x, **_: x)
_say.def_impl(lambda x, message, fatal: _lowered(None, x, message=message, fatal=fatal))
batching.defvectorized(_say)
ad.deflinear2(_say, lambda cotangent, _, **params: [cotangent])


def _lowered(_, x, *, message, fatal):
    if fatal:
        raise ValueError(message)
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=2)
    return [x]


mlir.register_lowering(_say, _lowered)
