"""Pipeline schedules in lockstep: the tables by which one SPMD program runs them.

All stages are ranks of one mesh axis and run the same loop over ticks. In a tick a rank does at
most one forward and then at most one backward pass; after it every rank sends an activation to the
next rank and a gradient to the one before, round the ring. What is sent in tick t can be used from
tick t + 1 on. A rank that has nothing to send sends anything, and the receiver's tables ignore it.

With `table = ticks(schedule)` and `slot = slots(table)` rank s does, for t = 0, 1, ...:

    if slot.activation_store[t, s] >= 0: activations[slot.activation_store[t, s]] = from_previous
    if slot.gradient_store[t, s] >= 0:   gradients[slot.gradient_store[t, s]] = from_next

    if table.forward_microbatch[t, s] >= 0:            # chunk table.forward_chunk[t, s]
        x = activations[slot.activation_read[t, s]]    # -1: the model's first chunk reads the batch
        kept[slot.kept_store[t, s]] = x                # or whatever else backward needs
        y = forward(x)
    if table.backward_microbatch[t, s] >= 0:           # chunk table.backward_chunk[t, s]
        x = kept[slot.kept_read[t, s]]
        dy = gradients[slot.gradient_read[t, s]]       # -1: the model's last chunk, from the loss
        dx, dw = backward(x, dy);  gradient of the chunk += dw

    from_previous = permute(y, s -> s + 1 mod p);  from_next = permute(dx, s -> s - 1 mod p)

The order inside a tick is this one: store, forward, backward, send. A slot that was read in tick t
may be stored into from tick t + 1 on. The buffers need `activations`, `kept` and `gradients` slots;
on a mesh all ranks have the same, the largest.

How much is lost in lockstep. Let a pass through a stage cost 1 forward and 2 backward, or 3 where
it recomputes its activations, and let a tick last as long as its busiest rank. Then `gpipe`,
`eager_1f1b`, `interleaved` and, for m >= p, `modular` have exactly the bubble that they have where
every stage keeps its own time, whatever the two costs: before the last stage's first backward pass
no rank has one, after its last forward pass no rank has one, and in between it never idles.
`1f1b` does lose, in its steady state: a micro-batch is back at the first stage 2 (p - 1) ticks
after it left, which lets p of them pass in 2 p - 1 ticks and not in p. Its bubble tends to
(p - 1) / p for many micro-batches where its own time would have it vanish.

Idle over computing time; the same for backward passes that cost 2 and 3. "Never skips" is a rank
that computes in every tick, and throws away what it does not need. "Held" are passes of the first
stage whose backward is yet to come, through chunks of which v make a stage.

|               | own time | lockstep | never skips | ticks | held | own time | lockstep |
|               | p 4, m 8, v 2 |     |             |       |      | p 8, m 64, v 4 |    |
|---------------|-------|-------|-------|----|----|-------|-------|
| `gpipe`       | 0.375 | 0.375 | 1.625 | 21 |  8 | 0.109 | 0.109 |
| `1f1b`        | 0.375 | 1.000 | 1.375 | 19 |  4 | 0.109 | 0.969 |
| `eager_1f1b`  | 0.375 | 0.375 | 0.750 | 14 |  7 | 0.109 | 0.109 |
| `interleaved` | 0.188 | 0.188 | 0.625 | 26 | 11 | 0.027 | 0.027 |
| `modular`     | 0.188 | 0.188 | 1.313 | 37 | 16 | 0.027 | 0.027 |

So `interleaved` is the one to run in lockstep, with the smallest bubble and, 11 / 2 stages' worth
against 7, with less memory than `eager_1f1b`. The latter serves where m is no multiple of p, where
the layers do not divide into v p chunks, or where only the inputs of chunks are kept, which are as
large for a thin chunk as for a thick one. `modular` pays with memory for gradients that are
complete early.
"""

import dataclasses
import heapq
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from efficient.errors import UserError
from efficient.parallel.schedule_ops import Op, Schedule, execution_order


@dataclasses.dataclass(frozen=True, eq=False)
class Ticks:
    """What each stage does in each tick; -1 where it does nothing.

    Attributes:
      schedule: whose ops these are.
      tick_of: the tick of every (stage, op).
      forward_microbatch, forward_chunk: the forward pass of a tick.
      backward_microbatch, backward_chunk: the backward pass that follows it.
    """

    schedule: Schedule
    tick_of: Mapping[tuple[int, Op], int]
    forward_microbatch: Int[np.ndarray, "ticks stages"]
    forward_chunk: Int[np.ndarray, "ticks stages"]
    backward_microbatch: Int[np.ndarray, "ticks stages"]
    backward_chunk: Int[np.ndarray, "ticks stages"]

    def __len__(self) -> int:
        return len(self.forward_microbatch)


def ticks(schedule: Schedule) -> Ticks:
    """Puts every op into the earliest tick that its inputs and its stage's order allow.

    A forward and the backward that follows it in the stage's order may share a tick; a backward
    and the forward that follows it may not, since forward comes first within a tick.

    Raises:
      UserError: the schedule cannot run to its end.
    """
    found: dict[tuple[int, Op], int] = {}
    latest = [(-1, "B")] * schedule.stages  # of every stage: the tick and the kind of its last op
    for stage, op, needed_ops in execution_order(schedule):
        tick, kind = latest[stage]
        tick += (kind, op.kind) != ("F", "B")
        for other, needed in needed_ops:
            # A pass reads its own stage's forward at once; all else comes over the ring.
            tick = max(tick, found[other, needed] + (needed.kind == op.kind))
        found[stage, op] = tick
        latest[stage] = tick, op.kind
    shape = 1 + max(found.values()), schedule.stages
    arrays = {kind: (np.full(shape, -1), np.full(shape, -1)) for kind in "FB"}
    for (stage, op), tick in found.items():
        microbatch, chunk = arrays[op.kind]
        microbatch[tick, stage], chunk[tick, stage] = op.microbatch, op.chunk
    return Ticks(schedule, found, *arrays["F"], *arrays["B"])


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """Which buffer each tick of each stage stores into and reads from; -1 for none.

    See the module's docstring for when. A store at (t, s) concerns what the neighbour sent in
    tick t - 1.

    Attributes:
      activation_store, activation_read: a chunk's input, from its arrival to its forward pass.
      kept_store, kept_read: what a forward pass leaves to the backward pass.
      gradient_store, gradient_read: a gradient, from its arrival to its backward pass.
      activations, kept, gradients: how many slots of each sort a stage needs.
    """

    activation_store: Int[np.ndarray, "ticks stages"]
    activation_read: Int[np.ndarray, "ticks stages"]
    kept_store: Int[np.ndarray, "ticks stages"]
    kept_read: Int[np.ndarray, "ticks stages"]
    gradient_store: Int[np.ndarray, "ticks stages"]
    gradient_read: Int[np.ndarray, "ticks stages"]
    activations: Int[np.ndarray, "stages"]
    kept: Int[np.ndarray, "stages"]
    gradients: Int[np.ndarray, "stages"]


def slots(table: Ticks) -> Slots:
    """The fewest buffers, and who uses which when."""
    schedule, found = table.schedule, table.tick_of
    waits = {name: [[] for _ in range(schedule.stages)] for name in ("activation", "kept", "grad")}
    for stage, op, needed_ops in execution_order(schedule):
        tick = found[stage, op]
        for other, needed in needed_ops:
            start = found[other, needed]
            if needed.kind != op.kind:
                waits["kept"][stage].append((start, tick))
            else:
                name = "activation" if op.kind == "F" else "grad"
                waits[name][stage].append((start + 1, tick))
    arrays, counts = [], []
    for spans in waits.values():
        store, read = (np.full((len(table), schedule.stages), -1) for _ in range(2))
        counts.append(
            np.array([_assign(spans[s], store[:, s], read[:, s]) for s in range(schedule.stages)])
        )
        arrays += [store, read]
    return Slots(*arrays, *counts)


def _assign(spans: list[tuple[int, int]], store: np.ndarray, read: np.ndarray) -> int:
    """Gives every span of ticks, both ends included, the lowest free slot; how many it took."""
    used, free, busy = 0, [], []
    for start, end in sorted(spans):
        while busy and busy[0][0] < start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, used)
            used += 1
        slot = heapq.heappop(free)
        heapq.heappush(busy, (end, slot))
        store[start], read[end] = slot, slot
    return used


def lockstep_time(
    table: Ticks, forward: float = 1.0, backward: float = 2.0, skip: bool = True
) -> float:
    """How long the loop over ticks takes where a tick lasts as long as its busiest rank.

    Args:
      table: the ticks.
      forward, backward: what one pass of a micro-batch through a whole stage costs.
      skip: whether a rank skips a pass that it does not have, or does it for nothing.
    """
    if not min(forward, backward) > 0:
        raise UserError(f"costs must be positive, not forward {forward}, backward {backward}")
    chunks = table.schedule.chunks
    if not skip:
        return len(table) * (forward + backward) / chunks
    busy = (table.forward_microbatch >= 0) * forward + (table.backward_microbatch >= 0) * backward
    return busy.max(axis=1).sum() / chunks


def lockstep_bubble(
    table: Ticks, forward: float = 1.0, backward: float = 2.0, skip: bool = True
) -> float:
    """The idle time of a stage in lockstep over its time of computing; see `lockstep_time`."""
    ideal = table.schedule.microbatches * (forward + backward)
    return lockstep_time(table, forward, backward, skip) / ideal - 1
