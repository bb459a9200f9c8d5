"""The one loop: phases of surgery, objective, optimizer and steps, on any mesh, resumable anywhere.

Everything a step needs follows from the config, the seed and the step's number, so a run that is
killed at any moment and started again by the same command ends with the same bits.
"""

import json
import math
import pathlib
import signal
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from efficient import data as data_lib
from efficient.checkpoints.checkpoint import Checkpointer
from efficient.errors import UserError
from efficient.planning.hardware import peak_flops
from efficient.training import step as step_lib
from efficient.training.evaluation import Evaluator, bits_per_byte_baseline, sample_text
from efficient.training.experiment import Phase
from efficient.training.metrics import Clock, MetricWriter, plot_losses, print_line, progress_line
from efficient.training.run import Run, Subset, flatten, unflatten
from efficient.training.workdir import claim, use_compile_cache

SHOWN = ("loss", "accuracy", "relative_error")
# A field of the examples that tells what a loss is measured in.
UNITS = {"label": "nats per example", "target": "mean square", "tokens": "nats per token"}
# What shows that a run has diverged; the norms are of all gradients and all trained parameters.
WATCHED = {"loss": "loss", "grad_norm": "gradient norm", "param_norm": "norm of the parameters"}


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Runs or resumes the experiment `config` in `workdir`; returns the final evaluation.

    Raises:
      UserError: bad input, another config than the one the workdir was started with, or a loss
        that is not finite.
      SystemExit: with status 143 after SIGTERM, once the state is saved.
    """
    folder = pathlib.Path(workdir).absolute()
    run = Run(config)
    for phase in run.phases:
        run.flops(phase)  # traces the step: what does not fit together fails before the claim
    claim(folder, config)
    use_compile_cache(folder)
    with Checkpointer(str(folder / "checkpoints"), keep=config.keep_checkpoints) as checkpoints:
        return Trainer(run, folder, checkpoints).run_phases()


class Trainer:
    """The state of a run while it runs."""

    def __init__(self, run: Run, folder: pathlib.Path, checkpoints: Checkpointer):
        self.run, self.config, self.folder = run, run.config, folder
        self.checkpoints = checkpoints
        self.clock = Clock()
        self.kept: Any = None  # indices of selected training examples, None for all
        self.last_good: int | None = None
        self.stopping = False
        self.profiling: int | None = None  # the first step of the trace under way
        self.evaluated: dict[tuple[int, int], dict[str, float]] = {}  # by phase and step
        self.unchecked: list[tuple[int, dict[str, jax.Array]]] = []  # WATCHED of recent steps
        devices = run.placement.mesh.devices
        peak = peak_flops(devices.flat[0])
        self.peak = peak * devices.size if peak else None

    def run_phases(self) -> dict[str, float]:
        """All phases from where the workdir stands; returns the final evaluation's metrics."""
        phase, state = self.begin()
        first = int(state["step"])
        if self.last_good is not None:
            print_line(f"resuming at step {first}")
        self._announce(phase, first)
        self.baseline = bits_per_byte_baseline(self.run)
        self.writer = MetricWriter(self.folder, self.clock, start_step=first)
        several = jax.process_count() > 1  # then JAX's preemption service has a handler of its own
        previous = None if several else signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            with self.writer:
                while True:
                    state = self._run_phase(phase, state)
                    if phase.index + 1 == len(self.run.phases):
                        return self._finish(phase, state)
                    phase = self.run.phases[phase.index + 1]
                    print_line(f"phase {phase.index + 1}/{len(self.run.phases)}")
                    state, self.kept = self.run.pass_on(phase, state)
        finally:
            if self.profiling is not None:
                jax.profiler.stop_trace()
            if not several:
                signal.signal(signal.SIGTERM, previous)

    def begin(self) -> tuple[Phase, step_lib.State]:
        """The newest checkpoint that is whole, or a fresh start."""
        if not (self.folder / "checkpoints").exists() or self.checkpoints.latest() is None:
            return self.run.phases[0], self.run.start()

        def target(metadata: Mapping[str, Any]):
            phase = self.run.phases[metadata["phase"]]
            arrays = flatten(step_lib.abstract_state(phase, self.run.placement))
            if metadata["selected"] is not None:
                where = self.run.placement.replicated
                shape = (metadata["selected"],)
                arrays["selection"] = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
            return arrays

        arrays, metadata = self.checkpoints.restore(target)
        phase = self.run.phases[metadata["phase"]]
        self.kept = arrays.pop("selection", None)
        self.clock.restore(metadata["clock"])
        self.last_good = metadata["step"]
        return phase, unflatten(step_lib.abstract_state(phase, self.run.placement), arrays)

    def _announce(self, phase: Phase, first: int) -> None:
        count = sum(math.prod(phase.shapes[p].shape) for p in phase.params)
        trained = sum(math.prod(phase.shapes[p].shape) for p in phase.trained)
        mesh = {a: n for a, n in self.run.placement.mesh.shape.items() if n > 1}
        device = self.run.placement.mesh.devices.flat[0].device_kind
        frozen = f" ({trained:,} trained)" if trained != count else ""
        print_line(
            f"{self.config.model.name} with {count:,} parameters{frozen} on"
            f" {self.run.placement.mesh.size} x {device}{f' {mesh}' if mesh else ''};"
            f" {len(self.run.train_source):,} training examples; steps {first} to"
            f" {self.run.total_steps}"
        )

    def _run_phase(self, phase: Phase, state: step_lib.State) -> step_lib.State:
        first = int(state["step"])
        evaluate = Evaluator(self.run, phase)
        if first > phase.start and self._is_due(first, phase, "eval_every"):
            # a stop may have come between that step's save and its evaluation
            self._evaluate(evaluate, first, state)
        if first >= phase.stop:
            return state
        self.clock.warm_up()
        train_step = self.run.train_step(phase)
        flops = self.run.flops(phase)
        pending = None  # metrics of the step before, fetched once the next is under way
        with self._batches(first) as batches:
            for step in range(first, phase.stop):
                self._profile(step, state)
                batch = self._place(next(batches))
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, batch)
                if len(self.unchecked) >= 100:
                    self._check_finite(phase, step)
                self.unchecked.append((step + 1, {name: metrics[name] for name in WATCHED}))
                if pending is not None:
                    self._log(phase, *pending)
                # after that, so that a line tells what was seen up to its own step
                self.clock.count(**self._amount(batch), flops=flops)
                pending = (step + 1, metrics) if self._is_log(step + 1, first, phase) else None
                stop = self._must_stop(step + 1)
                save = stop or self._is_due(step + 1, phase, "checkpoint_every")
                score = not stop and self._is_due(step + 1, phase, "eval_every")
                if save or score:  # the clock pauses, for which the step must be done
                    self._log(phase, *(pending or (step + 1, metrics)), show=pending is not None)
                    pending = None
                if save:
                    with self.clock.pause():
                        self._save(phase, step + 1, state, wait=stop)
                if stop:
                    print_line(
                        f"stopped by SIGTERM at step {step + 1}, saved; the same command"
                        " goes on from there"
                    )
                    raise SystemExit(143)
                if score:
                    with self.clock.pause():
                        self._evaluate(evaluate, step + 1, state)
        return state

    def _batches(self, first: int):
        source = self.run.train_source
        if self.kept is not None:
            source = Subset(source, np.asarray(self.kept))
        index, count = self.run.placement.process_share(self.config.batch_size)
        return data_lib.batches(
            source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=first,
            workers=self.config.data_workers,
            process_index=index,
            process_count=count,
        )

    def _place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return self.run.placement.place_batch(batch, self.config.batch_size)

    def _amount(self, batch: Mapping[str, jax.Array]) -> dict[str, int]:
        tokens = batch["tokens"].size if "tokens" in batch else 0
        return {"tokens": tokens, "examples": self.config.batch_size}

    def _is_log(self, step: int, first: int, phase: Phase) -> bool:
        return step == first + 1 or step % self.config.log_every == 0 or step == phase.stop

    def _is_due(self, step: int, phase: Phase, field: str) -> bool:
        every = self.config[field]
        return step == phase.stop or bool(every and step % every == 0)

    def _log(self, phase: Phase, step: int, metrics, show: bool = True) -> None:
        """Fetches and shows a step's metrics; stops the run where any were not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.lap()
        self._check_finite(phase, step)
        if not show:
            return
        values.pop("weight", None)
        self.writer.write(step, values)
        print_line(
            progress_line(
                step,
                self.run.total_steps,
                values,
                self.clock.rate(),
                peak_flops=self.peak,
                show=SHOWN,
            )
        )

    def _check_finite(self, phase: Phase, step: int) -> None:
        """Stops the run at the first step, up to `step`, after which it is no use to go on."""
        due = [entry for entry in self.unchecked if entry[0] <= step]
        self.unchecked = self.unchecked[len(due) :]
        for at, values in jax.device_get(due):
            bad = next((name for name in WATCHED if not math.isfinite(values[name])), None)
            if bad is None:
                continue
            good = (
                f"the last good checkpoint is step {self.last_good} in {self.checkpoints.directory}"
                if self.last_good is not None
                else "there is no checkpoint yet"
            )
            raise UserError(
                f"{WATCHED[bad]} is {float(values[bad])} at step {at}; {good};"
                f" look at config.phases[{phase.index}].optimizer.learning_rate and clip"
            )

    def _save(self, phase: Phase, step: int, state: step_lib.State, wait: bool = False) -> None:
        arrays = flatten(state)
        if self.kept is not None:
            arrays["selection"] = self.kept
        metadata = {
            "phase": phase.index,
            "seed": self.config.seed,
            "selected": None if self.kept is None else int(self.kept.shape[0]),
            "clock": self.clock.state(),
            "config": json.loads(self.config.to_json_best_effort()),
        }
        self.checkpoints.save(step, arrays, metadata, wait=wait)
        self.last_good = step

    def _evaluate(self, evaluate: Evaluator, step: int, state: step_lib.State) -> dict:
        metrics, phase = evaluate(state), evaluate.phase
        if self.baseline is not None:
            metrics["baseline_loss"] = self.baseline * math.log(2)
        self.evaluated[phase.index, step] = metrics
        self.writer.write(step, metrics, kind="eval")
        text = "  ".join(
            f"{n} {v:.4g}" for n, v in metrics.items() if n in (*SHOWN, "bits_per_byte")
        )
        beside = f" (bigram model {self.baseline:.3f})" if self.baseline is not None else ""
        print_line(f"held-out at step {step}: {text}{beside}")
        return metrics

    def _finish(self, phase: Phase, state: step_lib.State) -> dict[str, float]:
        """The last evaluation, a sample, the curve, and where everything is."""
        self._profile(self.run.total_steps, state)
        metrics = self.evaluated.get((phase.index, self.run.total_steps))
        if metrics is None:  # resumed after the last step, or the last phase has no steps
            metrics = self._evaluate(Evaluator(self.run, phase), self.run.total_steps, state)
        if self.config.sample["length"]:
            print_line(sample_text(self.run, phase, state))
        self.checkpoints.wait()
        self.writer.close()
        if jax.process_index() == 0 and self.config.plot:
            fields = self.run.train_source.spec
            unit = next((unit for field, unit in UNITS.items() if field in fields), "")
            plot_losses(self.folder / "metrics.jsonl", self.folder / "loss.png", unit=unit)
        print_line(f"run        {self.folder}")
        print_line(f"checkpoint {self.checkpoints.directory / str(self.run.total_steps)}")
        files = ["metrics.jsonl", "tensorboard", *(["loss.png"] if self.config.plot else [])]
        print_line(f"files      {', '.join(files)}")
        return metrics

    def _profile(self, step: int, state: step_lib.State) -> None:
        """Before `step`: begins or ends the trace of `config.profile`, from a resumed step on."""
        first, last = self.config.profile or (0, -1)
        last, folder = min(last, self.run.total_steps - 1), self.folder / "profile"
        inside = first <= step <= last
        if inside == (self.profiling is not None):
            return
        jax.block_until_ready(state)  # what was begun before belongs to the steps before
        if inside:
            jax.profiler.start_trace(str(folder))
        else:
            jax.profiler.stop_trace()
            print_line(f"profile of steps {self.profiling} to {last}: {folder}")
        self.profiling = step if inside else None

    def _on_sigterm(self, number, frame) -> None:
        del number, frame
        self.stopping = True

    def _must_stop(self, step: int) -> bool:
        """All processes stop at the same step."""
        if jax.process_count() == 1:
            return self.stopping
        return multihost_utils.reached_preemption_sync_point(step)


def restored(run: Run, folder: pathlib.Path) -> tuple[Phase, step_lib.State]:
    """The newest checkpoint of `folder` and its phase, with surgery after the last step done."""
    with Checkpointer(str(folder / "checkpoints")) as checkpoints:
        trainer = Trainer(run, folder, checkpoints)
        if checkpoints.latest() is None:
            raise UserError(f"{folder} holds no checkpoint yet; train first")
        phase, state = trainer.begin()
        for last in run.phases[phase.index + 1 :]:
            if last.stop == int(state["step"]):
                phase, (state, _) = last, run.pass_on(last, state)
    return phase, state


def evaluate(
    config: ConfigDict, workdir: str, prompt: str | None, length: int, temperature: float
) -> None:
    """Prints the metrics of the newest checkpoint as one JSON line, or a sample after `prompt`."""
    folder = pathlib.Path(workdir).absolute()
    if prompt is not None:
        config.sample = {"prompt": prompt, "length": length, "temperature": temperature}
    run = Run(config)
    phase, state = restored(run, folder)
    if prompt is not None:
        print_line(sample_text(run, phase, state))
        return
    metrics = Evaluator(run, phase)(state)
    print_line(json.dumps({"step": int(state["step"]), **metrics}))
