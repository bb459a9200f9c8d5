"""A second model in a phase: a frozen copy of the first, under a name that objectives know.

Put before the surgeries that change the model, it is the model as the phase before has left it: the
teacher of a student that is pruned, quantized or converted. Surgeries that come after it see its
layers too, under `teacher/...`: give them patterns that begin at `blocks/`.
"""

from flax import nnx
from jaxtyping import Array

from efficient.errors import UserError
from efficient.model import Arrays, modules
from efficient.registry import register
from efficient.scope import Buffer


def freeze(model: nnx.Module) -> nnx.Module:
    """A copy of an abstract model whose parameters are state: kept and placed, but not trained."""
    frozen = nnx.clone(model)
    for _, module in modules(frozen):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, Buffer(value.get_value(), kept=True, **value.get_metadata()))
    return frozen


@register("surgery", "companion")
class Companion:
    """Puts a frozen copy of the model beside it.

    Args:
      called: its name, an attribute of the model and the first part of its arrays' paths.
    """

    def __init__(self, *, called: str = "teacher"):
        if not called.isidentifier():
            raise UserError(f"companion: called={called!r} must be a name, such as 'teacher'")
        self.called = called

    def apply(self, model: nnx.Module) -> None:
        if hasattr(model, self.called):
            raise UserError(f"companion: the model has a {self.called!r} already; rename one")
        setattr(model, self.called, freeze(model))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        """All arrays, and those of the model again for its copy."""
        del model, key
        return values | {f"{self.called}/{path}": value for path, value in values.items()}
