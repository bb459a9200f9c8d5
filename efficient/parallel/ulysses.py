"""DeepSpeed-Ulysses: tokens split over devices outside of attention, heads inside, by all-to-all.

"DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
Models", Jacobs, Tanaka, Zhang, Zhang, Song, Rajbhandari and He 2023, arXiv 2309.14509. Each of P
devices holds T / P tokens. Before attention an all-to-all of q, k and v gives device p all tokens
of the p-th part of the heads; whole sequences are then attended to there, by any implementation
and with any mask, and an all-to-all of the result gives each device its tokens back:

    [T / P, N, H]  ->  [T, N / P, H]  ->  attention  ->  [T, N / P, H]  ->  [T / P, N, H]

A device sends (2 N + 2 K) (T / P) H (P - 1) / P elements, which stays the same where T and P grow
together. P divides the heads; `lightseq` has no such bound, and sends 2 K (T / P) H (P - 1).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.papers import Claim, Paper
from efficient.registry import register
from pallas_kernels.attention import Full, Heads, Mask, attention
from pallas_kernels.mesh import shard_map, size

_TEST = "tests/papers/test_ulysses.py"

PAPER = Paper(
    slug="ulysses",
    status="equations",
    claims=(
        Claim(
            "attention over split sequences is that of one device",
            f"{_TEST}::test_values_and_gradients",
            True,
            "values and gradients against a softmax in float64; at 32,768 tokens over eight devices"
            " against one (test_lightseq.py::test_long_sequences_are_those_of_one_device)",
        ),
        Claim(
            "a device sends what an all-to-all of q, k, v and of the output takes",
            f"{_TEST}::test_bytes_are_those_of_the_formula",
            True,
            "bytes of the compiled program, forward and with gradients",
        ),
        Claim(
            "communication stays the same where sequence and devices grow together",
            f"{_TEST}::test_communication_is_constant_where_length_and_devices_grow",
            True,
        ),
        Claim(
            "it is agnostic of the attention: dense or sparse, by head too",
            f"{_TEST}::test_masks_that_name_heads",
            True,
        ),
        Claim("training is 2.5 times as fast at 4 times the length", note="needs accelerators"),
    ),
    source="github.com/microsoft/DeepSpeed, deepspeed/sequence/layer.py; arXiv 2309.14509's"
    " abstract",
    departures=(
        "a key head is sent to each device whose queries read it, so that key heads may be fewer"
        " than devices; the code read splits q, k and v alike",
        "parameters are placed by this project's rules, not by ZeRO-3",
    ),
)


class Layout(NamedTuple):
    """How q [B, T, N, H] lies on a mesh: axes of the batch, of the tokens, of the heads."""

    mesh: Mesh
    batch: str | tuple[str, ...] | None
    tokens: str | tuple[str, ...]
    heads: str | tuple[str, ...] | None

    @classmethod
    def of(cls, op: str, sharding: NamedSharding, q: jax.Array, cut: int = 1) -> "Layout":
        """The layout that `sharding` gives, for sequences of which a device has `cut` parts.

        Raises:
          UserError: another sharding, or one that q does not divide into.
        """
        form = "NamedSharding(mesh, P(batch_axes, sequence_axis, head_axes, None))"
        spec = sharding.spec if isinstance(sharding, NamedSharding) else ()
        b, t, n, h = (*spec, *(None,) * 4)[:4]
        if t is None or h is not None or len(spec) > 4:
            raise UserError(f"{op}: sharding must be {form} of q, got {sharding!r}")
        found = cls(sharding.mesh, b, t, n)
        for what, length, axes in (("sequences", q.shape[0], b), ("heads", q.shape[2], n)):
            if length % size(found.mesh, axes):
                raise UserError(
                    f"{op}: {length} {what} do not divide over {_sizes(found.mesh, axes)}"
                )
        cuts = cut * found.ways
        if q.shape[1] % cuts:
            near = max(1, round(q.shape[1] / cuts)) * cuts
            raise UserError(
                f"{op}: a length of {q.shape[1]} does not divide into the {cuts} parts that"
                f" {_sizes(found.mesh, t)} needs; the nearest that does is {near}"
            )
        return found

    @property
    def ways(self) -> int:
        return size(self.mesh, self.tokens)

    @property
    def head_ways(self) -> int:
        return size(self.mesh, self.heads)

    @property
    def spec(self) -> P:
        """Of q, k and v."""
        return P(self.batch, self.tokens, self.heads, None)

    def repeated(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """k and v with their heads repeated just enough to divide over the shards of heads."""
        copies = self.head_ways // math.gcd(arrays[0].shape[2], self.head_ways)
        return tuple(jnp.repeat(x, copies, 2) if copies > 1 else x for x in arrays)


def _sizes(mesh: Mesh, axes: str | tuple[str, ...] | None) -> str:
    axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return " x ".join(f"config.mesh.{axis}={mesh.shape[axis]}" for axis in axes)


def ulysses_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    sharding: NamedSharding,
    mask: Mask = Full(),
    segment_ids: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of sequences whose tokens are split over a mesh, as `attention` gives it.

    Args:
      q, k, v: global arrays, tokens in their order; key head n // (N / K) serves query head n.
      sharding: of q, `NamedSharding(mesh, P(batch_axes, sequence_axis, head_axes, None))` on a mesh
        of Auto axes. Any of the axes but the sequence's may be None.
      mask, segment_ids, softcap, implementation: those of `pallas_kernels.attention.attention`.

    Raises:
      UserError: heads, sequences or tokens that do not divide over the mesh.
    """
    layout = Layout.of("ulysses", sharding, q)
    heads, shards = q.shape[2], layout.head_ways * layout.ways
    if heads % shards:
        over = " x ".join(_sizes(layout.mesh, x) for x in (layout.heads, layout.tokens) if x)
        raise UserError(
            f"ulysses: {heads} heads do not divide over {over}; lower one of these, take a multiple"
            f" of {shards} heads, or let lightseq split the sequence"
        )
    mask.check(heads, q.shape[1], q.shape[1])
    shares = _masks_by_rank(mask, heads, shards)
    k, v = layout.repeated(k, v)

    def local(q, k, v, ids):
        whole = [_to_heads(q, layout), *_keys_to_heads(q.shape[2], (k, v), layout)]
        how = {"segment_ids": ids, "softcap": softcap, "implementation": implementation}
        distinct = list(dict.fromkeys(shares))
        branches = [functools.partial(attention, mask=mask, **how) for mask in distinct]
        if len(branches) == 1:
            out = branches[0](*whole)
        else:
            names = [(x,) if isinstance(x, str) else x for x in (layout.heads, layout.tokens) if x]
            rank = jax.lax.axis_index(sum(names, ()))
            which = jnp.array([distinct.index(mask) for mask in shares])[rank]
            out = jax.lax.switch(which, branches, *whole)
        return jax.lax.all_to_all(out, layout.tokens, 1, 2, tiled=True)

    mapped = shard_map(
        local,
        mesh=layout.mesh,
        # Every device needs the ids of whole sequences, a small part of what q, k and v are.
        in_specs=(layout.spec,) * 3 + (None if segment_ids is None else P(layout.batch, None),),
        out_specs=layout.spec,
    )
    return jax.jit(mapped)(q, k, v, segment_ids)  # for a call outside of jit


def _masks_by_rank(mask: Mask, heads: int, shards: int) -> list[Mask]:
    """The mask of the heads of each rank; one that names no heads is everyone's."""
    if not mask.names_heads():
        return [mask] * shards
    each = heads // shards
    return [Heads([mask.head(r * each + i) for i in range(each)]) for r in range(shards)]


def _to_heads(x, layout):
    """All tokens of this rank's part of the heads, from this rank's tokens of all heads."""
    return jax.lax.all_to_all(x, layout.tokens, 2, 1, tiled=True)


def _keys_to_heads(heads, arrays, layout):
    """k and v for the query heads that this rank gets, out of `heads`.

    Of several ways to bring few key heads to many ranks this moves the fewest bytes: a rank
    receives the key heads that its queries read and no other, each once. A gather would bring it
    all of them, repeating them up to the query heads one for every query head. An all-to-all gives
    all ranks equally much: where some read more key heads than others, the most of them counts.
    """
    wanted, serves = key_heads(heads, arrays[0].shape[2], layout.ways)
    arrays = [_to_heads(_pick(x, wanted.reshape(-1)), layout) for x in arrays]
    if np.array_equal(serves, np.broadcast_to(np.arange(wanted.shape[1]), wanted.shape)):
        return arrays
    here = jnp.asarray(serves)[jax.lax.axis_index(layout.tokens)]
    return [jnp.take(x, here, axis=2) for x in arrays]


def key_heads(heads: int, kv_heads: int, ways: int) -> tuple[np.ndarray, np.ndarray]:
    """Which key heads each of `ways` ranks receives, and how they serve its query heads.

    Returns:
      wanted: [ways, W], key heads that rank p receives; the last is repeated where it reads fewer.
      serves: [ways, U], which of them serves each U-th part of the rank's query heads.
    """
    own, group = heads // ways, heads // kv_heads
    first = np.arange(ways) * own
    low, high = first // group, (first + own - 1) // group
    wanted = low[:, None] + np.arange((high - low).max() + 1)
    unit = math.gcd(own, group)  # neighbours that have their key head in common on every rank
    serves = (first[:, None] + np.arange(0, own, unit)) // group - low[:, None]
    return np.minimum(wanted, high[:, None]), serves


def _pick(x, index):
    """x at these heads; a repetition of all heads by what has a sum for its derivative."""
    copies = -(-len(index) // x.shape[2])
    if np.array_equal(index, np.repeat(np.arange(x.shape[2]), copies)):
        return jnp.repeat(x, copies, 2) if copies > 1 else x
    return jnp.take(x, index, axis=2)


@register("sequence", "ulysses")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses:
    """Sequence parallelism by all-to-all; see `ulysses_attention`."""

    def order_of(self, length: int, ways: int, causal: bool) -> np.ndarray | None:
        """In which order tokens lie on the devices; None for their own."""
        del length, ways, causal
        return None

    def __call__(self, q, k, v, *, sharding, mask, segment_ids, softcap, implementation, permuted):
        if permuted:
            raise UserError("ulysses: tokens must lie in their own order; order_of gives no other")
        return ulysses_attention(
            q, k, v, sharding=sharding, mask=mask, segment_ids=segment_ids, softcap=softcap,
            implementation=implementation,
        )  # fmt: skip
