"""Counts the matrix FLOPs of a traced function, exactly, before any compiler has seen it.

A multiply and an add are two FLOPs. Counted are `dot_general`, ragged dots, convolutions and Pallas
kernels; elementwise work, reductions, sorts and FFTs are not, which is the custom of MFU
(PaLM, arXiv 2204.02311, appendix B). Loops are multiplied by their length, `shard_map` bodies by
the number of shards, and what `jax.checkpoint` computes again is counted and told apart.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
from jax.interpreters import partial_eval

# jax tags the operations that `jax.checkpoint` replays in the backward pass with this name.
_REPLAYED = "rematted_computation"


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Matrix FLOPs of one call, over all devices.

    Attributes:
      total: everything executed.
      recomputed: the part of `total` that `jax.checkpoint` computes a second time.
      kernels: the part of `total` inside Pallas kernels, where XLA cannot count.
      notes: what could not be known, one sentence each; empty when the count is exact.
      asked: FLOPs the mathematics asks for where they are known otherwise.
    """

    total: int
    recomputed: int
    kernels: int
    notes: tuple[str, ...] = ()
    asked: int | None = None

    @property
    def model(self) -> int:
        """FLOPs the mathematics asks for: `total` without recomputation (the F of MFU)."""
        return self.total - self.recomputed if self.asked is None else self.asked


def count_flops(fn: Callable, *abstract_args, platform: str | None = None) -> int:
    """Matrix FLOPs of `fn(*abstract_args)` as executed, recomputation included.

    Only traces: cheap, and the same on every machine. For model FLOPs without recomputation use
    `flop_count(...).model`.

    Args:
      fn: a function, jitted or not.
      *abstract_args: pytrees of arrays or `jax.ShapeDtypeStruct`.
      platform: whose branch of `jax.lax.platform_dependent` to count ('tpu', 'cuda', 'cpu');
        None takes the default branch.
    """
    return flop_count(fn, *abstract_args, platform=platform).total


def flop_count(fn: Callable, *abstract_args, platform: str | None = None) -> FlopCount:
    """Like `count_flops`, with recomputation, kernels and doubts told apart."""
    return jaxpr_flops(jax.make_jaxpr(fn)(*abstract_args), platform=platform)


def jaxpr_flops(closed_jaxpr, platform: str | None = None) -> FlopCount:
    """Counts a `ClosedJaxpr`, such as `jitted.trace(*args).jaxpr`."""
    jaxpr = closed_jaxpr.jaxpr
    # XLA removes dead code, so what no output needs is not executed.
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counter = _Counter(platform)
    total, recomputed, kernels = counter.jaxpr(live, replayed=False)
    return FlopCount(total, recomputed, kernels, tuple(sorted(counter.notes)))


class _Counter:
    """Walks a jaxpr; each method returns (total, recomputed, kernels)."""

    def __init__(self, platform: str | None):
        self.platform = platform
        self.notes: set[str] = set()

    def jaxpr(self, jaxpr, replayed: bool) -> tuple[int, int, int]:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        return _sum(self.equation(eqn, replayed) for eqn in jaxpr.eqns)

    def equation(self, eqn, replayed: bool) -> tuple[int, int, int]:
        replayed = replayed or _REPLAYED in str(eqn.source_info.name_stack)
        name, params = eqn.primitive.name, eqn.params
        if name in _MATRIX_OPS:
            flops = _MATRIX_OPS[name](eqn)
            return flops, flops if replayed else 0, 0
        if name == "pallas_call":
            return self.kernel(params, replayed)
        if name == "scan":
            return _times(params["length"], self.jaxpr(params["jaxpr"], replayed))
        if name == "while":
            return self.while_loop(params, replayed)
        if name == "cond":
            return self.cond(params, replayed)
        if name == "shard_map":
            return _times(_shards(params), self.jaxpr(params["jaxpr"], replayed))
        return _sum(self.jaxpr(inner, replayed) for inner in inner_jaxprs(params))

    def kernel(self, params, replayed: bool) -> tuple[int, int, int]:
        estimate = params.get("cost_estimate")
        if estimate is not None and estimate.flops:
            flops = int(estimate.flops)
        else:
            grid = [n if isinstance(n, int) else 1 for n in params["grid_mapping"].grid]
            if len(grid) and any(not isinstance(n, int) for n in params["grid_mapping"].grid):
                self.notes.add("a Pallas kernel with a dynamic grid counts as one step of it")
            flops = math.prod(grid) * self.jaxpr(params["jaxpr"], replayed)[0]
        return flops, flops if replayed else 0, flops

    def while_loop(self, params, replayed: bool) -> tuple[int, int, int]:
        cost = _sum(self.jaxpr(params[k], replayed) for k in ("body_jaxpr", "cond_jaxpr"))
        if cost[0]:
            self.notes.add("a while loop of unknown length counts as one turn")
        return cost

    def cond(self, params, replayed: bool) -> tuple[int, int, int]:
        branches, platforms = params["branches"], params.get("branches_platforms")
        if platforms is not None:
            return self.jaxpr(branches[_branch_of(platforms, self.platform)], replayed)
        costs = [self.jaxpr(branch, replayed) for branch in branches]
        if len({cost[0] for cost in costs}) > 1:
            self.notes.add("a cond with unequal branches counts as its dearest branch")
        return max(costs)


def inner_jaxprs(params: dict) -> Iterator:
    """The jaxprs among an equation's parameters, in order."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _sum(costs) -> tuple[int, int, int]:
    totals = [0, 0, 0]
    for cost in costs:
        totals = [a + b for a, b in zip(totals, cost, strict=True)]
    return tuple(totals)


def _times(n: int, cost: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(n * c for c in cost)


def _branch_of(platforms, platform: str | None) -> int:
    names = {"gpu": ("gpu", "cuda")}.get(platform, (platform,))
    for index, group in enumerate(platforms):
        if group is not None and any(name in group for name in names):
            return index
    return platforms.index(None) if None in platforms else 0


def _shards(params) -> int:
    """Devices over which a body is split, by the axes that no shard_map around it has split."""
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])


def _dot_general(eqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contract)


def _ragged_dot(eqn) -> int:
    # Every element of lhs meets each free column of rhs once, whichever group it falls in.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    bound = {*contract, *batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(n for d, n in enumerate(rhs) if d not in bound)


def _conv(eqn) -> int:
    params, (lhs, rhs) = eqn.params, (v.aval.shape for v in eqn.invars)
    numbers, out = params["dimension_numbers"], eqn.outvars[0].aval.shape
    taps = 1
    for i, (d_in, d_k, d_out) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        taps *= window_taps(
            lhs[d_in],
            rhs[d_k],
            out[d_out],
            stride=params["window_strides"][i],
            low=params["padding"][i][0],
            lhs_dilate=params["lhs_dilation"][i],
            rhs_dilate=params["rhs_dilation"][i],
        )
    outer = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    return 2 * outer * taps * rhs[numbers.rhs_spec[1]]


def window_taps(
    size: int, kernel: int, out: int, *, stride=1, low=0, lhs_dilate=1, rhs_dilate=1
) -> int:
    """Pairs (output position, kernel position) of one axis that meet a real input element.

    Positions in the padding and in the holes of a dilated input are no work.
    """
    last = (size - 1) * lhs_dilate
    taps = 0
    for k in range(kernel):
        offset = k * rhs_dilate - low
        if lhs_dilate == 1:
            first_out = max(0, -(offset // stride))
            last_out = min(out - 1, (last - offset) // stride)
            taps += max(0, last_out - first_out + 1)
        else:
            places = (o * stride + offset for o in range(out))
            taps += sum(0 <= p <= last and p % lhs_dilate == 0 for p in places)
    return taps


_MATRIX_OPS = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
