"""Megatron-LM: two products of a sublayer split so that they need one sum over devices.

"Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", Shoeybi,
Patwary, Puri, LeGresley, Casper and Catanzaro 2019, arXiv 1909.08053. Of t devices the i-th holds

    columns of the first matrix    Y_i = act(X A_i)        A = [A_1 ... A_t], and Q, K, V by heads
    rows of the second             Z = sum_i Y_i B_i       B = [B_1; ...; B_t]

so that X has to be whole on every device (f: the identity, whose gradient is an all-reduce) and Z
is one all-reduce (g, whose gradient is the identity). The embedding and the head are split by rows
of the vocabulary: a device looks up the tokens that it has, zero for others, and the sum over
devices is the embedding; of the logits each device has V / t columns, and the cross-entropy takes
their maximum, the sum of their exponentials and the logit of the target over devices, one number a
token each. Logits are never gathered.

Between sublayers all t devices would do the same norms, dropouts and residual sums. "Reducing
Activation Recomputation in Large Transformer Models" (Korthikanti et al. 2022, arXiv 2205.05198)
gives each a t-th of the sequence there: g becomes a reduce-scatter along the sequence and f an
all-gather, which together are an all-reduce, so that the bytes are the same and the activations of
these parts are a t-th.

All of it is `RULES`, the default of `parallel.placement`: XLA's partitioner inserts what they ask
for. The plain form of 2019 is one rule of a config:

    placement = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from efficient.papers import Claim, Paper
from pallas_kernels import mesh

BATCH_AXES = ("data", "fsdp")

_COLUMN, _ROW = r".*/(q|k|v|up|gate)(/base)?", r".*/(out|down)(/base)?"
# Column and row splits over tensor, crossed with fully sharded data parallelism.
RULES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (rf"{_COLUMN}/kernel", ("fsdp", "tensor")),
    (rf"{_ROW}/kernel", ("tensor", "fsdp")),
    (rf"{_COLUMN}/bias", ("tensor",)),
    # The same splits of Monarch's factors (see pallas_kernels/monarch_matmul/split.py) and of two
    # thin ones, between which a column split has no sum and a row split one of the rank's size.
    (rf"{_COLUMN}/right", ("tensor", "fsdp")),
    (rf"{_COLUMN}/left", (None, "fsdp", "tensor")),
    (rf"{_ROW}/right", ("tensor", "fsdp")),
    (rf"{_ROW}/left", (None, "tensor", "fsdp")),
    (rf"{_COLUMN}/down", ("fsdp",)),
    (rf"{_COLUMN}/up", ("fsdp", "tensor")),
    (rf"{_ROW}/down", ("tensor", "fsdp")),
    (rf"{_ROW}/up", (None, "fsdp")),
    # Four-bit kernels and what belongs to their groups of rows, split as the kernel is.
    (rf"{_COLUMN}/(packed|scales|zeros)", ("fsdp", "tensor")),
    (rf"{_ROW}/(packed|scales|zeros)", ("tensor", "fsdp")),
    # Blocks and factors of structured linears, which every device gathers (see linears/layout.py).
    (r".*/blocks", ("tensor", "fsdp")),
    (r".*/twiddle", (None, None, None, ("tensor", "fsdp"))),
    (r"embed/table", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    # Residuals and norms [B, T, D] work on a part of the sequence; a mixer or channel reads all of
    # it. Heads are [B, T, N, H], logits [B, T, V].
    (r"activations/tokens", (BATCH_AXES, ("sequence", "tensor"))),
    (r"activations/inputs", (BATCH_AXES, "sequence")),
    (r"activations/heads", (BATCH_AXES, "sequence", "tensor")),
    (r"activations/logits", (BATCH_AXES, "sequence", "tensor")),
)

_TEST = "tests/papers/test_megatron.py"
PAPER = Paper(
    slug="megatron",
    status="equations",
    claims=(
        Claim(
            "a sublayer has one all-reduce forward and one backward",
            f"{_TEST}::test_sums_of_a_step",
            True,
            "in the program that the TPU compiler makes for 16 chips",
        ),
        Claim(
            "embedding and loss are parallel in the vocabulary, and logits are not gathered",
            f"{_TEST}::test_no_device_holds_the_logits",
            True,
        ),
        Claim(
            "norms and residuals split along the sequence move as many bytes",
            f"{_TEST}::test_a_split_residual_moves_as_many_bytes",
            True,
            "of arXiv 2205.05198",
        ),
        Claim(
            "the split model computes what the whole one does",
            "tests/test_mesh.py::test_a_mesh_takes_the_steps_of_one_device",
            True,
            "loss and gradients of a step and of twenty",
        ),
        Claim("8.3 billion parameters at 76% of linear scaling on 512 GPUs", note="needs GPUs"),
        Claim("perplexity of 10.8 on WikiText103", note="needs the corpus and a cluster"),
    ),
    source="the abstracts; the papers' texts were not read. The splits are those that are commonly"
    " described, and their collectives are counted here",
    departures=(
        "a vocabulary that tensor does not divide is not padded but stays whole on every device",
        "randomness is derived from step and layer, the same on all devices, so that dropout needs"
        " no generator of its own for split and whole parts",
    ),
)


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], rows: NamedSharding, at: NamedSharding
) -> Float[Array, "B T D"]:
    """Rows of a table that is split by rows: zeros for those of other devices, and their sum.

    What XLA's partitioner makes of a lookup, which it aborts on within a shard_map over some of the
    axes where others split both the rows and the tokens.

    Args:
      rows: where the table lies, its rows over some axes and D whole.
      at: where the tokens lie.
    """
    axes = rows.spec[0]

    def local(table, tokens):
        count = len(table)
        index = tokens - jax.lax.axis_index(axes) * count
        here = (index >= 0) & (index < count)
        found = jnp.take(table, jnp.clip(index, 0, count - 1), axis=0)
        return jax.lax.psum(jnp.where(here[..., None], found, 0), axes)

    specs = (P(axes, None), at.spec)
    return mesh.shard_map(local, rows.mesh, specs, P(*at.spec, *(None,) * (3 - len(at.spec))))(
        table, tokens
    )
