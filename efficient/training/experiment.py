"""From a config to what a run needs: the model at each phase, its arrays' treatment, its optimizer.

Everything here is abstract: no array is allocated, so the same code serves training and the plan.
"""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

import models
from efficient import model as model_lib
from efficient import registry
from efficient.errors import UserError, nearest
from efficient.parallel.placement import Placement, axes_of
from efficient.scope import Rules, Scope
from efficient.training.validation import (
    Treatment,
    check_declared,
    complete_phase,
    is_number,
    treatment,
)

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """One phase, ready to run: steps [start, stop) of the whole run."""

    index: int
    start: int
    stop: int
    config: Mapping[str, Any]
    single: nnx.Module  # the model with every layer by itself
    stacked: nnx.Module  # the same with alike neighbours stacked
    objective: Callable
    optimizer: optax.GradientTransformation
    learning_rate: float | Schedule
    surgeries: tuple[Any, ...]
    selection: Callable | None  # which training examples it keeps, of `Scoring`; None: all
    treatments: Mapping[str, Treatment]  # by the paths of `stacked`
    replicas: int = 0  # that have a gradient and an optimizer's state each; 0: all have one

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return model_lib.abstract(self.stacked)

    @functools.cached_property
    def params(self) -> frozenset[str]:
        return frozenset(p for p, is_param in model_lib.is_param(self.stacked).items() if is_param)

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        return frozenset(p for p in self.params if self.treatments[p].train)


def build_model(config: ConfigDict, facts: Mapping[str, Any]) -> tuple[nnx.Module, Rules]:
    """The abstract model of a config, sized by the facts of its data where the config is silent."""
    for module in config.imports:
        _import(module)
    arguments = dict(config.model)
    cls = models.host(arguments.pop("name"))
    host = registry.Technique("host", config.model.name, cls, {})
    for name in host.arguments:
        if arguments.get(name) is None and name in facts:
            arguments[name] = facts[name]
    registry.check_arguments(host, arguments, "config.model")
    for name in ("vocab_size", "num_classes"):
        if name in facts and name in arguments and arguments[name] < facts[name]:
            raise UserError(
                f"config.model.{name}={arguments[name]} is less than the {facts[name]} of the data;"
                " raise it, or leave it out"
            )
    rules = Rules(config.rules)
    model = cls(Scope(rules), **arguments)
    rules.check_all_matched()
    check_declared(model)
    return model, rules


def check_data(rules: Rules, spec: Mapping[str, Any], config: ConfigDict) -> None:
    """Refuses techniques that would leak across packed documents or cannot give a sample."""
    for path, technique in rules.used:
        if "segment_ids" in spec and technique.declares.get("segments") is False:
            raise UserError(
                f"{technique.name!r} at {path} would mix packed documents; set"
                " data.packing='stream' or use another mixer"
            )
        if config.sample["length"] and technique.declares.get("decode") is False:
            raise UserError(
                f"{technique.name!r} at {path} cannot generate; set config.sample.length=0"
            )


def check_sequence(rules: Rules) -> None:
    """Refuses mixers that want a whole sequence on each device."""
    for path, technique in rules.used:
        if technique.kind == "mixer" and not technique.declares.get("sequence"):
            names = ", ".join(
                t.name for t in registry.techniques("mixer") if t.declares.get("sequence")
            )
            raise UserError(
                f"{technique.name!r} at {path} wants whole sequences; set config.mesh.sequence=1"
                f" or use a mixer that does without: {names}"
            )


def check_selections(phases: Sequence["Phase"], spec: Mapping[str, Any]) -> None:
    """Refuses a selection of examples that lack what it scores by (its `needs`)."""
    for phase in phases:
        for name in getattr(phase.selection, "needs", ()):
            if name not in spec:
                raise UserError(
                    f"config.phases[{phase.index}].selection: {phase.config['selection']['name']!r}"
                    f" needs {name!r} of each example, but the data gives {', '.join(sorted(spec))}"
                )


def check_heads(model: nnx.Module, placement: Placement) -> None:
    """Refuses heads that the mesh does not divide: every device would attend with all of them."""
    spec = (*(placement.spec("activations/heads") or ()), None, None, None)
    axes = axes_of((spec[2],))
    ways = math.prod(placement.mesh.shape[axis] for axis in axes)
    for path, module in model_lib.modules(model):
        heads = getattr(module, "heads", None)
        if isinstance(heads, int) and heads % ways:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise UserError(
                f"{path} has {heads} heads, which config.mesh.{'*'.join(axes)}={ways} does not"
                f" divide; set it to one of {fits}, or the heads to a multiple of {ways}"
            )


def check_coupled(phase: "Phase", accumulate: int) -> None:
    """Refuses to cut the batch of an objective that compares the examples of a batch."""
    name = phase.config["objective"]["name"]
    if not registry.find(name, "objective").declares.get("coupled"):
        return
    where = f"config.phases[{phase.index}]: {name!r} compares all examples of a batch"
    if accumulate > 1:
        raise UserError(
            f"{where}, which config.accumulate={accumulate} would cut; set it to 1, and the"
            f" objective's microbatches={accumulate} to save as much memory"
        )
    if phase.replicas > 1:
        raise UserError(
            f"{where}, of which {phase.config['optimizer']['name']!r} gives each replica a part;"
            " use another optimizer, or config.mesh.data=1"
        )


def build_phases(config: ConfigDict, model: nnx.Module, placement: Placement) -> list[Phase]:
    """All phases; surgery is applied to the abstract model in order."""
    if not config.phases:
        raise UserError("config.phases is empty; add configs.common.phase(steps=...)")
    phases, start = [], 0
    for index, entry in enumerate(config.phases):
        where = f"config.phases[{index}]"
        entry = complete_phase(entry, where)
        surgeries = tuple(
            make("surgery", s, f"{where}.surgery[{i}]") for i, s in enumerate(entry["surgery"])
        )
        model = nnx.clone(model)
        for i, surgery in enumerate(surgeries):
            try:
                surgery.apply(model)
                check_declared(model)
            except UserError as error:
                raise UserError(f"{where}.surgery[{i}]: {error}") from None
        phases.append(_phase(index, start, entry, model, surgeries, placement))
        start += entry["steps"]
    placement.check_all_matched(list(model_lib.is_param(model)))
    return phases


def _phase(index, start, entry, model, surgeries, placement) -> Phase:
    where = f"config.phases[{index}]"
    treat = _treatments(entry["parameters"], model, f"{where}.parameters")
    if placement.mesh.shape["pipeline"] > 1:  # cuts stacks, however few their blocks
        model = nnx.clone(model)
        for _, module in model_lib.modules(model):
            if isinstance(module, model_lib.Stack):
                module.scan_from = 2
    stacked = model_lib.stack_alike(model, lambda p: (treat(p), placement.spec(p)))
    if placement.mesh.size > 1:
        for path, variable in model_lib.walk(stacked):
            variable.set_metadata("gathered", placement.gathered(path, variable.shape))
    treatments = {p: treat(model_lib.layers_of(p)[0]) for p in model_lib.is_param(stacked)}
    objective = make("objective", entry["objective"], f"{where}.objective")
    selection = _selection(index, entry["selection"], f"{where}.selection")
    learning_rate, transform = _optimizer(entry, treatments, f"{where}.optimizer")
    return Phase(
        index,
        start,
        start + entry["steps"],
        entry,
        model,
        stacked,
        objective,
        transform,
        learning_rate,
        surgeries,
        selection,
        treatments,
        _replicas(entry["optimizer"]["name"], placement, f"{where}.optimizer"),
    )


def _replicas(optimizer: str, placement, where: str) -> int:
    """How many replicas an optimizer keeps apart.

    Raises:
      UserError: it keeps them apart, and another axis of the mesh splits arrays too.
    """
    if not registry.find(optimizer, "optimizer").declares.get("replicas"):
        return 0
    others = [axis for axis, n in placement.mesh.shape.items() if n > 1 and axis != "data"]
    if others:
        raise UserError(
            f"{where}: {optimizer!r} has a state on each replica of the mesh's data axis and no"
            f" other; set config.mesh.{others[0]}=1"
        )
    return placement.mesh.shape["data"]


def make(kind: str, entry: Mapping[str, Any], where: str, *host, skip: Sequence[str] = ()) -> Any:
    """Builds a technique from a config's {name, **arguments}."""
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise UserError(f"{where}: which {kind}? write {{'name': ..., **arguments}}, not {entry!r}")
    arguments = {k: v for k, v in entry.items() if k != "name" and k not in skip}
    try:
        technique = registry.find(entry["name"], kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    registry.check_arguments(technique, arguments, where)
    return technique.build(*host, **arguments)


def _selection(index: int, entry: Mapping[str, Any] | None, where: str) -> Callable | None:
    if entry is None:
        return None
    if index == 0:
        raise UserError(
            f"{where}: nothing has been trained yet to select by; give it to a later one"
        )
    return make("selection", entry, where)


def _optimizer(entry, treatments, where) -> tuple[float | Schedule, optax.GradientTransformation]:
    """Clipping, the optimizer with its schedules, and the learning rates' multipliers."""
    arguments = {
        k: make("schedule", v, f"{where}.{k}", entry["steps"]) if isinstance(v, Mapping) else v
        for k, v in dict(entry["optimizer"]).items()
    }
    if "learning_rate" not in arguments:
        raise UserError(f"{where}: learning_rate is missing")
    learning_rate = arguments["learning_rate"]
    if not callable(learning_rate) and not is_number(learning_rate, least=0):
        raise UserError(
            f"{where}.learning_rate must be a number or a schedule, got {learning_rate!r}"
        )

    def decay_mask(params):
        return {p: treatments[p].weight_decay > 0 for p in params}

    optimizer = make(
        "optimizer", arguments, where, learning_rate, decay_mask, skip=("learning_rate",)
    )
    chain = [optax.clip_by_global_norm(entry["clip"])] if entry["clip"] else []
    chain.append(optimizer)
    if any(t.learning_rate != 1.0 for t in treatments.values()):
        chain.append(_scale_by_path({p: t.learning_rate for p, t in treatments.items()}))
    return learning_rate, optax.chain(*chain)


def _scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: {p: u * factors[p] for p, u in updates.items()})


def _treatments(entries, model, where) -> Callable[[str], Treatment]:
    """The first rule that matches a path says how the phase treats it."""
    rules = []
    paths = [p for p, is_param in model_lib.is_param(model).items() if is_param]
    for i, entry in enumerate(entries):
        treated = treatment(entry, f"{where}[{i}]")
        if not any(re.fullmatch(entry["at"], p) for p in paths):
            hint = nearest(entry["at"], {re.sub(r"/\d+/", "/0/", p) for p in paths})
            raise UserError(f"{where}[{i}]: '{entry['at']}' matches no parameter; {hint}")
        rules.append((entry["at"], treated))

    def treat(path: str) -> Treatment:
        return next((t for at, t in rules if re.fullmatch(at, path)), Treatment())

    if not any(treat(p).train for p in paths):
        raise UserError(f"{where}: every parameter is frozen; nothing would be trained")
    return treat


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"config.imports: cannot import {module!r}: {error}") from None


def compute_dtype(config: ConfigDict) -> Any:
    """The dtype of activations and of the copy of the parameters that the model computes with."""
    allowed = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    if config.compute_dtype not in allowed:
        hint = nearest(config.compute_dtype, allowed)
        raise UserError(f"config.compute_dtype={config.compute_dtype!r} is unknown; {hint}")
    return allowed[config.compute_dtype]
