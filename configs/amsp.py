"""AMSP: parameters, gradients and optimizer state split by scopes of their own; ZeRO 1 here.

Command: x
Hardware: x
Expected: configs/amsp.py
"""

from configs import common
from efficient.errors import UserError, nearest
from efficient.parallel.scopes import FIRST_DIMENSION, LAYOUTS


def get_config(arg=None):
    """The small language model on all devices there are, in `groups` groups.

    `layout` is a name of `efficient.parallel.scopes.LAYOUTS`.
    """
    arg = common.parse(arg, layout="zero_1", groups=1)
    if arg.layout not in LAYOUTS:
        raise UserError(f"layout={arg.layout!r} is unknown; {nearest(arg.layout, LAYOUTS)}")
    config = common.small_lm(arg, steps=150)
    config.mesh = {"data": arg.groups, "fsdp": -1}
    config.scopes = LAYOUTS[arg.layout].to_config()
    config.placement = [FIRST_DIMENSION]
    return config
