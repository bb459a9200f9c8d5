"""Distributed Lion: replicas that send signs in place of gradients.

"Communication Efficient Distributed Training with Distributed Lion", Liu, Wu, Chen, Liang, Zhu,
Liang, Krishnamoorthi and Liu 2024, arXiv 2404.00438. Replica i of N has gradients g_i of its own
examples and a momentum m_i of its own:

    d_i = sign(b1 m_i + (1 - b1) g_i)        one bit a parameter, all that it sends
    m_i = b2 m_i + (1 - b2) g_i
    D   = sign(sum of d_i)  (vote="majority")    or  (sum of d_i) / N  (vote="average")
    x  -= learning_rate (D + weight_decay x)

so that x stays the same on all. The paper has a server to which the signs go and from which D
comes back. Here each replica is the server of an N-th of the parameters: an all-to-all brings it
everyone's bits of its part, an all-gather takes D of its part to everyone. For n parameters a
replica sends (N - 1) / N n / 8 bytes each way, and 8 bits a parameter back for the average, whose
counts go up to N <= 255; gradients in float32, summed by an all-reduce, are 2 (N - 1) / N 4 n.

As in the authors' code, signs are of one bit: what is not above zero is below it, so that a
parameter without a gradient moves down by the learning rate, and of an even number of replicas a
tie is lost by +1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, UInt8

from efficient.errors import UserError, nearest
from efficient.optimizers.common import Mask, Schedule, check_numbers, scheduled
from efficient.papers import Claim, Paper
from efficient.registry import register

VOTES = ("majority", "average")
TILE = 1024  # bytes; XLA for TPUs gathers other lengths by an all-reduce, twice the bytes
AXIS = "data"
_TEST = "tests/papers/test_distributed_lion.py"

PAPER = Paper(
    slug="distributed_lion",
    status="equations",
    claims=(
        Claim(
            "each replica keeps its momentum, sends signs, and all apply the same vote or average",
            f"{_TEST}::test_steps_are_those_of_the_equations",
            True,
        ),
        Claim(
            "one bit a parameter is sent and one, or log N, come back",
            f"{_TEST}::test_bytes_of_the_tpu_program",
            True,
            "8 bits come back for the average",
        ),
        Claim(
            "with one replica it is Lion",
            f"{_TEST}::test_one_replica_is_lion",
            True,
            "but for signs of zero",
        ),
        Claim(
            "accuracy comparable to Lion and AdamW on aggregated gradients, on CIFAR-10, ImageNet"
            " and language models",
            note="needs those data and GPUs",
        ),
        Claim(
            "a better balance of accuracy and bandwidth than deep gradient compression and ternary"
            " gradients",
            note="neither is here",
        ),
    ),
    source="https://github.com/kyleliang919/distributed-lion-pytorch",
)


class State(NamedTuple):
    """A replica's momentum, by path."""

    momentum: dict[str, Array]


def replicas() -> int:
    """Those that vote: the size of the mesh's data axis in a shard_map over it, else 1."""
    try:
        return jax.lax.axis_size(AXIS)
    except NameError:
        return 1


def packed(bits: Bool[Array, "n"], parts: int) -> UInt8[Array, "parts bytes"]:
    """Eight bits a byte, in equal parts of whole tiles; zeros fill them up."""
    more = -bits.size % (8 * TILE * parts)
    return jnp.packbits(jnp.pad(bits, (0, more))).reshape(parts, -1)


def votes(up: Bool[Array, "n"], majority: bool) -> Float[Array, "n"]:
    """D of n parameters from this replica's signs, True for +1."""
    n, count = up.size, replicas()
    mine = packed(up, count)
    if count > 1:
        mine = jax.lax.all_to_all(mine, AXIS, split_axis=0, concat_axis=0)
    ups = jnp.unpackbits(mine, axis=1).astype(jnp.int32).sum(0)  # of an N-th of the parameters
    if majority:
        found = jnp.packbits(2 * ups > count)
    else:
        found = ups.astype(jnp.uint8)
    if count > 1:
        found = jax.lax.all_gather(found, AXIS, tiled=True)
    if majority:
        return 2.0 * jnp.unpackbits(found)[:n] - 1.0
    return 2.0 * found[:n] / count - 1.0


def scale_by_votes(b1, b2, vote: str) -> optax.GradientTransformation:
    """Gradients of a replica to D; the state is its momentum."""

    def init(params):
        return State(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        momentum = state.momentum
        if vote == "average" and replicas() > 255:
            raise UserError(f"distributed_lion: vote='average' counts 255 replicas, {replicas()=}")
        paths = sorted(grads)
        mixed = {p: b1 * momentum[p] + (1 - b1) * grads[p] for p in paths}
        flat = jnp.concatenate([(mixed[p] > 0).reshape(-1) for p in paths])
        flat = votes(flat, vote == "majority")
        ends = [0]
        for path in paths:
            ends.append(ends[-1] + math.prod(grads[path].shape))
        found = {
            p: flat[start:end].reshape(grads[p].shape).astype(grads[p].dtype)
            for p, start, end in zip(paths, ends, ends[1:])
        }
        momentum = {p: b2 * momentum[p] + (1 - b2) * grads[p] for p in momentum}
        return found, State(momentum)

    return optax.GradientTransformation(init, update)


@register("optimizer", "distributed_lion", replicas=True)
def distributed_lion(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.99,
    weight_decay: float | Schedule = 0.0,
    vote: str = "majority",
) -> optax.GradientTransformation:
    """Lion of which the replicas of the mesh's data axis vote on every step.

    Args:
      vote: "majority" or "average" of the replicas' signs.
    """
    check_numbers(b1=b1, b2=b2, weight_decay=weight_decay)
    if vote not in VOTES:
        raise UserError(f"distributed_lion: vote={vote!r}; {nearest(vote, VOTES)}")

    def build(b1, b2, weight_decay):
        return optax.chain(
            scale_by_votes(b1, b2, vote),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    return scheduled(build, b1=b1, b2=b2, weight_decay=weight_decay)
