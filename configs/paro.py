"""PaRO: parameters split within groups of devices, gradients and optimizer state over all.

Command: x
Hardware: x
Expected: configs/paro.py
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
    config.mesh = {"data": arg.groups, "fsdp": -1}
    scopes = Scopes(arg.parameters, arg.gradients, arg.optimizer, gather="block")
    config.scopes = scopes.to_config()
    config.placement = [FIRST_DIMENSION]
    return config
