"""PaRO: parameters split within groups of devices, gradients and optimizer state over all.

Command: python train.py --config=configs/paro.py --workdir=runs/paro
         python train.py --config=configs/paro.py:groups=2,gradients=group --workdir=runs/paro_group
Hardware: one CPU core, about two minutes of its time; all the devices there are.
Expected: 3.456 held-out bits per byte in 150 steps on four fake devices in two groups
          (XLA_FLAGS=--xla_force_host_platform_device_count=4 and groups=2), which is what
          configs/amsp.py gives on one and on four (Python 3.11.7, one seed).
"""

from configs import common
from efficient.parallel.scopes import FIRST_DIMENSION, Scopes


def get_config(arg=None):
    """The small language model on all devices there are, in `groups` groups.

    `parameters`, `gradients` and `optimizer` are scopes. Each block gathers its parameters, within
    its group and between groups in turn.
    """
    arg = common.parse(arg, parameters="group", gradients="global", optimizer="global", groups=1)
    config = common.small_lm(arg, steps=150)
    config.model.remat = "full"
    config.mesh.update({"data": arg.groups, "fsdp": -1})
    scopes = Scopes(arg.parameters, arg.gradients, arg.optimizer, gather="block")
    config.scopes = scopes.to_config()
    config.placement = [FIRST_DIMENSION]
    return config
