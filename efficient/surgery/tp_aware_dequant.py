"""TP-aware dequantization: no communication between the two products of a quantized MLP.

"TP-Aware Dequantization", Hoque, Srivatsa, Yang and Ganti 2024, arXiv 2402.04925. Weights of 4 bits
in groups of rows that act order has scattered are sorted by group, W[P], so that dequantizing
reads scales and zeros in runs, and inputs are permuted, x[:, P] (`efficient.linears.int4`). Of an
MLP with W_1 split by columns over devices and W_2 by rows, device i of t does

    naive   H_i = act(x[:, P_1] W_1[P_1]_i)            columns of its part
            H = all-gather(H_i)                        P_2 reaches over all devices
            y = all-reduce(H[:, P_2]_i W_2[P_2]_i)

    aware   H_i = act(x[:, P_1] W_1[P_1, P_2]_i)       the columns were permuted beforehand
            y = all-reduce(H_i W_2[P_2]_i)

since act works feature by feature: act(x W_1)[:, P_2] = act(x W_1[:, P_2]). Columns of a gate and
biases of both are permuted alike; a permutation of columns changes no level, scale or zero.

Quantization here is rounding to nearest. GPTQ's error compensation is not here, nor its Hessian of
calibration data, whose diagonal gives GPTQ the act order; the norms of the rows of each kernel
stand in for it. `int4.quantize` takes any order.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from efficient.channels.mlp import GLU, MLP
from efficient.errors import UserError, check_finite
from efficient.linears.dense import Dense
from efficient.linears.int4 import (
    Int4,
    Quantized,
    check_groups,
    permute_outputs,
    product,
    quantize,
)
from efficient.model import Arrays, modules, replace
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.surgery.common import carry, matching


def permuted_for(first: Quantized, second: Quantized) -> Quantized:
    """`first` with the columns, and the bias, that `second` reads in the order of its rows."""
    return permute_outputs(first, second.order)


def hidden(
    x: Float[Array, "*B D"],
    up: Quantized,
    gate: Quantized | None,
    activation: Callable[[Array], Array],
) -> Float[Array, "*B F"]:
    """act(up(x)), or act(gate(x)) * up(x); of a device its part of the features."""

    def features(weights):
        return product(x[..., weights.order], *weights[:3], weights.bias)

    return activation(features(up)) if gate is None else activation(features(gate)) * features(up)


def contracted(h: Float[Array, "*B F"], down: Quantized, axis: str | None) -> Float[Array, "*B D"]:
    """down(h) of features in the order of its rows, summed over the devices of `axis`."""
    y = product(h, *down[:3])
    y = y if axis is None else jax.lax.psum(y, axis)
    return y if down.bias is None else y + down.bias.astype(y.dtype)


def naive(
    x: Float[Array, "*B D"],
    up: Quantized,
    down: Quantized,
    gate: Quantized | None = None,
    *,
    activation: Callable[[Array], Array],
    axis: str | None = None,
) -> Float[Array, "*B D"]:
    """The MLP that permutes its hidden features at run time.

    Args:
      axis: within a shard_map, the mesh axis that splits the columns of `up` and `gate`, and the
        rows of `down` but not its `order` and bias.
    """
    h = hidden(x, up, gate, activation)
    if axis is None:
        return contracted(h[..., down.order], down, None)
    part = h.shape[-1]
    whole = jax.lax.all_gather(h, axis, axis=h.ndim - 1, tiled=True)[..., down.order]
    start = part * jax.lax.axis_index(axis)
    return contracted(jax.lax.dynamic_slice_in_dim(whole, start, part, -1), down, axis)


def aware(
    x: Float[Array, "*B D"],
    up: Quantized,
    down: Quantized,
    gate: Quantized | None = None,
    *,
    activation: Callable[[Array], Array],
    axis: str | None = None,
) -> Float[Array, "*B D"]:
    """The MLP of `up` and `gate` that `permuted_for` gave; arguments otherwise as of `naive`."""
    return contracted(hidden(x, up, gate, activation), down, axis)


@register("surgery", "tp_aware_dequant")
class TPAwareDequant:
    """Quantizes MLPs to 4 bits, the columns of one product in the order of the next one's rows.

    Args:
      at: which channels, `mlp` or `glu` of dense layers; a pattern of whole paths.
      group_size: input rows that share scales and zeros; divides width and hidden.
      aware: False permutes the hidden features at run time instead, for comparison.
    """

    def __init__(self, *, at: str = r".*/channel", group_size: int = 32, aware: bool = True):
        self.at, self.group_size, self.aware = at, group_size, aware

    def apply(self, model: nnx.Module) -> None:
        for path, channel in matching(model, self.at, lambda m: isinstance(m, MLP | GLU)):
            for name in _products(channel):
                layer, where = getattr(channel, name), f"{path}/{name}"
                if not isinstance(layer, Dense):
                    raise UserError(
                        f"tp_aware_dequant: {where} is {type(layer).__name__}, not a dense layer;"
                        " leave it out of 'at', or merge or convert it first"
                    )
                check_groups(where, layer.kernel.shape[0], self.group_size)
                permutes = name != "down" or not self.aware
                sizes = *layer.kernel.shape, layer.bias is not None
                replace(model, where, Int4(*sizes, self.group_size, permutes))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        moved = dict(values)
        for path, channel in modules(model):
            if not isinstance(channel, MLP | GLU) or f"{path}/up/packed" in values:
                continue
            if not isinstance(channel.up, Int4):
                continue
            made = {n: self._quantized(values, f"{path}/{n}") for n in _products(channel)}
            for name, weights in made.items():
                if self.aware and name != "down":
                    weights = permuted_for(weights, made["down"])
                arrays = {f"{path}/{name}/{n}": a for n, a in weights._asdict().items()}
                moved |= {p: a for p, a in arrays.items() if a is not None}
        return carry(moved, model, key)

    def _quantized(self, values: Arrays, path: str) -> Quantized:
        kernel = values[f"{path}/kernel"]
        check_finite(f"tp_aware_dequant: {path}/kernel", kernel)
        return quantize(kernel, self.group_size, bias=values.get(f"{path}/bias"))


def _products(channel: MLP | GLU) -> tuple[str, ...]:
    return ("gate", "up", "down") if isinstance(channel, GLU) else ("up", "down")


TEST = "tests/papers/test_tp_aware_dequant.py"
PAPER = Paper(
    slug="tp_aware_dequant",
    status="equations",
    claims=(
        Claim(
            "Rows sorted by group give the matrix that act order has scattered, and each group's"
            " scales and zeros are read in one run.",
            f"{TEST}::test_sorted_rows_are_those_of_act_order",
            True,
        ),
        Claim(
            "Columns permuted beforehand give the result of features permuted at run time.",
            f"{TEST}::test_aware_is_naive_is_numpy",
            True,
            "plain and gated, with biases",
        ),
        Claim(
            "Nothing is sent between the two products; the naive form gathers there.",
            f"{TEST}::test_collectives_of_four_devices",
            True,
            "in the program that XLA makes for four CPU devices",
        ),
        Claim(
            "The permutation is done once, offline, and changes no level, scale or zero.",
            f"{TEST}::test_bytes_held_are_those_of_four_bits",
            True,
        ),
        Claim(
            "Up to 1.81 times as fast for Llama-70B's MLP, and 1.78 times for Granite-20B's.",
            note="needs several GPUs (the paper's are A100 and H100 DGX systems); not timed here",
        ),
    ),
    source="the abstract and introduction of arXiv 2402.04925 and a published summary of its method"
    " (app.argminai.com); the full text was not read",
    departures=(
        "Weights are rounded to nearest; GPTQ's error compensation is not here.",
        "Act order is that of the norms of the kernel's rows, not of calibration data.",
        "The product is XLA's of a dequantized matrix; the authors use a fused kernel for GPUs.",
        "Scales are in float32 and zeros have a byte each.",
    ),
)
