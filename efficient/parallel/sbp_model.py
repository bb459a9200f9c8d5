"""The program of a model of this project, for `efficient.parallel.sbp`: embedding, a block, head.

Read from an abstract model: its modules, their shapes, and where the rules of a `Placement` put
parameters and activations. A `place` stands wherever the model calls `Context.place`, and at every
parameter, which is gathered from the axes that split the batch before it is used; over the other
axes parameters stay, or the least bytes would be those of gathering them, with all devices doing
the same work. Two places in a row are one, as XLA merges them. Forward only.

Attention is written out as its products, so that over a split sequence the search finds the
cheapest collectives that legal operators allow, which ring attention's passing on is not among.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding

from efficient.channels.mlp import GLU, MLP
from efficient.embeddings.table import LearnedPosition, NoPosition, Table
from efficient.errors import UserError
from efficient.linears.dense import Dense
from efficient.mixers.attention import Attention
from efficient.norms.standard import Identity, LayerNorm, RMSNorm
from efficient.parallel.placement import Placement
from efficient.parallel.sbp_ops import B, Op, Program, S, Signature
from efficient.parallel.scopes import axes_of
from efficient.wiring.hybrid_norm import HybridNorm
from efficient.wiring.residual import PostNorm, PreNorm, SandwichNorm
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device in a mesh on which nothing runs."""

    id: int
    platform: str = "none"
    process_index: int = 0


def mesh_axes(placement: Placement) -> dict[str, int]:
    """The axes of a placement's mesh that have several devices."""
    return {axis: n for axis, n in placement.mesh.shape.items() if n > 1}


def signature_of(sharding: NamedSharding, axes: Mapping[str, int], what: str) -> Signature:
    """The signature of an array under a sharding, which has splits and no parts.

    Raises:
      UserError: a dimension is split over axes in another order than the mesh's.
    """
    found = dict.fromkeys(axes, B)
    for dim, entry in enumerate(sharding.spec):
        split = [axis for axis in axes_of((entry,)) if axis in axes]
        if split != [axis for axis in axes if axis in split]:
            raise UserError(
                f"{what} is split over {split}; sbp reads axes in the mesh's order, {[*axes]}"
            )
        found.update(dict.fromkeys(split, S(dim)))
    return tuple(found.values())


class Builder:
    """Collects the operators of a program and the placements of what it is given."""

    def __init__(self, placement: Placement, sizes: Mapping[str, int], itemsize: int):
        self.placement, self.sizes, self.default = placement, dict(sizes), itemsize
        self.axes = mesh_axes(placement)
        self.ops: list[Op] = []
        self.dims: dict[str, str] = {}
        self.itemsize: dict[str, int] = {}
        self.placements: dict[str, Signature] = {}
        self.fixed: set[str] = set()

    def add(self, kind: str, output: str, dims: str, *inputs: str, **fields: Any) -> str:
        """Appends an operator that is named after its output; gives the output's name."""
        self._declare(output, dims, max((self.itemsize[n] for n in inputs), default=self.default))
        self.ops.append(Op(output, kind, inputs, output, **fields))
        return output

    def _declare(self, name: str, dims: str, itemsize: int) -> None:
        self.dims[name], self.itemsize[name] = dims, itemsize

    def batch(self, name: str) -> str:
        """Integers [B, T] of a batch, which lie as the batch does."""
        self._declare(name, "BT", 4)
        self.placements[name] = signature_of(self.placement.batch, self.axes, name)
        return name

    def parameter(self, path: str, dims: str, variable: nnx.Variable) -> str:
        """A parameter where the rules place it, then gathered from the axes of the batch."""
        for letter, size in zip(dims, variable.shape, strict=True):
            if self.sizes.setdefault(letter, size) != size:
                raise UserError(f"{path}: {letter} is {size} here and {self.sizes[letter]} before")
        if f"{path} gathered" in self.fixed:  # a table that serves as the head too
            return f"{path} gathered"
        self._declare(path, dims, self.default)
        placed = self.placement.sharding(path, variable.shape)
        self.placements[path] = signature_of(placed, self.axes, path)
        to = signature_of(self.placement.gathered(path, variable.shape), self.axes, path)
        why = "parameters are gathered from the axes that split the batch"
        self.fixed.add(f"{path} gathered")
        return self.add("place", f"{path} gathered", dims, path, to=to, why=why)

    def place(self, x: str, kind: str, name: str) -> str:
        """x where the rules have activations of that kind."""
        dims = self.dims[x]
        shape = tuple(self.sizes[letter] for letter in dims)
        sharding = self.placement.activation(kind, shape)
        to = signature_of(sharding, self.axes, f"activations/{kind}")
        why = f"activations/{kind} lie as {', '.join(map(str, to)) or 'one device has them'}"
        return self.add("place", name, dims, x, to=to, why=why)

    def program(self) -> Program:
        return Program(self.dims, self.sizes, tuple(self.ops), self.itemsize, frozenset(self.fixed))


def decoder_program(
    model: nnx.Module, placement: Placement, batch: int, length: int, itemsize: int
) -> tuple[Program, dict[str, Signature]]:
    """Embedding, first block, head and cross-entropy of a decoder; and how its inputs are placed.

    Args:
      batch: sequences at a time, over all devices.
      itemsize: bytes a number of activations and of the parameters they meet.
    """
    if not isinstance(model, Decoder):
        raise UserError(
            f"sbp has no program of {type(model).__name__}; it reads model.name=decoder"
        )
    vocabulary, width = model.embed.table.shape if isinstance(model.embed, Table) else (0, 0)
    if not width:
        raise UserError(f"embed: sbp has no program of {type(model.embed).__name__}, only of table")
    sizes = {"B": batch, "T": length, "S": length, "D": width, "V": vocabulary}
    builder = Builder(placement, sizes, itemsize)
    x = _embedding(builder, model)
    x = _block(builder, model.blocks.blocks[0], "blocks/0", x)
    _head(builder, model, x)
    return builder.program(), builder.placements


def _embedding(b: Builder, model: Decoder) -> str:
    table = b.parameter("embed/table", "VD", model.embed.table)
    x = b.add("lookup", "embed", "BTD", table, b.batch("tokens"))
    b.itemsize[x] = b.default
    x = b.place(x, "tokens", "embed placed")
    position = model.position
    if isinstance(position, NoPosition):
        return x
    if not isinstance(position, LearnedPosition):
        raise UserError(f"position: sbp has no program of {type(position).__name__}")
    rows = b.parameter("position/table", "LD", position.table)
    rows = b.add("reshape", "position rows", "TD", rows)
    return b.add("linear", "embed + position", "BTD", x, rows)


def _norm(b: Builder, module: nnx.Module, path: str, x: str, letter: str = "D") -> str:
    """A norm over the features `letter` of x."""
    if isinstance(module, Identity):
        return x
    if not isinstance(module, RMSNorm | LayerNorm):
        raise UserError(f"{path}: sbp has no program of {type(module).__name__}")
    arrays = [(n, getattr(module, n, None)) for n in ("scale", "bias")]
    given = [b.parameter(f"{path}/{n}", letter, v) for n, v in arrays if v is not None]
    return b.add("nonlinear", path, b.dims[x], x, *given, over=letter)


def _linear(b: Builder, module: nnx.Module, path: str, x: str, letters: str) -> str:
    """A dense layer from features letters[0] to letters[1]."""
    if not isinstance(module, Dense):
        raise UserError(
            f"{path}: sbp has no program of {type(module).__name__}; it reads dense layers"
        )
    kernel = b.parameter(f"{path}/kernel", letters, module.kernel)
    y = b.add("einsum", path, b.dims[x].replace(*letters), x, kernel)
    if module.bias is None:
        return y
    bias = b.parameter(f"{path}/bias", letters[1], module.bias)
    return b.add("linear", f"{path} + bias", b.dims[y], y, bias)


def _block(b: Builder, block: nnx.Module, path: str, x: str) -> str:
    def sublayer(name: str) -> Callable[[str], str]:
        module, emit = (block.mixer, _attention) if name == "mixer" else (block.channel, _channel)

        def run(y: str) -> str:
            y = b.place(y, "inputs", f"{path}/{name} reads")
            return b.place(emit(b, module, f"{path}/{name}", y), "tokens", f"{path}/{name} gives")

        return run

    def norm(name: str, y: str) -> str:
        return _norm(b, getattr(block, name), f"{path}/{name}", y)

    def add(name: str, y: str, branch: str) -> str:
        scale = getattr(block, f"{name}_scale", None)
        if scale is not None:
            gain = b.parameter(f"{path}/{name}_scale", "D", scale)
            branch = b.add("einsum", f"{path}/{name} scaled", "BTD", branch, gain)
        return b.add("linear", f"{path} + {name}", "BTD", y, branch)

    mix, transform = sublayer("mixer"), sublayer("channel")
    x = b.place(x, "tokens", f"{path} reads")
    match block:
        case PreNorm():
            x = add("mixer", x, mix(norm("mixer_norm", x)))
            return add("channel", x, transform(norm("channel_norm", x)))
        case PostNorm():
            x = norm("mixer_norm", add("mixer", x, mix(x)))
            return norm("channel_norm", add("channel", x, transform(x)))
        case SandwichNorm():
            x = add("mixer", x, norm("mixer_out_norm", mix(norm("mixer_norm", x))))
            return add("channel", x, norm("channel_out_norm", transform(norm("channel_norm", x))))
        case HybridNorm(pre_norm=True):
            x = add("mixer", x, mix(norm("mixer_norm", x)))
            return add("channel", x, transform(norm("channel_norm", x)))
        case HybridNorm():
            x = norm("channel_norm", add("mixer", x, mix(x)))
            return add("channel", x, transform(x))
    raise UserError(f"{path}: sbp has no program of the wiring {type(block).__name__}")


def _attention(b: Builder, module: nnx.Module, path: str, x: str) -> str:
    if type(module) is not Attention:
        raise UserError(f"{path}: sbp has no program of the mixer {type(module).__name__}")
    heads, kv_heads, size = module.heads, module.kv_heads, module.head_size
    b.sizes.update(N=heads, K=kv_heads, H=size, E=heads * size, J=kv_heads * size)

    def head(name: str, wide: str, count: str) -> str:
        y = _linear(b, getattr(module, name), f"{path}/{name}", x, f"D{wide}")
        dims = f"BT{count}H"
        y = b.add("reshape", f"{path}/{name} heads", dims, y, renamed=((wide, count),))
        y = _norm(b, getattr(module, f"{name}_norm"), f"{path}/{name}_norm", y, "H")
        if module.rope is not None and name != "v":
            y = b.add("linear", f"{path}/{name} rotated", dims, y, over="H")
        return y

    def keys(name: str) -> str:
        y = head(name, "J", "K")
        moved = (("T", "S"), ("K", "N"))  # every head reads the key head of its group
        return b.add("reshape", f"{path}/{name} read", "BSNH", y, renamed=moved)

    q, k, v = head("q", "E", "N"), keys("k"), keys("v")
    scores = b.add("einsum", f"{path} scores", "BNTS", q, k)
    weights = b.add("nonlinear", f"{path} softmax", "BNTS", scores, over="S")
    y = b.add("einsum", f"{path} mixed", "BTNH", weights, v)
    y = b.add("reshape", f"{path} joined", "BTE", y, renamed=(("N", "E"),))
    return _linear(b, module.out, f"{path}/out", y, "ED")


def _channel(b: Builder, module: nnx.Module, path: str, x: str) -> str:
    if not isinstance(module, MLP | GLU):
        raise UserError(f"{path}: sbp has no program of the channel {type(module).__name__}")
    up = _linear(b, module.up, f"{path}/up", x, "DF")
    if isinstance(module, GLU):
        gate = _linear(b, module.gate, f"{path}/gate", x, "DF")
        gate = b.add("nonlinear", f"{path} activation", "BTF", gate)
        y = b.add("einsum", f"{path} gated", "BTF", gate, up)
    else:
        y = b.add("nonlinear", f"{path} activation", "BTF", up)
    return _linear(b, module.down, f"{path}/down", y, "FD")


def _head(b: Builder, model: Decoder, x: str) -> None:
    x = _norm(b, model.final_norm, "final_norm", x)
    x = b.place(x, "inputs", "head reads")
    if model.head is None:
        table = b.parameter("embed/table", "VD", model.embed.table)
        logits = b.add("einsum", "head", "BTV", x, table)
    else:
        logits = _linear(b, model.head, "head", x, "DV")
    b.itemsize[logits] = 4  # float32 whatever the products are computed in
    if model.logit_softcap is not None:
        logits = b.add("nonlinear", "softcap", "BTV", logits)
    logits = b.place(logits, "logits", "logits")
    cross_entropy(b, logits, b.batch("targets"))


def cross_entropy(b: Builder, logits: str, targets: str) -> str:
    """The mean over B and T of log sum_V exp(logits) - logits[target], as operators."""
    top = b.add("max", "loss: largest logit", "BT", logits, over="V")
    exponentials = b.add("nonlinear", "loss: exponentials", "BTV", logits, top)
    total = b.add("sum", "loss: sum of exponentials", "BT", exponentials, over="V")
    target = b.add("pick", "loss: logit of the target", "BT", logits, targets, over="V")
    log = b.add("nonlinear", "loss: logarithm", "BT", total)
    loss = b.add("linear", "loss: of a token", "BT", log, top, target)
    # A token's loss is used whole: in weights, metrics and the gradient.
    split = b.placement.activation("logits", (b.sizes["B"], b.sizes["T"]))
    to = signature_of(split, b.axes, "activations/logits")
    loss = b.add("place", "loss: tokens", "BT", loss, to=to, why="a token's loss is used whole")
    mean = b.add("sum", "loss: mean", "", loss, over="BT")
    return b.add("place", "loss", "", mean, to=(B,) * len(b.axes), why="every device reads it")
