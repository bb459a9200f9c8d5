"""Where a pipeline cuts a model, and how the layers of its stack are dealt to the stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from efficient import model as model_lib
from efficient.errors import UserError

Arrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a model is cut: the one stack of alike blocks that it has.

    Attributes:
      stack: the module, abstract.
      prefix: of the paths of its arrays.
      stages, chunks: p and v.
    """

    stack: model_lib.Stack
    prefix: str
    stages: int
    chunks: int

    @classmethod
    def of(cls, model: Any, stages: int, chunks: int) -> "Cut":
        """Finds the stack.

        Raises:
          UserError: there is none or more than one, its blocks are not alike, they do not divide
            into the chunks of all stages, or there is state beside parameters.
        """
        where = f"config.mesh.pipeline={stages}"
        found = [(p, m) for p, m in model_lib.modules(model) if isinstance(m, model_lib.Stack)]
        if len(found) != 1:
            raise UserError(f"{where} wants a model of one stack of blocks; this has {len(found)}")
        path, stack = found[0]
        depth, parts = len(stack), stages * chunks
        if depth % parts:
            near = max(parts, round(depth / parts) * parts)
            raise UserError(
                f"{where}: {depth} layers do not divide into {stages} stages of {chunks} chunks;"
                f" a depth of {near} does"
            )
        if len(stack.blocks) > 1:
            at = stack.spans[1][0]
            raise UserError(
                f"{where} wants blocks that are all alike; {path}/{at} differs from the one before"
            )
        buffers = [p for p, param in model_lib.is_param(model).items() if not param]
        if buffers:
            raise UserError(
                f"{where}: {buffers[0]} is state that a step may change; pipelines take parameters"
                " alone"
            )
        return cls(stack, f"{path}/0-{depth - 1}/", stages, chunks)

    def split(self, arrays: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
        """(arrays of blocks by their paths within one, [p, v, n, ...]; all others)."""
        parts = (self.chunks, self.stages, len(self.stack) // (self.stages * self.chunks))
        blocks = {
            path.removeprefix(self.prefix): a.reshape(*parts, *a.shape[1:]).swapaxes(0, 1)
            for path, a in arrays.items()
            if path.startswith(self.prefix)
        }
        return blocks, {p: a for p, a in arrays.items() if not p.startswith(self.prefix)}

    def join(self, blocks: Arrays, others: Arrays) -> dict[str, Array]:
        """The inverse of `split`."""
        whole = {
            self.prefix + path: a.swapaxes(0, 1).reshape(len(self.stack), *a.shape[3:])
            for path, a in blocks.items()
        }
        return {**whole, **others}
