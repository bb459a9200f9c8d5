"""Folds adapters into the dense layers that they wrap, so that inference costs nothing more."""

from flax import nnx
from jaxtyping import Array

from efficient.errors import UserError, check_finite
from efficient.linears.dense import Dense
from efficient.model import Arrays, bind, replace
from efficient.registry import register
from efficient.surgery.common import carry, innermost, linears


@register("surgery", "merge")
class Merge:
    """Replaces adapters (`lora`, `lora_mini`, `ia3`) by their bases with the adapter folded in.

    Args:
      at: which adapters; by default all.
    """

    def __init__(self, *, at: str = r".*"):
        self.at = at
        self.wrappers: dict[str, nnx.Module] = {}

    def apply(self, model: nnx.Module) -> None:
        found = [(p, m) for p, m in linears(model, self.at) if hasattr(m, "merged")]
        if not found:
            raise UserError(f"merge at '{self.at}' matches no adapter; apply one in a phase before")
        self.wrappers = {path: nnx.clone(wrapper) for path, wrapper in found}
        for path, wrapper in found:
            base = innermost(wrapper)
            if not isinstance(base, Dense):
                raise UserError(
                    f"merge: {path} wraps a {type(base).__name__}, which cannot take any matrix;"
                    " only dense layers can"
                )
            replace(model, path, base)

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        """The arrays of the model without adapters; computes the same function."""
        merged = {}
        for path, wrapper in self.wrappers.items():
            start = f"{path}/"
            own = {p.removeprefix(start): v for p, v in values.items() if p.startswith(start)}
            for name, array in own.items():
                check_finite(f"merge: {path}/{name}", array)
            for name, array in bind(wrapper, own).merged().items():
                merged[f"{path}/{name}"] = array
        return carry(values | merged, model, key)
