"""TokenFormer's feed-forward block, one token-parameter attention: efficient.linears.pattention."""

from flax import nnx
from jaxtyping import Array, Float

from efficient.linears.pattention import Pattention
from efficient.registry import register
from efficient.scope import Context, Scope


@register("channel", "tokenformer")
class TokenFormer(nnx.Module):
    """Attention of each token to `tokens` learned pairs, by default four times the width.

    With D-wide keys and values that is 8 D^2 parameters, as an MLP with 4 D hidden features has.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        *,
        tokens: int | None = None,
        key_std: float = 0.02,
        value_std: float | None = None,
    ):
        tokens = 4 * width if tokens is None else tokens
        stds = {"key_std": key_std, "value_std": value_std}
        self.attend = Pattention(scope.at("attend"), width, width, False, tokens=tokens, **stds)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        return self.attend(x, context)
