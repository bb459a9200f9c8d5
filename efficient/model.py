"""A model at rest: a module tree of declared arrays, and the arrays in a flat dict beside it.

Paths are readable and stable: `blocks/7/mixer/q/kernel`. In memory alike neighbouring blocks are
stacked along a leading axis under one key, `blocks/0-11/mixer/q/kernel`, and run under one
`lax.scan`; rules, surgery and checkpoints see single layers only.
"""

import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from efficient.errors import UserError, nearest
from efficient.scope import Context, call
from pallas_kernels.mesh import constrain

Arrays = dict[str, Array]
# What a block's backward pass need not compute again, by the name of `model.remat`.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
}
RANGE = re.compile(r"(^|/)(\d+)-(\d+)(?=/)")


class Stack(nnx.Module):
    """Blocks in order. A block that stands for layers `start` to `stop` holds stacked arrays."""

    def __init__(self, blocks: list[nnx.Module], remat: str = "none", scan_from: int = 6):
        if remat not in REMAT:
            raise UserError(f"unknown remat {remat!r}; {nearest(remat, REMAT)}")
        self.blocks = nnx.List(blocks)
        self.spans = tuple((i, i + 1) for i in range(len(blocks)))
        self.remat = remat
        self.scan_from = scan_from

    def __len__(self) -> int:
        return self.spans[-1][1] if self.spans else 0

    def __call__(self, x: Array, context: Context) -> tuple[Array, dict[str, Array]]:
        """[B, T, D] -> [B, T, D] and the auxiliary outputs of all layers."""
        if context.run_stack is not None:
            y, totals = context.run_stack(self, _handed(None, self.blocks[0], x), context)
            return _handed(self.blocks[-1], None, y), totals
        totals: dict[str, Array] = {}
        before = None
        for block, span in zip(self.blocks, self.spans, strict=True):
            x, before = _handed(before, block, x), block
            if span[1] - span[0] == 1:
                x, aux = self._one(block, x, context.layer(span[0]))
                aux = {name: value[None] for name, value in aux.items()}
            else:
                stacked = {p: v[...] for p, v in walk(block)}
                x, aux, updated = self._scan(block, jnp.arange(*span), stacked, x, context)
                _assign(block, updated)
            for name, value in self._shares(aux).items():
                totals[name] = totals.get(name, 0.0) + value
        return _handed(before, None, x), totals

    def part(
        self, arrays: Mapping[str, Array], first: Array | int, x: Array, context: Context
    ) -> tuple[Array, dict[str, Array]]:
        """Some layers of a stack whose blocks are all alike, and their share of the totals.

        Args:
          arrays: the layers' arrays, stacked, by their paths within a block.
          first: number of the first layer.
        """
        (block,) = self.blocks
        layers = first + jnp.arange(len(next(iter(arrays.values()))))
        x, aux, _ = self._scan(block, layers, arrays, x, context)
        return x, self._shares(aux)

    def _shares(self, aux: Mapping[str, Array]) -> dict[str, Array]:
        """Sums over layers of losses, and of metrics the layers' part of the mean over all."""
        whole = {name: name.startswith("loss/") for name in aux}
        return {n: (1.0 if whole[n] else 1.0 / len(self)) * a.sum() for n, a in aux.items()}

    def _one(self, block, x, context):
        arrays = {p: v[...] for p, v in walk(block)}

        def run(arrays, x, context):
            return self._apply(block, arrays, x, context)

        x, aux, updated = checkpointed(run, self.remat)(arrays, x, context)
        _assign(block, updated)
        return x, aux

    def _scan(self, block, layers, stacked, x, context):
        def body(x, layer):
            index, arrays = layer
            x, aux, updated = self._apply(block, arrays, x, context.layer(index))
            return x, (aux, updated)

        body = checkpointed(body, self.remat, in_scan=True)
        x, (aux, updated) = jax.lax.scan(body, x, (layers, stacked))
        return x, aux, updated

    @staticmethod
    def _apply(block, arrays, x, context):
        block = bind(block, arrays)
        y, aux = call(block, jax.tree.map(context.place, x), context)
        updated = {p: v[...] for p, v in walk(block) if not isinstance(v, nnx.Param)}
        return jax.tree.map(lambda y, x: y.astype(x.dtype), y, x), aux, updated

    def init_state(self, batch: int, length: int, dtype) -> list[Any]:
        """One decoding state for each span; stacked along the leading axis where blocks are."""

        def one(block, span):
            state = block.init_state(batch, length, dtype)
            count = span[1] - span[0]
            if count == 1:
                return state
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), state)

        return [one(b, s) for b, s in zip(self.blocks, self.spans, strict=True)]

    def step(self, x: Array, states: list[Any], context: Context) -> tuple[Array, list[Any]]:
        """One new token: x [B, 1, D] and the states of `init_state`."""
        new: list[Any] = []
        before = None
        for block, span, state in zip(self.blocks, self.spans, states, strict=True):
            x, before = _handed(before, block, x), block
            if span[1] - span[0] == 1:
                x, state = block.step(x, state, context)
            else:

                def body(x, layer, block=block):
                    arrays, state = layer
                    return bind(block, arrays).step(x, state, context)

                stacked = {p: v[...] for p, v in walk(block)}
                x, state = jax.lax.scan(body, x, (stacked, state))
            new.append(state)
        return _handed(before, None, x), new


def _handed(before: nnx.Module | None, after: nnx.Module | None, x: Any) -> Any:
    """x from one block to the next, or in or out of the stack, where a wiring carries it otherwise.

    Such a wiring has `begin(x)` and `finish(carried)`; blocks of one class understand each other.
    """
    if type(before) is type(after):
        return x
    x = before.finish(x) if hasattr(before, "finish") else x
    return after.begin(x) if hasattr(after, "begin") else x


def checkpointed(fn: Callable, policy: str, in_scan: bool = False) -> Callable:
    """`jax.checkpoint` by name: `none` keeps all, `full` nothing, `dots` what products
    with weights give, `products` what all products give, attention's scores among them."""
    if policy == "none":
        return fn
    return jax.checkpoint(fn, policy=REMAT[policy], prevent_cse=not in_scan)


def walk(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Variable]]:
    """All declared arrays of a module tree: (path, variable), in a stable order."""
    for name, child in children(module):
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(child, nnx.Variable):
            yield path, child
        else:
            yield from walk(child, path)


def children(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Named children of a module: variables and modules; items of a list by their number."""
    if isinstance(module, Stack):
        for (start, stop), block in zip(module.spans, module.blocks, strict=True):
            yield (str(start) if stop - start == 1 else f"{start}-{stop - 1}"), block
        return
    for name, value in sorted(vars(module).items()):
        if isinstance(value, nnx.Variable):
            yield name, value
        elif isinstance(value, nnx.List | list | tuple):
            for i, item in enumerate(value):
                if isinstance(item, nnx.Module):
                    yield f"{name}/{i}", item
        elif isinstance(value, nnx.Module):
            yield name, value


def modules(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """All modules of a tree with their paths, the root first."""
    yield prefix, module
    for name, child in children(module):
        if isinstance(child, nnx.Module):
            yield from modules(child, f"{prefix}/{name}" if prefix else name)


def replace(module: nnx.Module, path: str, new: nnx.Module) -> None:
    """Puts `new` at `path` of an unstacked module tree, in place."""
    *parents, last = path.split("/")
    for name in parents:
        module = _child(module, name)
    if isinstance(module, Stack):
        module.blocks[int(last)] = new
    elif isinstance(module, nnx.List | list):
        module[int(last)] = new
    else:
        setattr(module, last, new)


def _child(module: Any, name: str) -> Any:
    if isinstance(module, Stack):
        return module.blocks[int(name)]
    return module[int(name)] if isinstance(module, nnx.List | list) else getattr(module, name)


def bind(module: nnx.Module, arrays: Mapping[str, Array]) -> nnx.Module:
    """A copy of the module tree that holds `arrays` (path -> array; all of them)."""
    bound = nnx.clone(module)
    _assign(bound, arrays, complete=True)
    return bound


def _assign(module: nnx.Module, arrays: Mapping[str, Array], complete: bool = False) -> None:
    for path, variable in walk(module):
        if complete or path in arrays:
            variable.set_value(arrays[path])


def gathered(module: nnx.Module) -> nnx.Module:
    """A copy of a bound module whose parameters are whole but for model axes (tensor, expert).

    What calls a module many times in a loop calls this before the loop. Otherwise fully sharded
    parameters travel, and their gradients are summed over the mesh, in every turn. Stacked blocks
    are left as they are, since they are gathered a layer at a time.
    """

    def gather(path, variable):
        sharding = variable.get_metadata("gathered", None)
        if sharding is None or RANGE.search(path):
            return variable[...]
        return constrain(variable[...], sharding)

    return bind(module, {p: gather(p, v) for p, v in walk(module)})


def fresh(module: nnx.Module) -> tuple[nnx.Module, Callable[[], None]]:
    """A copy to call within a loop, and a check that the calls have not updated its state."""
    copy = bind(module, {path: variable[...] for path, variable in walk(module)})
    before = {path: variable[...] for path, variable in walk(copy)}

    def check():
        for path, variable in walk(copy):
            if variable[...] is not before[path]:
                raise UserError(
                    f"what computes a batch or a sequence in pieces cannot update state, and each"
                    f" call updates {path}; use another technique there, or compute it whole"
                )

    return copy, check


def state_of(module: nnx.Module) -> Arrays:
    """The arrays of a bound module that are state, not trained parameters."""
    return {p: v[...] for p, v in walk(module) if not isinstance(v, nnx.Param)}


def abstract(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of all declared arrays by path."""
    return {p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in walk(module)}


def is_param(module: nnx.Module) -> dict[str, bool]:
    """By path: whether the optimizer may move the array."""
    return {p: isinstance(v, nnx.Param) for p, v in walk(module)}


def stack_alike(module: nnx.Module, treatment: Callable[[str], Any] = lambda path: None):
    """A copy of the tree in which alike neighbouring blocks of every `Stack` are one.

    Blocks are alike when their structure, arrays, initializers and settings are equal and
    `treatment(path)` (freezing, learning rate, placement, ...) agrees on all their arrays.
    """
    stacked = nnx.clone(module)
    stacks = [(path, m) for path, m in modules(stacked) if isinstance(m, Stack)]
    for path, stack in stacks:
        _stack_in_place(stack, path, treatment)
    return stacked


def _stack_in_place(stack: Stack, path: str, treatment: Callable[[str], Any]) -> None:
    def signature(index: int, block: nnx.Module):
        treated = tuple(treatment(f"{path}/{index}/{p}") for p, _ in walk(block))
        return nnx.split(block)[0], tuple((v.shape, v.dtype) for _, v in walk(block)), treated

    spans: list[list[int]] = []
    last = None
    for index, block in enumerate(stack.blocks):
        this = signature(index, block)
        if this == last:
            spans[-1][1] = index + 1
        else:
            spans.append([index, index + 1])
        last = this
    short = [s for s in spans if s[1] - s[0] < stack.scan_from]
    spans = [
        span for s in spans for span in ([[i, i + 1] for i in range(*s)] if s in short else [s])
    ]
    blocks = []
    for start, stop in spans:
        block = stack.blocks[start]
        if stop - start > 1:
            for _, variable in walk(block):
                shape = (stop - start, *variable.shape)
                variable.set_value(jax.ShapeDtypeStruct(shape, variable.dtype))
        blocks.append(block)
    stack.blocks = nnx.List(blocks)
    stack.spans = tuple((start, stop) for start, stop in spans)


def layers_of(path: str) -> list[str]:
    """`blocks/0-2/q` -> [`blocks/0/q`, `blocks/1/q`, `blocks/2/q`]; a single path gives itself."""
    match = RANGE.search(path)
    if not match:
        return [path]
    head, tail = path[: match.start()] + match[1], path[match.end() :]
    return [f"{head}{i}{tail}" for i in range(int(match[2]), int(match[3]) + 1)]


def init(
    module: nnx.Module,
    seed: Array,
    only: Callable[[str], bool] = lambda path: True,
    name: Callable[[str], str] = lambda path: path,
) -> Arrays:
    """All declared arrays of a (stacked or single) tree, drawn by their initializers.

    Each array's key depends on the seed and its own path alone, so a layer's values are the same
    stacked or not, on any mesh, and whatever else the model holds. Meant to run under `jax.jit`
    with `out_shardings`.

    Args:
      seed: a key.
      only: which paths to draw.
      name: the path that an array's key derives from, where surgery has moved the array since.
    """
    arrays = {}
    for path, variable in walk(module):
        if not only(path):
            continue
        paths = layers_of(path)
        hashes = jnp.array([zlib.crc32(name(p).encode()) for p in paths], jnp.uint32)
        keys = jax.vmap(lambda hashed: jax.random.fold_in(seed, hashed))(hashes)
        shape = variable.shape[1:] if len(paths) > 1 else variable.shape
        draw = functools.partial(_draw, variable.get_metadata("init_fn"), shape, variable.dtype)
        arrays[path] = jax.vmap(draw)(keys) if len(paths) > 1 else draw(keys[0])
    return arrays


def _draw(init_fn, shape, dtype, key):
    return init_fn(key, shape, dtype)
