"""The plan of a config: its real train step, compiled for hardware that is not here."""

import dataclasses

from ml_collections import ConfigDict

from efficient.planning.hardware import Target
from efficient.planning.plan import Plan, plan
from efficient.training import step as step_lib
from efficient.training.run import Run


def plan_config(config: ConfigDict, target: str) -> Plan:
    """Compiles the first phase's train step on the mesh that the config asks for.

    Args:
      config: the whole config; `config.mesh` is laid over the target's devices in their order.
      target: such as 'v5e:16x16' or 'h200'.
    """
    hardware = Target.parse(target)
    run = Run(config, hardware.devices)
    phase = run.phases[0]
    state, batch = step_lib.abstract_state(phase, run.placement), run.abstract_batch()
    labels = {
        "parameters": (state["params"], state["state"], state["ema"]),
        "optimizer": state["optimizer"],
        "batch": batch,
    }
    found = plan(
        run.train_step(phase),
        (state, batch),
        target=hardware,
        mesh=run.placement.mesh,
        labels=labels,
        asked=None if run.schedule is None else int(run.flops(phase, hardware.platform)),
    )
    notes = []
    if run.schedule is not None:
        notes.append("executed FLOPs and times are as if every stage were busy in every tick")
    if len(run.phases) > 1:
        notes.append(f"this is the first of {len(run.phases)} phases; the others are not planned")
    return dataclasses.replace(found, notes=(*found.notes, *notes))
