"""Which implementation of an op runs: decided when the program is lowered, by its platform."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

WARNED: set[str] = set()


class Kernel(NamedTuple):
    """A platform's kernel for the arrays of one call.

    Attributes:
      name: the `implementation` that asks for it.
      call: a function of the arrays; None where this version has no such kernel.
      reason: why it cannot do this; None where it can.
    """

    name: str
    call: Callable | None
    reason: str | None


def choose(
    op: str,
    implementation: str | None,
    arrays: Sequence[Any],
    on_cpu: Callable,
    elsewhere: Callable,
    kernels: Mapping[str, Kernel],
) -> Any:
    """The result of an implementation on `arrays`.

    Args:
      op: its name, for messages.
      implementation: "blockwise"; the name of a kernel; or None, the platform's kernel where it
        can do this, and blockwise where not, which is said once when the program is lowered.
      on_cpu, elsewhere: the blockwise form, on CPUs and on accelerators.
      kernels: platform of XLA ("tpu", "cuda") -> its kernel, if it may be taken.

    Raises:
      ValueError: a kernel asked for by name cannot do this or, when lowered, is for another
        platform.
    """
    if implementation == "blockwise":
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)
    branches = {}
    for platform, (name, call, reason) in kernels.items():
        if reason is None:
            branches[platform] = _first_order(_in_32_bits(call), elsewhere)
        elif implementation == name:
            raise ValueError(f"{op}: implementation={name!r} cannot do this: {reason}")
        elif call is not None:
            message = f"{op}: not the {name} kernel but blockwise: {reason}"
            branches[platform] = _saying(elsewhere, message, fatal=False)
    if implementation is None:
        return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere, **branches)
    here = next(platform for platform, kernel in kernels.items() if kernel.name == implementation)
    message = (
        f"{op}: implementation={implementation!r} needs a {implementation.upper()}; "
        "accepted elsewhere: None, 'blockwise', 'reference'"
    )
    refuse = _saying(on_cpu, message, fatal=True)
    return jax.lax.platform_dependent(*arrays, default=refuse, **{here: branches[here]})


def manual(arrays: Any) -> bool:
    """Whether an array varies by device in a shard_map with check_vma=True, as no kernel may."""
    return any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))


def by_example(call: Callable, rows: bool = False) -> Callable:
    """`call`, which `jax.vmap` runs once for each example: for kernels that cannot be batched.

    rows: a batch of the first array alone is one more axis of rows, done at once.
    """
    found = jax.custom_batching.custom_vmap(call)

    @found.def_vmap
    def _(size, batched, *arrays):
        if rows and batched[0] and not any(jax.tree.leaves(batched[1:])):
            y = found(*arrays)
        else:
            leaves, tree = jax.tree.flatten(arrays)
            flags = jax.tree.leaves(batched)
            moving = [a for a, flag in zip(leaves, flags, strict=True) if flag]

            def one(moving):
                moving = iter(moving)
                pairs = zip(leaves, flags, strict=True)
                return found(*tree.unflatten([next(moving) if f else a for a, f in pairs]))

            y = jax.lax.map(one, moving)
        return y, jax.tree.map(lambda _: True, y)

    return found


def _first_order(call, blockwise):
    """`call`, whose own derivatives are those of the blockwise form: a kernel has none."""
    found = jax.custom_jvp(call)
    found.defjvp(lambda primals, tangents: jax.jvp(blockwise, primals, tangents))
    return found


def _in_32_bits(call):
    """`call`, traced as without `jax_enable_x64`: no kernel has numbers of 64 bits."""

    def narrow(*arrays):
        with jax.enable_x64(False):
            return call(*arrays)

    return narrow


def _saying(function, message, fatal):
    """function, which warns (or fails) when it is lowered: a branch not taken never is."""

    def saying(q, *rest):
        return function(_say.bind(q, message=message, fatal=fatal), *rest)

    return saying


_say = Primitive("kernel_says")
_say.def_abstract_eval(lambda x, **_: x)
_say.def_impl(lambda x, message, fatal: _lowered(None, x, message=message, fatal=fatal))
batching.defvectorized(_say)
ad.deflinear2(_say, lambda cotangent, _, **params: [cotangent])


def _lowered(_, x, *, message, fatal):
    if fatal:
        raise ValueError(message)
    if message not in WARNED:
        WARNED.add(message)
        warnings.warn(message, stacklevel=2)
    return [x]


mlir.register_lowering(_say, _lowered)
