"""Pipelined training steps: a schedule's table, run by all stages as one program.

The layers of a model's stack of blocks are dealt to the `pipeline` axis of the mesh: with v chunks
a stage, chunk c of stage s are the layers (c p + s) n to (c p + s + 1) n - 1, n = L / (p v). What
comes before the blocks (the embedding) is computed on the first stage and what comes after (the
last norm, the head and the loss) on the last. The microbatches are those of `config.accumulate`,
with the same randomness, so that the step is the one that accumulates gradients without a
pipeline.

    forward pass    keeps its input alone, and sends what the chunk makes of it to the next stage
    backward pass   computes the chunk again, from that input (GPipe's rematerialisation), adds to
                    the chunk's gradients and sends that of the input to the stage before

in the ticks of `schedule_table`. Every stage runs one loop over ticks in a `shard_map` over the
pipeline axis alone; within it the other axes are XLA's to partition by the usual rules. A pass
that a stage does not have in a tick is a branch that is not taken. Not so on fake devices of a CPU
where several axes split arrays beside the pipeline: there every stage computes every pass and drops
what is not its own, for XLA may then put a collective-permute into a branch, at which the CPU's
runtime waits for all devices of the mesh, those of other stages too, for ever.

Models are not written for this: the objective is called twice, once until it reaches the stack and
once with what the stack gives.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from efficient import model as model_lib
from efficient.errors import UserError
from efficient.parallel.cut import Cut
from efficient.parallel.placement import Placement
from efficient.parallel.schedule_ops import Schedule
from efficient.parallel.schedule_table import slots, ticks
from efficient.scope import Context
from pallas_kernels.mesh import constrain

AXIS = "pipeline"
Arrays = Mapping[str, Array]


class _Reached(Exception):
    """A model's call has come to its stack."""

    def __init__(self, x: Array, context: Context):
        self.x, self.context = x, context


class Tick(NamedTuple):
    """What one stage does in one tick, or all stages in all ticks, of `Ticks` and `Slots`."""

    activation_store: Any
    gradient_store: Any
    forward_microbatch: Any
    forward_chunk: Any
    activation_read: Any
    kept_store: Any
    backward_microbatch: Any
    backward_chunk: Any
    kept_read: Any
    gradient_read: Any


class State(NamedTuple):
    """What a stage carries from tick to tick.

    Attributes:
      activations, kept, gradients: buffers of inputs that wait, inputs of which a backward pass is
        to come, and gradients that wait.
      from_previous, from_next: what the neighbours sent last.
      blocks, others: sums of gradients, float32.
      metrics: sums of metrics times weight, and of weights.
    """

    activations: Any
    kept: Any
    gradients: Any
    from_previous: Any
    from_next: Any
    blocks: dict[str, Array]
    others: dict[str, Array]
    metrics: dict[str, Array]


def gradients(
    phase,
    placement: Placement,
    schedule: Schedule,
    trained: Arrays,
    frozen: Arrays,
    items: Mapping[str, Array],
    context: Context,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums over microbatches of gradients and metrics, each times its weight.

    Args:
      phase: whose objective and stacked model are meant.
      schedule: of as many stages as the mesh has, and as many microbatches as `items`.
      trained, frozen: the model's arrays, in the dtype of computation.
      items: the batch, [m, B / m, ...].
      context: of the step; a microbatch has its own key.

    Returns:
      (gradients by path, metrics; `weight` is the sum of weights), all float32.
    """
    cut = Cut.of(phase.stacked, schedule.stages, schedule.chunks)
    stage = Stage(phase, placement, cut, schedule)
    blocks, others = cut.split(trained)
    frozen_blocks, frozen_others = cut.split(frozen)
    run = jax.shard_map(
        stage.run,
        mesh=placement.mesh,
        in_specs=(P(AXIS), P()),
        out_specs=(P(AXIS), P(), P()),
        axis_names={AXIS},
        check_vma=False,
    )
    # Read in every pass; and XLA's partitioner aborts where a table is looked up within a shard_map
    # that fsdp splits beside another axis.
    others, frozen_others = (
        {p: whole(placement, p, a) for p, a in arrays.items()} for arrays in (others, frozen_others)
    )
    of_all = others, frozen_others, items, context
    found, of_others, metrics = run((blocks, frozen_blocks), of_all)
    of_others = {p: whole(placement, p, a) for p, a in of_others.items()}
    return cut.join(found, of_others), metrics


def whole(placement: Placement, path: str, a: Array) -> Array:
    """A parameter that is not of the blocks, or its gradient, gathered from the batch's axes."""
    return constrain(a, placement.gathered(path, a.shape))


@dataclasses.dataclass(frozen=True)
class Stage:
    """The program of every stage."""

    phase: Any
    placement: Placement
    cut: Cut
    schedule: Schedule

    def run(self, of_stage, of_all):
        """All ticks. `of_stage` are arrays [1, v, n, ...]; gives the gradients of these so."""
        (blocks, frozen_blocks), (others, frozen_others, items, context) = of_stage, of_all
        blocks, frozen_blocks = jax.tree.map(lambda a: a[0], (blocks, frozen_blocks))
        passes = Passes(self, blocks, frozen_blocks, others, frozen_others, items, context)
        table = ticks(self.schedule)
        slot = slots(table)
        rows = Tick(*(
            jnp.asarray(getattr(table if hasattr(table, name) else slot, name), jnp.int32)
            for name in Tick._fields
        ))  # fmt: skip
        rank = jax.lax.axis_index(AXIS)

        def tick(state, row):
            return passes.tick(state, Tick(*(a[rank] for a in row))), None

        first = passes.start(*(int(n.max()) for n in (slot.activations, slot.kept, slot.gradients)))
        last, _ = jax.lax.scan(tick, first, rows)
        found = jax.tree.map(lambda a: a[None], last.blocks)
        return found, *jax.lax.psum((last.others, last.metrics), AXIS)


class Passes:
    """Forward and backward passes of a stage, on its arrays."""

    def __init__(self, stage: Stage, blocks, frozen_blocks, others, frozen_others, items, context):
        self.phase, self.cut, self.placement = stage.phase, stage.cut, stage.placement
        self.schedule = stage.schedule
        self.blocks, self.frozen_blocks = blocks, frozen_blocks
        self.others, self.frozen_others = others, frozen_others
        self.items, self.context = items, context
        self.last = self.cut.chunks * self.cut.stages - 1
        self.rank = jax.lax.axis_index(AXIS)
        mesh = self.placement.mesh
        split = [axis for axis, n in mesh.shape.items() if n > 1 and axis != AXIS]
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.skip = not on_cpu or (len(split) < 2 and split != ["sequence"])
        # Shapes of what passes between stages, and of the metrics.
        entered = jax.eval_shape(lambda: self.enter(self.others, 0)[0])
        chunk = jax.tree.map(lambda a: a[0], (blocks, frozen_blocks))
        totals = jax.eval_shape(lambda x: self.chunk(*chunk, (x, None), 0, 0)[1], entered)
        self.sent = entered, totals
        self.reported = jax.eval_shape(lambda y: self.leave(self.others, y, 0)[1], self.sent)

    # ---- the model in three parts

    def of(self, index):
        """The microbatch of that number and its context."""
        batch = {name: jax.lax.dynamic_index_in_dim(a, index, 0, False)
                 for name, a in self.items.items()}  # fmt: skip
        key = self.context.rng
        if key is not None and self.schedule.microbatches > 1:
            key = jax.random.fold_in(key, index)
        return batch, dataclasses.replace(self.context, rng=key)

    def call(self, others, index, run_stack):
        batch, context = self.of(index)
        blocks = {**self.blocks, **self.frozen_blocks}  # of which nothing is read
        arrays = {f"{self.cut.prefix}{path}": a[0] for path, a in blocks.items()}
        arrays |= {**others, **self.frozen_others}
        model = model_lib.bind(self.phase.stacked, arrays)
        return self.phase.objective(model, batch, dataclasses.replace(context, run_stack=run_stack))

    def enter(self, others, index) -> tuple[Array, Context]:
        """What the stack is called with."""

        def reach(stack, x, context):
            raise _Reached(x, dataclasses.replace(context, run_stack=None))

        try:
            self.call(others, index, reach)
        except _Reached as reached:
            return reached.x, reached.context
        raise UserError("config.mesh.pipeline: the objective does not call the model's blocks")

    def chunk(self, trained, frozen, sent, index, part):
        """(x, totals) of the layers before -> those with the model's `part`-th chunk of layers."""
        x, totals = sent
        arrays = {**trained, **frozen}
        context = self.enter(self.others, index)[1]
        first = part * len(next(iter(arrays.values())))
        y, more = self.cut.stack.part(arrays, first, x, context)
        return y, more if totals is None else jax.tree.map(jnp.add, totals, more)

    def leave(self, others, sent, index):
        """(loss, metrics) of what the stack gives."""
        return self.call(others, index, lambda *_: sent)

    # ---- ticks

    def start(self, activations: int, kept: int, gradients: int) -> State:
        """Empty buffers and sums."""

        def zeros(count):
            return jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), self.sent)

        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.sent)
        return State(
            activations=zeros(max(1, activations)),
            kept=zeros(max(1, kept)),
            gradients=zeros(max(1, gradients)),
            from_previous=nothing,
            from_next=nothing,
            blocks={p: self.at_home(f"{self.cut.prefix}{p}", a) for p, a in self.blocks.items()},
            others={
                p: whole(self.placement, p, jnp.zeros(a.shape, jnp.float32))
                for p, a in self.others.items()
            },
            metrics={n: jnp.zeros(s.shape, jnp.float32) for n, s in self.reported.items()},
        )

    def at_home(self, path: str, a: Array) -> Array:
        """Zeros for the gradients of a block's parameter, laid out as the parameter is."""
        where = self.placement.sharding(path, a.shape[1:])
        spec = P(None, None, *where.spec[1:])  # [v, n, ...]
        zeros = jnp.zeros(a.shape, jnp.float32)
        return constrain(zeros, jax.sharding.NamedSharding(self.placement.mesh, spec))

    def tick(self, state: State, do: Tick) -> State:
        """Store, forward, backward, send."""
        state = state._replace(
            activations=_store(state.activations, do.activation_store, state.from_previous),
            gradients=_store(state.gradients, do.gradient_store, state.from_next),
        )
        kept, y = self.where(
            do.forward_microbatch >= 0,
            lambda state: self.forward(state, do),
            lambda state: (state.kept, state.from_previous),
            state,
        )
        state = state._replace(kept=kept)
        sums, dx = self.where(
            do.backward_microbatch >= 0,
            lambda state: self.backward(state, do),
            lambda state: ((state.blocks, state.others, state.metrics), state.from_next),
            state,
        )
        blocks, others, metrics = sums
        count = self.cut.stages
        onward = [(s, (s + 1) % count) for s in range(count)]
        return state._replace(
            blocks=blocks,
            others=others,
            metrics=metrics,
            from_previous=jax.lax.ppermute(y, AXIS, onward),
            from_next=jax.lax.ppermute(dx, AXIS, [(t, s) for s, t in onward]),
        )

    def where(self, here, run, otherwise, operand):
        """run(operand) where this stage has the pass, else otherwise(operand)."""
        if self.skip:
            return jax.lax.cond(here, run, otherwise, operand)
        return jax.tree.map(functools.partial(jnp.where, here), run(operand), otherwise(operand))

    def forward(self, state: State, do: Tick):
        """(inputs kept, what is sent on)."""
        index, part = do.forward_microbatch, do.forward_chunk * self.cut.stages + self.rank

        def enter(sent):
            return self.enter(self.others, index)[0], jax.tree.map(jnp.zeros_like, sent[1])

        waiting = _load(state.activations, do.activation_read)
        sent = self.where(part == 0, enter, lambda sent: sent, waiting)
        chunk = _load((self.blocks, self.frozen_blocks), do.forward_chunk)
        # The last chunk is computed by its backward pass alone, which has to in any case.
        y = self.where(
            part < self.last,
            lambda sent: self.chunk(*chunk, sent, index, part),
            lambda sent: sent,
            sent,
        )
        return _store(state.kept, do.kept_store, sent), y

    def backward(self, state: State, do: Tick):
        """(sums of gradients and metrics, the gradient that is sent back)."""
        index, part = do.backward_microbatch, do.backward_chunk * self.cut.stages + self.rank
        sent = _load(state.kept, do.kept_read)
        trained, frozen = _load((self.blocks, self.frozen_blocks), do.backward_chunk)
        y, pull = jax.vjp(
            lambda trained, sent: self.chunk(trained, frozen, sent, index, part), trained, sent
        )

        def from_loss(sums):
            others, metrics = sums
            loss, pull, found = jax.vjp(
                lambda others, y: self.leave(others, y, index), self.others, y, has_aux=True
            )
            weight = found["weight"]
            d_others, dy = pull(weight.astype(loss.dtype))
            metrics = {
                n: a + (found[n] if n == "weight" else found[n] * weight)
                for n, a in metrics.items()
            }
            return (_add(others, d_others), metrics), dy

        def from_next(sums):
            return sums, _load(state.gradients, do.gradient_read)  # -1, so anything, for the last

        sums = state.others, state.metrics
        (others, metrics), dy = self.where(part == self.last, from_loss, from_next, sums)
        d_blocks, d_sent = pull(dy)

        def to_inputs(others):
            pull = jax.vjp(lambda o: self.enter(o, index)[0], self.others)[1]
            return _add(others, pull(d_sent[0])[0])

        others = self.where(part == 0, to_inputs, lambda others: others, others)
        blocks = {
            p: a.at[do.backward_chunk].add(d_blocks[p].astype(a.dtype))
            for p, a in state.blocks.items()
        }
        return (blocks, others, metrics), d_sent


def _add(sums, more):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def _load(buffers, index):
    index = jnp.maximum(index, 0)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), buffers)


def _store(buffers, index, values):
    """The buffers with `values` at `index`, or as they were where that is negative."""

    def store(a, value):
        at = jnp.maximum(index, 0)
        old = jax.lax.dynamic_index_in_dim(a, at, 0, False)
        return jax.lax.dynamic_update_index_in_dim(a, jnp.where(index >= 0, value, old), at, 0)

    return jax.tree.map(store, buffers, values)
