"""LightSeq: keys and values travel around a ring of devices, each with its part of the tokens.

"LightSeq: Sequence Level Parallelism for Distributed Training of Long Context Transformers", Li,
Shao, Xie, Xing, Gonzalez, Stoica, Ma and Zhang 2023, arXiv 2310.03294, in its second version
"DistFlashAttn: Distributed Memory-efficient Attention for Long-context LLMs Training". Of P ranks
each holds T / P tokens. In step r rank i attends from its queries to the keys of rank i - r and
merges what it finds by log-sum-exp,

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,

while the keys of step r + 1 are on their way. Backward the keys go around again, and with them the
sums of their gradients, from out and lse of the whole sequence:

    p = exp(x - lse),    dx = p (dout v^T - sum(dout out)),
    dq = dx k,    dk = dx^T q,    dv = p^T dout

Three ideas of the paper:

- Balance. Under a causal mask rank 0 would have one part to attend to and rank P - 1 all of them.
  Here the sequence is cut into 2 P chunks of which rank i holds i and 2 P - 1 - i (`zigzag`): every
  rank has the same work in every step.
- Overlap. No step waits for what is sent in it.
- Checkpoints at the output of attention. `out` and `lse` bear the names "attention_out" and
  "attention_lse": a `jax.checkpoint` whose policy saves them does not attend a second time.

A rank sends (P - 1) 2 K (T / P) H elements forward, of any number of heads.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from efficient.errors import UserError, nearest
from efficient.papers import Claim, Paper
from efficient.parallel.ring_plan import ORDERS, Step, plan, zigzag
from efficient.parallel.ulysses import Layout
from efficient.registry import register
from pallas_kernels.attention import Full, Mask, merge
from pallas_kernels.attention.api import part, part_gradients
from pallas_kernels.mesh import shard_map

_TEST = "tests/papers/test_lightseq.py"

PAPER = Paper(
    slug="lightseq",
    status="equations",
    claims=(
        Claim(
            "attention over split sequences is that of one device",
            f"{_TEST}::test_values_and_gradients",
            True,
            "values and gradients against a softmax in float64; at 32,768 tokens over eight devices"
            " against one (test_long_sequences_are_those_of_one_device)",
        ),
        Claim(
            "causal work is balanced over the devices",
            f"{_TEST}::test_work_is_balanced",
            True,
            "in zigzag order every rank has the same work in every step",
        ),
        Claim(
            "communication overlaps with computation",
            f"{_TEST}::test_a_tpu_attends_while_keys_travel",
            True,
            "in the schedule that the compiler for a TPU v5e makes; nothing was run",
        ),
        Claim(
            "checkpoints at the output of attention spare its second forward pass",
            f"{_TEST}::test_a_checkpoint_of_the_output_spares_the_second_pass",
            True,
        ),
        Claim(
            "any number of heads and of key heads, multi-query attention too",
            f"{_TEST}::test_values_and_gradients",
            True,
        ),
        Claim(
            "a device's memory falls as the number of devices grows",
            f"{_TEST}::test_memory_falls_with_the_devices",
            True,
            "temporaries of both passes, compiled for 2, 4 and 8 CPU devices, 131,072 tokens and a"
            " head of 128: 252, 171 and 87 MB",
        ),
        Claim(
            "up to 4.7 times less communication than Megatron-LM",
            note="the ring's own bytes are counted (test_bytes_are_those_of_the_formula);"
            " Megatron-LM is not here",
        ),
        Claim("1.24 to 2.01 times as fast as Megatron-LM", note="needs accelerators"),
        Claim("2 to 8 times longer sequences on models with few heads", note="needs accelerators"),
    ),
    source="github.com/RulinShao/LightSeq, lightseq/lightseq_async_attn.py and"
    " lightseq_ckpt_monkey_patch.py; arXiv 2310.03294's abstract; zigzag order as in"
    " github.com/zhuzilin/ring-flash-attention",
    departures=(
        "the paper keeps tokens in their order and has ranks without work attend for others, in"
        " P / 2 + 1 steps; here tokens lie in zigzag order, in P steps",
        "windows skip the steps in which no rank has anything to see",
    ),
)


class _Ring(NamedTuple):
    """What is static about a call."""

    layout: Layout
    steps: tuple[Step, ...]
    softcap: float | None
    implementation: str | None

    def on_mesh(self, compute, arrays, *results):
        """compute(self, *arrays) on each rank, with results that lie as these arrays."""
        batch, tokens, heads = self.layout[1:]
        specs = {4: self.layout.spec, 3: P(batch, heads, tokens), 2: P(batch, tokens)}
        mapped = shard_map(
            functools.partial(compute, self),
            mesh=self.layout.mesh,
            in_specs=tuple(None if x is None else specs[x.ndim] for x in arrays),
            out_specs=tuple(specs[ndim] for ndim in results),
        )
        return jax.jit(mapped)(*arrays)  # for a call outside of jit

    def send(self, arrays, hop):
        """Arrays to the rank `hop` further on, from the one as far behind."""
        ways = self.layout.ways
        pairs = [(i, (i + hop) % ways) for i in range(ways)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.layout.tokens, pairs), arrays)

    def part(self, of_q, of_kv, piece):
        """Arguments of `part` and `part_gradients` for a piece, beside the arrays."""
        ids = None
        if of_q is not None:
            ids = of_q[:, slice(*piece.queries)], of_kv[:, slice(*piece.keys)]
        return {
            "segment_ids": ids, "mask": piece.mask, "scale": None, "softcap": self.softcap,
            "implementation": self.implementation,
        }  # fmt: skip

    def around(self, turn, state):
        """The state after turn(state, choose, before, after) for each step.

        choose(compute, ...) is compute(job, ...) of the rank's job in the step; before and after
        are the hops from the step before and to the next, None where there is none. Steps alike in
        them are one loop: a program is as long for many ranks as for a few.
        """
        numbers = [step.number for step in self.steps]
        hops = [after - before for before, after in itertools.pairwise(numbers)]
        each = zip(self.steps, [None, *hops], [*hops, None], strict=True)
        rank = jax.lax.axis_index(self.layout.tokens)
        for (before, after), group in itertools.groupby(each, lambda x: x[1:]):
            rows = [step.jobs for step, *_ in group]
            jobs = list(dict.fromkeys(itertools.chain(*rows)))
            table = np.array([[jobs.index(job) for job in row] for row in rows])

            def one(state, row, jobs=jobs, before=before, after=after):
                choose = functools.partial(_choose, jobs, row[rank])
                return turn(state, choose, before, after), None

            if len(rows) == 1:
                state, _ = one(state, jnp.asarray(table[0]))
            else:
                state, _ = jax.lax.scan(one, state, jnp.asarray(table))
        return state


def _choose(jobs, which, compute, *operands):
    branches = [functools.partial(compute, job) for job in jobs]
    return branches[0](*operands) if len(jobs) == 1 else jax.lax.switch(which, branches, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring, q, k, v, ids):
    return _ring_forward(ring, q, k, v, ids)[0]


def _ring_forward(ring, q, k, v, ids):
    out, lse = ring.on_mesh(_forward, (q, k, v, ids), 4, 3)
    # Named here and not around the call, for these are what the backward pass reads.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, ids, out, lse)


def _ring_backward(ring, residuals, dout):
    # Without it the compiler sends the first keys once for both passes, and keeps them in between.
    arrays = jax.lax.optimization_barrier((*residuals, dout))
    return *ring.on_mesh(_backward, arrays, 4, 4, 4), None


_ring.defvjp(_ring_forward, _ring_backward)


def _forward(ring, q, k, v, ids):
    """(out, lse) of a rank's queries."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    B, T, N, _ = q.shape

    def attend(job, held, found):
        k, v, of_kv = held
        out, lse = found
        for piece in job:
            rows, keys = slice(*piece.queries), slice(*piece.keys)
            how = ring.part(ids, of_kv, piece)
            new = part(q[:, rows], k[:, keys], v[:, keys], **how)
            some_out, some_lse = merge([(out[:, rows], lse[:, :, rows]), new])
            out, lse = out.at[:, rows].set(some_out), lse.at[:, :, rows].set(some_lse)
        return out, lse

    def turn(state, choose, before, after):
        held, found = state
        coming = held if after is None else ring.send(held, after)
        return coming, choose(attend, held, found)

    nothing = jnp.zeros(q.shape, wide), jnp.full((B, N, T), -jnp.inf, wide)
    _, (out, lse) = ring.around(turn, ((k, v, ids), nothing))
    return out.astype(v.dtype), lse


def _backward(ring, q, k, v, ids, out, lse, dout):
    """(dq, dk, dv): sums in float32, those of keys by the rank where the keys are."""
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def gradients(job, held, dq):
        k, v, of_kv = held
        total = [dq, jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)]
        for piece in job:
            rows, keys = slice(*piece.queries), slice(*piece.keys)
            new = part_gradients(
                q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], dout[:, rows],
                **ring.part(ids, of_kv, piece),
            )  # fmt: skip
            for i, (x, where) in enumerate(zip(new, (rows, keys, keys), strict=True)):
                total[i] = total[i].at[:, where].set(total[i][:, where] + x.astype(wide))
        return total

    def turn(state, choose, before, after):
        held, dheld, dq = state
        coming = held if after is None else ring.send(held, after)
        # What other ranks have found for the keys comes a turn behind them, during this one's work.
        dheld = dheld if before is None else ring.send(dheld, before)
        dq, *found = choose(gradients, held, dq)
        return coming, jax.tree.map(jnp.add, dheld, found), dq

    start = [jnp.zeros(x.shape, wide) for x in (k, v)]
    _, found, dq = ring.around(turn, ((k, v, ids), start, jnp.zeros(q.shape, wide)))
    dk, dv = found[0].astype(k.dtype), found[1].astype(v.dtype)
    home = -ring.steps[-1].number % ring.layout.ways
    return dq.astype(q.dtype), *(ring.send((dk, dv), home) if home else (dk, dv))


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    sharding: NamedSharding,
    mask: Mask = Full(),
    segment_ids: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    order: str = "contiguous",
) -> Float[Array, "B T N H"]:
    """Attention of sequences whose tokens are split over a mesh, as `attention` gives it.

    Args:
      q, k, v, segment_ids: global arrays, tokens in `order`; key head n // (N / K) serves query
        head n.
      sharding: of q, `NamedSharding(mesh, P(batch_axes, sequence_axis, head_axes, None))` on a mesh
        of Auto axes. Any of the axes but the sequence's may be None.
      mask: of the distance of query and key: Full, Causal, Window and what `&` and `|` make of
        them. It speaks of the tokens' own positions, in every order.
      softcap: as in `pallas_kernels.attention.attention`.
      implementation: likewise, but for "reference".
      order: "contiguous", or "zigzag": `zigzag(T, ways)` of the tokens.

    Raises:
      UserError: heads, sequences or tokens that do not divide over the mesh; another mask.
    """
    if order not in ORDERS:
        raise UserError(f"lightseq: order={order!r} is none; {nearest(order, ORDERS)}")
    if implementation == "reference":
        raise UserError("lightseq: implementation='reference' has no parts; take 'blockwise'")
    layout = Layout.of("lightseq", sharding, q, cut=2 if order == "zigzag" else 1)
    if q.shape[2] % k.shape[2]:
        raise UserError(f"lightseq: {q.shape[2]} heads do not divide into {k.shape[2]} kv_heads")
    mask.check(q.shape[2], q.shape[1], q.shape[1])
    steps = plan(mask, q.shape[1], layout.ways, order)
    k, v = layout.repeated(k, v)
    return _ring(_Ring(layout, steps, softcap, implementation), q, k, v, segment_ids)


@register("sequence", "ring")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """Sequence parallelism by a ring; see `ring_attention`. `order` is that of causal models."""

    order: str = "zigzag"

    def __post_init__(self):
        if self.order not in ORDERS:
            raise UserError(
                f"lightseq: order={self.order!r} is none; {nearest(self.order, ORDERS)}"
            )

    def order_of(self, length: int, ways: int, causal: bool) -> np.ndarray | None:
        """In which order tokens lie on the devices; None for their own."""
        return zigzag(length, ways) if causal and self.order == "zigzag" else None

    def __call__(self, q, k, v, *, sharding, mask, segment_ids, softcap, implementation, permuted):
        return ring_attention(
            q, k, v, sharding=sharding, mask=mask, segment_ids=segment_ids, softcap=softcap,
            implementation=implementation, order="zigzag" if permuted else "contiguous",
        )  # fmt: skip
