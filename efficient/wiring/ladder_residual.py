"""Ladder Residual: a sublayer reads the stream without what the sublayer before it will add.

"Ladder-residual: parallelism-aware architecture for accelerating large model inference with
communication overlapping", Zhang, Mishra, Zhou, Brandon, Wang, Kim, Ragan-Kelley, Song,
Athiwaratkun and Dao 2025, arXiv 2501.06589. Of the sublayers h_1, h_2, ... (attention and
feed-forward in turn, each after its norm) and the stream x_0, x_1, ...

    x_{i+1} = x_i + h_{i+1}(x_{i-1})        x_{-1} = x_0

so that the sum over devices of h_i, which tensor parallelism ends a sublayer with, is needed only
when h_{i+1} is done, and travels while h_{i+1} computes. A standard residual reads x_i.

Between blocks the stream is carried in two parts, x_{i-1} and what h_i gives; the last block's end
adds them up.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Scope
from efficient.wiring.residual import Block

_TEST = "tests/papers/test_ladder_residual.py"

PAPER = Paper(
    slug="ladder_residual",
    status="equations",
    claims=(
        Claim(
            "a sublayer reads the stream that lacks the one before it",
            f"{_TEST}::test_the_stream_against_numpy",
            True,
        ),
        Claim(
            "the sums over devices of a sublayer run while the next one computes",
            f"{_TEST}::test_sums_run_beside_products",
            True,
            "four blocks on four v5e, as scheduled: the sums of 5 of 8 sublayers enclose products,"
            " with a standard residual none; with compiler options that the test names, without"
            " which every all-reduce is synchronous",
        ),
        Claim("30% faster inference at 70B parameters over 8 devices", note="needs accelerators"),
        Claim("1B and 3B models train as well as standard ones", note="needs accelerators"),
        Claim(
            "Llama-3.1 8B is converted with 3B tokens",
            note="needs the weights; `init_from` with this wiring is how one would begin",
        ),
    ),
    source="the abstract; the authors' published LadderResidualBlock, for the order within a block",
)


class Pending(NamedTuple):
    """The stream in two parts.

    Attributes:
      stream: [B, T, D], what the next sublayer reads.
      late: [B, T, D], of the sublayer before it.
    """

    stream: Array
    late: Array


@register("wiring", "ladder_residual")
class LadderResidual(Block):
    """x_{i+1} = x_i + h_{i+1}(x_{i-1}) with a norm before each sublayer."""

    def __init__(self, scope: Scope, width: int, causal: bool):
        super().__init__(scope, width, causal)
        self.mixer_norm = scope.norm("mixer_norm", width)
        self.channel_norm = scope.norm("channel_norm", width)

    def begin(self, x: Float[Array, "B T D"]) -> Pending:
        """The stream before the first block; nothing is late."""
        return Pending(x, jnp.zeros_like(x))

    def finish(self, x: Pending) -> Float[Array, "B T D"]:
        """The whole stream after the last block."""
        return x.stream + x.late

    def wire(self, x, mix, transform, context):
        alone = not isinstance(x, Pending)
        stream, late = self.begin(x) if alone else x
        new = mix(self.mixer_norm(stream, context))
        stream, late = stream + late, new
        new = transform(self.channel_norm(stream, context))
        x = Pending(stream + late, new)
        return self.finish(x) if alone else x
