"""RaftMLP: MLPs over the columns and the rows of an image's tokens, a raft of channels at a time.

"RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?", Tatsunami and
Taki 2021, arXiv 2108.04384. The D channels of a token are r groups of D / r; channel c is number
c mod D / r of group c // (D / r). A raft is the r channels of the same number. With x the residual
stream on the h x w grid of tokens, e an expansion, and norms over the channels of one token,

    V(x)[:, j, raft] = W2 gelu(W1 norm(x)[:, j, raft] + b1) + b2     a vector of r h numbers
    H(x)[i, :, raft] = W4 gelu(W3 norm(x)[i, :, raft] + b3) + b4     a vector of r w numbers
    u = x + V(x);    y = u + H(u)

for every column j, row i and raft, with W1 of [r h, e r h] and W3 of [r w, e r w]. In the vectors
the group is the slow index and the place in the column or row the fast one. r = 1 mixes each
channel by itself. The module gives y - x, to which the block's residual adds x back; since both
norms are its own, the block must not normalise: fill `mixer_norm` by `identity`.

Only the authors' code was read for the equations. Its affine norms hold their channels in another
order, which no result depends on.
"""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from efficient.channels.mlp import activation
from efficient.errors import UserError
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, Scope

_TEST = "tests/papers/test_raftmlp.py"

PAPER = Paper(
    slug="raftmlp",
    status="equations",
    claims=(
        Claim(
            "token mixing is divided into a vertical and a horizontal MLP, each with a residual",
            f"{_TEST}::test_mixer_equals_numpy",
            True,
        ),
        Claim(
            "a raft makes spatial correlations denser among some channels",
            f"{_TEST}::test_a_channel_reaches_its_raft_and_no_other",
            True,
        ),
        Claim(
            "reduces the parameters of the MLP-Mixer",
            f"{_TEST}::test_parameters_against_mixer_token_mixing",
            True,
            "token mixing of 14x14 tokens at expansion 2: 25,424 numbers at r = 4, Mixer's has"
            " 154,252; the norms of D channels apart, of which RaftMLP has one more",
        ),
        Claim(
            "reduces the computational complexity of the MLP-Mixer",
            f"{_TEST}::test_macs_against_mixer_token_mixing",
            True,
            "by r (h + w) / (h w): 4/7 at r = 4 on 14x14 tokens; more on grids below 2 r",
        ),
        Claim(
            "is more accurate than the MLP-Mixer",
            note="needs ImageNet and accelerators",
        ),
        Claim(
            "RaftMLP-S is comparable on ImageNet to the state of the art of global MLPs",
            note="needs ImageNet, accelerators, and the cross-scale patch embedding",
        ),
        Claim(
            "bicubic interpolation serves images of another size",
            note="not implemented: a model is for images of one size",
        ),
    ),
    source="github.com/okojoalg/raft-mlp, libs/modules.py, libs/models.py and configs/settings",
    departures=(
        "the models S, M and L need a patch embedding at several scales, which models.vision lacks",
        "kernels are drawn with variance 1 / fan-in and biases are zero, PyTorch's default has"
        " variance 1 / (3 fan-in) for both",
        "drop path (of the wiring) drops the vertical and the horizontal branch together",
    ),
)


def to_rafts(x: Float[Array, "B h w D"], raft: int) -> Float[Array, "B w C M"]:
    """The columns of each of the C = D / raft rafts as vectors of M = raft * h numbers."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, raft, channels // raft)
    return x.transpose(0, 2, 4, 3, 1).reshape(batch, width, channels // raft, raft * height)


def from_rafts(x: Float[Array, "B w C M"], raft: int) -> Float[Array, "B h w D"]:
    """The inverse of `to_rafts`."""
    batch, width, count, size = x.shape
    x = x.reshape(batch, width, count, raft, size // raft)
    return x.transpose(0, 4, 1, 3, 2).reshape(batch, size // raft, width, raft * count)


def mix_columns(
    x: Float[Array, "B h w D"], mlp: Callable[[Array], Array], raft: int
) -> Float[Array, "B h w D"]:
    """`mlp`, [..., raft * h] -> [..., raft * h], on every column of every raft."""
    return from_rafts(mlp(to_rafts(x, raft)), raft)


def mix_rows(
    x: Float[Array, "B h w D"], mlp: Callable[[Array], Array], raft: int
) -> Float[Array, "B h w D"]:
    """`mlp`, [..., raft * w] -> [..., raft * w], on every row of every raft."""
    return mix_columns(x.swapaxes(1, 2), mlp, raft).swapaxes(1, 2)


@register("mixer", "raft", causal=(False,), grid=True, decode=False, segments=False)
class Raft(nnx.Module):
    """x -> V(x) + H(x + V(x)) on the grid h x w of its scope, without the block's own residual.

    Args:
      raft: r, how many channels are mixed together; divides the width.
      expansion: e, the hidden features of both MLPs over their inputs.
      activation: between the two layers; the authors have the exact GELU.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        raft: int = 2,
        expansion: int = 2,
        activation: str = "gelu_exact",
    ):
        del causal
        if expansion < 1:
            raise UserError(f"expansion={expansion} must be at least 1")
        if raft < 1 or width % raft:
            raise UserError(f"width {width} does not divide into rafts of {raft}; change raft")
        self.name, self.grid, self.raft, self.activation = scope.name, scope.grid, raft, activation
        _ = self.act  # an unknown name fails here, not at the first call
        for name, length in zip(("vertical", "horizontal"), self.grid, strict=True):
            size = raft * length
            setattr(self, f"{name}_norm", scope.norm(f"{name}_norm", width, default="layer_norm"))
            setattr(self, f"{name}_up", scope.linear(f"{name}_up", size, expansion * size, True))
            setattr(
                self, f"{name}_down", scope.linear(f"{name}_down", expansion * size, size, True)
            )

    @property
    def act(self) -> Callable[[Array], Array]:
        return activation(self.activation)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        self._check_grid(x.shape[1], context)

        def vertical(y):
            return self.vertical_down(self.act(self.vertical_up(y, context)), context)

        def horizontal(y):
            return self.horizontal_down(self.act(self.horizontal_up(y, context)), context)

        tokens = x.reshape(x.shape[0], *self.grid, -1)
        v = mix_columns(self.vertical_norm(tokens, context), vertical, self.raft)
        h = mix_rows(self.horizontal_norm(tokens + v, context), horizontal, self.raft)
        return (v + h).reshape(x.shape)

    def _check_grid(self, length: int, context: Context) -> None:
        height, width = self.grid
        if context.grid != self.grid:
            raise UserError(
                f"{self.name}: 'raft' was built for a {height}x{width} grid, and is called on"
                f" {context.grid}; the host must give its scope and its context the same grid"
            )
        if length != height * width:
            raise UserError(
                f"{self.name}: 'raft' mixes a {height}x{width} grid but there are {length} tokens;"
                " it has no place for a class token: set model.pooling='mean'"
            )
