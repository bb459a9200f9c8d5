"""The train step and the evaluation step: pure functions over flat arrays.

State is a dict: `params` (float32 master weights), `state` (buffers), `optimizer`, `ema` (empty
where a phase keeps none) and `step` (int32, of the whole run).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from efficient import model as model_lib
from efficient.parallel import pipeline
from efficient.parallel.gathering import bind_gathered, brought
from efficient.parallel.placement import Placement, split_batch
from efficient.parallel.schedule_ops import Schedule
from efficient.parallel.sequence import arrange
from efficient.scope import Context
from efficient.training.experiment import Phase

State = dict[str, Any]


def initial_state(phase: Phase, values: Mapping[str, Array], step: Array | int) -> State:
    """The state with which a phase begins, from the model's arrays (stacked paths)."""
    params = {p: values[p] for p in sorted(phase.params)}
    trained = {p: params[p] for p in params if p in phase.trained}
    optimizer = phase.optimizer.init(trained)
    if phase.replicas:
        of_each = lambda a: jnp.broadcast_to(a, (phase.replicas, *jnp.shape(a)))  # noqa: E731
        optimizer = jax.tree.map(of_each, optimizer)
    return {
        "params": params,
        "state": {p: values[p] for p in sorted(phase.shapes) if p not in phase.params},
        "optimizer": optimizer,
        "ema": dict(trained) if phase.config["ema"] else {},
        "step": jnp.asarray(step, jnp.int32),
    }


def abstract_state(phase: Phase, placement: Placement) -> State:
    """Shapes, dtypes and shardings of `initial_state`."""
    shapes = jax.eval_shape(lambda v: initial_state(phase, v, 0), phase.shapes)
    single = {p: s.shape for p, s in phase.shapes.items()}
    kinds = dict.fromkeys(("optimizer", "ema"), "optimizer")
    shardings = {
        name: placement.like_params(tree, single, kinds.get(name, "parameters"))
        for name, tree in shapes.items()
    }
    if phase.replicas:
        of_each = NamedSharding(placement.mesh, P("data"))
        shardings["optimizer"] = jax.tree.map(lambda _: of_each, shapes["optimizer"])
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def make_train_step(
    phase: Phase,
    placement: Placement,
    *,
    seed: int,
    dtype,
    accumulate: int = 1,
    schedule: Schedule | None = None,
) -> Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]:
    """(state, batch) -> (state, metrics), jitted; the state is donated.

    Args:
      seed: of the run; a step's randomness derives from it and the step's number alone.
      dtype: of computation; the master weights stay float32.
      accumulate: the batch is split into this many microbatches, whose gradients are averaged
        with the weight (tokens, examples) that the objective reports.
      schedule: of the pipeline, where the mesh has one.
    """
    steps = max(1, phase.stop - phase.start)
    scopes, outer = placement.scopes, placement
    if phase.replicas:
        placement = dataclasses.replace(placement, apart=("data",))
    # Gradients that wait for other microbatches lie as config.scopes.gradients says; those of a
    # whole batch are summed straight to where the optimizer wants them, or finer.
    summed = scopes.gradients if accumulate > 1 else scopes.reduced

    def moved(arrays, start, end):
        if placement.mesh.size == 1:
            return arrays
        return {p: brought(a, placement.route(p, a.shape, start, end)) for p, a in arrays.items()}

    def loss_fn(trained, params, buffers, batch, rng, progress):
        arrays = cast({**params, **trained}, dtype)
        if scopes.gather == "block" and placement.mesh.size > 1:
            model = bind_gathered(phase.stacked, arrays, buffers, placement, summed)
        else:
            model = model_lib.bind(phase.stacked, arrays | buffers)
        batch, permuted = arrange(batch, model, placement)
        context = Context(
            rng=rng, progress=progress, train=True, placement=placement, permuted=permuted
        )
        loss, metrics = phase.objective(model, batch, context)
        return loss, (metrics, model_lib.state_of(model))

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(trained, params, buffers, batch, rng, progress):
        if schedule is not None:
            return through_stages(trained, params, batch, rng, progress)
        if accumulate == 1:
            (_, (metrics, buffers)), grads = grad_fn(trained, params, buffers, batch, rng, progress)
            return moved(grads, summed, summed), metrics, buffers

        def microbatch(carry, item):
            buffers, sums = carry
            index, batch = item
            key = jax.random.fold_in(rng, index)
            (_, (metrics, buffers)), grads = grad_fn(trained, params, buffers, batch, key, progress)
            weight = metrics["weight"]
            grads = moved(grads, summed, summed)
            new = jax.tree.map(lambda a: a * weight, (grads, metrics)) + (weight,)
            grads, *others = jax.tree.map(jnp.add, sums, new)
            return (buffers, (moved(grads, summed, summed), *others)), None

        items = jnp.arange(accumulate), split_batch(batch, accumulate, placement)
        first = jax.tree.map(lambda a: a[0], items)
        shapes = _sum_shapes(grad_fn, trained, params, buffers, first, rng, progress)
        grads, *others = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        zeros = (moved(grads, summed, summed), *others)
        (buffers, (grads, metrics, weight)), _ = jax.lax.scan(microbatch, (buffers, zeros), items)
        weight = jnp.maximum(weight, 1e-9)
        # Said after the loop too, which would otherwise keep them where they go next.
        grads = moved(grads, summed, summed)
        grads, metrics = jax.tree.map(lambda a: a / weight, (grads, metrics))
        return grads, metrics | {"weight": weight}, buffers

    def through_stages(trained, params, batch, rng, progress):
        batch, permuted = arrange(batch, phase.stacked, placement)
        context = Context(
            rng=rng, progress=progress, train=True, placement=placement, permuted=permuted
        )
        frozen = {p: a for p, a in params.items() if p not in trained}
        grads, metrics = pipeline.gradients(
            phase,
            placement,
            schedule,
            cast(trained, dtype),
            cast(frozen, dtype),
            split_batch(batch, accumulate, placement),
            context,
        )
        weight = jnp.maximum(metrics["weight"], 1e-9)
        grads = {p: (g / weight).astype(trained[p].dtype) for p, g in grads.items()}
        means = {n: m / weight for n, m in metrics.items()}
        return grads, means | {"weight": metrics["weight"]}, {}

    def updated(trained, params, buffers, optimizer, batch, rng, progress):
        """New trained parameters, buffers and state of the optimizer; metrics."""
        grads, metrics, buffers = gradients(trained, params, buffers, batch, rng, progress)
        # The update is made where the optimizer's state lies; the parameters come and go.
        grads = moved(grads, summed, scopes.optimizer)
        trained = moved(trained, scopes.parameters, scopes.optimizer)
        updates, optimizer = phase.optimizer.update(grads, optimizer, trained)
        metrics["grad_norm"] = optax.global_norm(grads)
        return optax.apply_updates(trained, updates), buffers, optimizer, metrics

    def each_updated(trained, params, buffers, optimizer, batch, rng, progress):
        """`updated` on a replica: its own gradients and state; means of buffers and metrics."""
        rng = jax.random.fold_in(rng, jax.lax.axis_index("data"))
        own = jax.tree.map(lambda a: a[0], optimizer)
        trained, buffers, own, metrics = updated(
            trained, params, buffers, own, batch, rng, progress
        )
        mean = functools.partial(jax.lax.pmean, axis_name="data")
        floats = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
        buffers = jax.tree.map(lambda a: mean(a) if floats(a) else a, buffers)
        weight = jax.lax.psum(metrics["weight"], "data")
        share = metrics["weight"] / jnp.maximum(weight, 1e-9)
        metrics = {n: jax.lax.psum(m * share, "data") for n, m in metrics.items()}
        return trained, buffers, jax.tree.map(lambda a: a[None], own), metrics | {"weight": weight}

    def train_step(state, batch):
        params = state["params"]
        trained = {p: v for p, v in params.items() if p in phase.trained}
        rng = jax.random.fold_in(jax.random.key(seed), state["step"])
        progress = (state["step"] - phase.start).astype(jnp.float32) / steps
        update = updated
        if phase.replicas:
            update = jax.shard_map(
                each_updated,
                mesh=placement.mesh,
                in_specs=(P(), P(), P(), P("data"), P("data"), P(), P()),
                out_specs=(P(), P(), P("data"), P()),
                axis_names={"data"},
                check_vma=False,
            )
        trained, buffers, optimizer, metrics = update(
            trained, params, state["state"], state["optimizer"], batch, rng, progress
        )
        metrics["param_norm"] = optax.global_norm(trained)
        if callable(phase.learning_rate):
            metrics["learning_rate"] = phase.learning_rate(state["step"] - phase.start)
        decay = phase.config["ema"]
        ema = {p: decay * e + (1 - decay) * trained[p] for p, e in state["ema"].items()}
        trained = moved(trained, scopes.optimizer, scopes.parameters)
        new = {
            "params": {**params, **trained},
            "state": buffers,
            "optimizer": optimizer,
            "ema": ema,
            "step": state["step"] + 1,
        }
        return new, metrics

    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(phase, outer))
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, outer.batch),
        out_shardings=(shardings, outer.replicated),
    )


def _sum_shapes(grad_fn, trained, params, buffers, first, rng, progress):
    """Shapes of (gradients, metrics, weight) of one microbatch."""
    (_, (metrics, _)), grads = jax.eval_shape(
        grad_fn, trained, params, buffers, first[1], rng, progress
    )
    return grads, metrics, metrics["weight"]


def make_eval_step(phase: Phase, placement: Placement, dtype) -> Callable:
    """(params, buffers, batch) -> metrics of the phase's objective, nothing random."""

    def eval_step(params, buffers, batch):
        model = model_lib.bind(phase.stacked, cast(params, dtype) | buffers)
        batch, permuted = arrange(batch, model, placement)
        context = Context(progress=1.0, placement=placement, permuted=permuted)
        return phase.objective(model, batch, context)[1]

    return jax.jit(eval_step, out_shardings=placement.replicated)


def cast(arrays: Mapping[str, Array], dtype) -> dict[str, Array]:
    """Floating arrays in `dtype`; others as they are."""
    return {
        p: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
        for p, a in arrays.items()
    }


def eval_params(state: State) -> dict[str, Array]:
    """The parameters to evaluate: the moving average where the phase keeps one."""
    return {**state["params"], **state["ema"]}
