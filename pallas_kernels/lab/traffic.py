"""Bytes that the windows of TPU kernels carry between HBM and VMEM, counted from their grids.

A window is copied in when its block index differs from that of the step before, and copied out when
it is about to. So the index maps alone, walked over the grid, give what a kernel moves: more than
the bytes that it has to (`Case.hbm_bytes`) where a block is fetched again.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend.core import Literal

from pallas_kernels import compat

_MOST = 2**24  # elements of arrays that are evaluated


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One call of a Pallas kernel.

    Attributes:
      kernel: its name.
      steps: of the grid.
      read, written: bytes of its windows. Copies that a kernel starts itself are not among them.
    """

    kernel: str
    steps: int
    read: int
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written


def traffic(fn: Callable, *args) -> list[Traffic]:
    """What each TPU kernel that `fn(*args)` calls moves, in the order of the calls.

    Args:
      fn: traced as for a TPU.
      args: arrays or trees of them. A `jax.ShapeDtypeStruct` will do where no index map reads the
        values; page tables and lengths, say, have to be there.

    Raises:
      ValueError: an index map depends on values that are not given, or a window is of a kind that
        is not counted here.
    """
    leaves, tree = jax.tree.flatten(args)
    abstract = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in leaves]
    closed = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)))(*abstract)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
    found: list[Traffic] = []
    _walk(closed.jaxpr, [*closed.consts, *known], lambda *call: found.append(_kernel(*call)))
    return found


def prefetched(closed) -> list[tuple[str, list[np.ndarray | None]]]:
    """The arrays that each TPU kernel of a traced program prefetches to scalar memory, by name.

    Args:
      closed: a `ClosedJaxpr`. None stands for an array that depends on the program's arguments.

    Raises:
      ValueError: which kernels run depends on the arguments.
    """
    found = []

    def each(eqn, given):
        count = eqn.params["grid_mapping"].num_index_operands
        arrays = [None if x is None else np.asarray(x) for x in given[:count]]
        found.append((compat.kernel_name(eqn.params), arrays))

    _walk(closed.jaxpr, [*closed.consts, *[None] * len(closed.jaxpr.invars)], each)
    return found


def _walk(jaxpr, values, each: Callable) -> list:
    """Evaluates what depends on known values alone (the others are None); `each` gets the calls."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(v):
        return v.val if isinstance(v, Literal) else env.get(v)

    for eqn in jaxpr.eqns:
        given, name = [read(v) for v in eqn.invars], eqn.primitive.name
        inner, given_inner = _inner(eqn, given)
        if name == "pallas_call":
            each(eqn, given)
            continue
        if name == "platform_index":
            platforms = eqn.params["platforms"]
            here = [i for i, p in enumerate(platforms) if p is None or "tpu" in p]
            outs = [np.int32(here[0])]
        elif inner is not None:
            outs = _walk(inner.jaxpr, [*inner.consts, *given_inner], each)
        elif all(x is not None for x in given) and _small(eqn.outvars):
            outs = eqn.primitive.bind(*given, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        else:
            continue
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _small(variables) -> bool:
    """Whether they could be index operands, or come before them: scalar memory is 1 MB."""
    return all(getattr(v.aval, "size", 0) <= _MOST for v in variables)


def _inner(eqn, given):
    """The program that an equation calls, and its inputs; None where it calls none."""
    if eqn.primitive.name == "cond":
        if given[0] is None:
            raise ValueError("a kernel under lax.cond on a value that is not given is not counted")
        return eqn.params["branches"][int(given[0])], given[1:]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        inner = eqn.params.get(key)
        if hasattr(inner, "consts") and eqn.primitive.name not in ("scan", "pallas_call"):
            return inner, given
    return None, given


def _kernel(eqn, given) -> Traffic:
    mapping, name = eqn.params["grid_mapping"], eqn.params["name"]
    scalars = given[: mapping.num_index_operands]
    steps = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32)
    steps = steps.reshape(-1, len(mapping.grid))
    moved = [sum(_copies(name, block, steps, scalars)) for block in mapping.block_mappings]
    inputs = mapping.num_inputs
    return Traffic(name, len(steps), sum(moved[:inputs]), sum(moved[inputs:]))


def _copies(name: str, block, steps, scalars) -> Iterator[int]:
    """Bytes of each copy of one window."""
    array = block.array_aval
    sizes = [1 if isinstance(b, pl.Squeezed) else getattr(b, "block_size", None)
             for b in block.block_shape]  # fmt: skip
    if not all(isinstance(b, (pl.Squeezed, pl.Blocked)) for b in block.block_shape):
        raise ValueError(f"{name}: windows other than pl.Blocked are not counted")
    if any(x is None for x in scalars) and _reads_scalars(
        block.index_map_jaxpr.jaxpr, len(scalars)
    ):
        raise ValueError(
            f"{name}: an index map reads prefetched scalars whose values are not given; pass "
            "arrays for them, not jax.ShapeDtypeStruct"
        )
    closed = block.index_map_jaxpr

    def index(step):
        outs = _index(closed.jaxpr, [*closed.consts, *step, *scalars])
        return jnp.stack([jnp.asarray(i, jnp.int32) for i in outs])

    indices = np.asarray(jax.jit(jax.vmap(index))(steps))
    fresh = np.concatenate([[True], (indices[1:] != indices[:-1]).any(1)])
    sizes = np.array(sizes)
    inside = np.minimum(sizes, np.array(array.shape) - indices[fresh] * sizes)
    yield from (inside.prod(1) * array.dtype.itemsize).tolist()


def _index(jaxpr, values) -> list:
    """Evaluates an index map; a reference is the array that it holds, or None."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        inner, _ = _inner(eqn, given)
        if eqn.primitive.name == "get":
            (indexer,) = jax.tree.unflatten(eqn.params["tree"], given[1:])
            outs = [jnp.asarray(given[0])[tuple(indexer.indices)]]
        elif inner is not None:
            outs = _index(inner.jaxpr, [*inner.consts, *given])
        else:
            outs = eqn.primitive.bind(*given, **eqn.params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def _reads_scalars(jaxpr, count: int) -> bool:
    refs = set(jaxpr.invars[len(jaxpr.invars) - count :])
    return any(v in refs for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal))
