"""AMSP: parameters, gradients and optimizer state split by scopes of their own; ZeRO 1 unless told.

Command: python train.py --config=configs/amsp.py --workdir=runs/amsp
         python train.py --config=configs/amsp.py:layout=zero_3,groups=2 --workdir=runs/zero_3
         python -m efficient.parallel.scopes --parameters 7e9 --group 8 --groups 4 --memory 40
Hardware: one CPU core, two to three minutes; all the devices there are.
Expected: 3.456 held-out bits per byte in 150 steps on one device, and the same on four fake ones in
          two groups (XLA_FLAGS=--xla_force_host_platform_device_count=4 and groups=2): a layout
          changes where arrays lie, not what is computed (Python 3.11.7, one seed).
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
    config.mesh.update({"data": arg.groups, "fsdp": -1})
    config.scopes = LAYOUTS[arg.layout].to_config()
    config.placement = [FIRST_DIMENSION]
    return config
