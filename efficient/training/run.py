"""What one run holds: data, phases, placement; and how its arrays pass from phase to phase."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from efficient import data as data_lib
from efficient import model as model_lib
from efficient.checkpoints import layout
from efficient.checkpoints.checkpoint import Checkpointer
from efficient.errors import UserError
from efficient.parallel import redco, schedules
from efficient.parallel.cut import Cut
from efficient.parallel.gathering import check_gathering
from efficient.parallel.mesh import make_mesh
from efficient.parallel.placement import Placement
from efficient.parallel.schedule_ops import Schedule
from efficient.parallel.scopes import Scopes
from efficient.planning.flops import jaxpr_flops
from efficient.surgery.common import carry
from efficient.training import experiment
from efficient.training import step as step_lib
from efficient.training.evaluation import check_sample
from efficient.training.experiment import Phase
from efficient.training.metrics import print_line
from efficient.training.validation import check_config

Values = dict[str, Array]


class Subset:
    """The examples of a source that a selection has kept."""

    def __init__(self, source: data_lib.Source, indices: np.ndarray):
        self.source, self.indices = source, np.asarray(indices)
        self.spec, self.facts = source.spec, source.facts

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.source[int(self.indices[index])]


@dataclasses.dataclass
class Scoring:
    """What a selection technique sees: the model so far and all training examples.

    Attributes:
      phase: the phase that ends; `bind(values)` gives its model to call.
      values: its current arrays.
      objective: its objective.
      source: the training examples.
      batch_size: of `batches`.
      key: randomness for further initialisations.
    """

    phase: Phase
    values: Values
    objective: Any
    source: data_lib.Source
    batch_size: int
    key: Array

    def bind(self, values: Mapping[str, Array]) -> nnx.Module:
        return model_lib.bind(self.phase.stacked, values)

    def batches(self):
        """All training examples once, in order: batches with `index` [B] and `weight` [B]."""
        start = 0
        for batch in data_lib.eval_batches(self.source, self.batch_size):
            yield batch | {"index": np.arange(start, start + self.batch_size)}
            start += self.batch_size


class Run:
    """A config made ready: nothing is allocated until `start` or `resume`.

    Args:
      config: the whole config.
      devices: to build the mesh on; all of this process' platform by default.
    """

    def __init__(self, config: ConfigDict, devices: Any = None):
        check_config(config)
        self.config = config
        self.train_source = data_lib.make_source(split="train", **config.data)
        self.eval_source = data_lib.make_source(split="eval", **config.data)
        self.base, self.rules = experiment.build_model(config, self.train_source.facts)
        sequence = experiment.make("sequence", dict(config.sequence), "config.sequence")
        mesh = make_mesh(config.mesh, devices)
        entries = redco.expand(config.placement, self.base, mesh.shape)
        scopes = Scopes.parse(config.scopes)
        self.placement = Placement.parse(mesh, entries, sequence, scopes)
        self.dtype = experiment.compute_dtype(config)
        experiment.check_data(self.rules, self.train_source.spec, config)
        self.phases = experiment.build_phases(config, self.base, self.placement)
        experiment.check_selections(self.phases, self.train_source.spec)
        self.init_key = jax.random.key(config.seed)
        self._check_sizes()
        self._check_axes()
        for phase in self.phases:
            experiment.check_coupled(phase, config.accumulate)
            experiment.check_heads(phase.single, self.placement)
            check_gathering(phase.stacked, self.placement)
        self.schedule = self._pipeline()
        self._flops: dict[tuple[int, str | None], float] = {}
        if config.sample["length"]:
            check_sample(config, self.base, self.eval_source.facts)

    def _check_sizes(self) -> None:
        config, ways = self.config, self.placement.batch_ways
        if config.batch_size % config.accumulate:
            raise UserError(
                f"config.batch_size={config.batch_size} does not divide into"
                f" config.accumulate={config.accumulate} microbatches; change one of them"
            )
        microbatch = config.batch_size // config.accumulate
        if microbatch % ways:
            raise UserError(
                f"a microbatch of {microbatch} examples does not divide over {ways} devices"
                " (mesh data x fsdp); change config.batch_size or config.mesh"
            )

    def _check_axes(self) -> None:
        """Refuses an axis that nothing is split over: its devices would repeat the same work."""
        if self.placement.mesh.shape["sequence"] > 1:
            experiment.check_sequence(self.rules)
        named = {"data", "fsdp", "sequence", "tensor", "pipeline", *self.placement.named_axes}
        for axis, size in self.placement.mesh.shape.items():
            if size > 1 and axis not in named:
                raise UserError(
                    f"config.mesh.{axis}={size}: nothing is split over {axis!r} yet; set it to 1,"
                    " or name it in a rule of config.placement"
                )

    def _pipeline(self) -> Schedule | None:
        """The schedule of the pipeline, and whether every phase's model can be cut by it."""
        stages, given = self.placement.mesh.shape["pipeline"], self.config.pipeline
        if stages == 1:
            return None
        where = f"config.pipeline, of config.accumulate={self.config.accumulate} microbatches"
        try:
            schedule = schedules.build(
                given["schedule"], stages, self.config.accumulate, given["chunks"]
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for phase in self.phases:
            Cut.of(phase.stacked, stages, given["chunks"])
        return schedule

    @property
    def total_steps(self) -> int:
        return self.phases[-1].stop

    def abstract_batch(self, placement: Placement | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a global batch, by default on the run's mesh."""
        size, where = self.config.batch_size, (placement or self.placement).batch
        return {
            name: jax.ShapeDtypeStruct((size, *s.shape), s.dtype, sharding=where)
            for name, s in self.train_source.spec.items()
        }

    @functools.cache  # noqa: B019, a process has one run
    def train_step(self, phase: Phase):
        """The phase's jitted (state, batch) -> (state, metrics)."""
        return self._step(phase, self.schedule, self.placement)

    def _step(self, phase: Phase, schedule: Schedule | None, placement: Placement):
        return step_lib.make_train_step(
            phase,
            placement,
            seed=self.config.seed,
            dtype=self.dtype,
            accumulate=self.config.accumulate,
            schedule=schedule,
        )

    def flops(self, phase: Phase, platform: str | None = None) -> float:
        """Model FLOPs of one train step over all devices, recomputation left out.

        Of a pipeline, whose program does not say how often a stage is idle, those of the same step
        on one device.

        Args:
          platform: as of `count_flops`.
        """
        if (phase.index, platform) in self._flops:
            return self._flops[phase.index, platform]
        placement, step = self.placement, self.train_step(phase)
        if self.schedule is not None:
            mesh = make_mesh({"data": 1}, placement.mesh.devices.flat[:1])
            placement = dataclasses.replace(placement, mesh=mesh)
            step = self._step(phase, None, placement)
        state, batch = step_lib.abstract_state(phase, placement), self.abstract_batch(placement)
        try:
            traced = step.trace(state, batch)
        except KeyError as error:  # the first trace of the step
            raise UserError(
                f"config.phases[{phase.index}]: the model and the objective"
                f" {phase.config['objective']['name']!r} look for {error.args[0]!r} in a batch, but"
                f" data {self.config.data.name!r} gives {', '.join(sorted(batch))}"
            ) from error
        found = float(jaxpr_flops(traced.jaxpr, platform).model)
        self._flops[phase.index, platform] = found
        return found

    def shardings(self, phase: Phase) -> dict[str, Any]:
        return {p: self.placement.sharding(p, s.shape) for p, s in phase.shapes.items()}

    def start(self) -> step_lib.State:
        """The first phase's state: drawn under the mesh, or from `config.init_from`."""
        phase = self.phases[0]
        if self.config.init_from:
            values = self._operate(phase, self.base, self._other_run())
        else:
            values = self._draw(phase)
        return self._enter(phase, values)

    def pass_on(self, phase: Phase, state: step_lib.State) -> tuple[step_lib.State, Array | None]:
        """From the end of one phase to the beginning of `phase`: selection, then surgery.

        Returns:
          The new state, and the indices of the selected examples (None: all).
        """
        before = self.phases[phase.index - 1]
        values = step_lib.eval_params(state) | state["state"]
        kept = None
        if phase.selection is not None:
            kept = phase.selection(
                Scoring(
                    before,
                    values,
                    before.objective,
                    self.train_source,
                    self.config.batch_size,
                    self.init_key,
                )
            )
            kept = jax.device_put(np.asarray(kept, np.int32), self.placement.replicated)
            if getattr(phase.selection, "rewind", False):
                values = self._draw(before)
        if phase.surgeries or list(phase.shapes) != list(before.shapes):
            values = self._operate(phase, before.single, layout.unstack(values))
        return self._enter(phase, values), kept

    def _draw(self, phase: Phase) -> Values:
        """Initial values; always by the same program, since another may round otherwise."""
        draw = jax.jit(
            lambda key: model_lib.init(phase.stacked, key), out_shardings=self.shardings(phase)
        )
        return draw(self.init_key)

    def _operate(self, phase: Phase, single: nnx.Module, values: Values) -> Values:
        """Surgery on the values of single layers; gives the stacked arrays of `phase`."""
        model = nnx.clone(single)
        for surgery in phase.surgeries:
            surgery.apply(model)
            values = getattr(surgery, "convert", carry)(values, model, self.init_key)
        stacked = layout.stack(values, list(phase.shapes))
        return jax.device_put(stacked, self.shardings(phase))

    def _enter(self, phase: Phase, values: Values) -> step_lib.State:
        abstract = step_lib.abstract_state(phase, self.placement)
        make = jax.jit(
            lambda v: step_lib.initial_state(phase, v, phase.start),
            out_shardings=jax.tree.map(lambda s: s.sharding, abstract),
        )
        return make(values)

    def _other_run(self) -> Values:
        """Single-layer arrays of the model before surgery, from another run's checkpoint."""
        directory = pathlib.Path(self.config.init_from) / "checkpoints"
        if not directory.is_dir():
            raise UserError(
                f"config.init_from={self.config.init_from!r}: {directory} does not exist; name the"
                " workdir of a finished run"
            )
        is_param = model_lib.is_param(self.base)
        target = {
            f"{'params' if is_param[p] else 'state'}/{p}": jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=self.placement.sharding(p, s.shape)
            )
            for p, s in model_lib.abstract(self.base).items()
        }
        skip = (r"optimizer/.*", r"ema/.*", r"step", r"selection")
        with Checkpointer(str(directory)) as source:
            arrays, metadata = source.restore(target, allow_extra=skip)
        print_line(f"starting from {self.config.init_from}, step {metadata['step']}")
        return {path.split("/", 1)[1]: array for path, array in arrays.items()}


def flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as path -> array: `params/...`, `optimizer/0/mu/...`, `step`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {"/".join(_name(key) for key in keys): leaf for keys, leaf in leaves}


def unflatten(abstract: Mapping[str, Any], arrays: Mapping[str, Any]) -> step_lib.State:
    """The inverse of `flatten`, in the structure of `abstract`."""
    treedef = jax.tree_util.tree_structure(abstract)
    return jax.tree_util.tree_unflatten(treedef, [arrays[path] for path in flatten(abstract)])


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"no name for {key!r}")
