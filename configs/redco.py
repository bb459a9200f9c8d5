"""Redco: the small language model on a placement that two rules derive from its modules.

Command: python train.py --config=configs/redco.py --workdir=runs/redco
         python -m efficient.parallel.sbp --config=configs/redco.py --mesh tensor=2
Hardware: one device or several; the table of collectives needs none.
Expected: kernels and table lie as the rules written by hand have them (a test compares), so that
          the table is that of `configs/oneflow_sbp.py`: 14.2 MB a device forward on tensor=2. The
          smoke run ends without error on one device and on four; no full run was made.
"""

from configs import common


def get_config(arg=None):
    """Every device there is splits the sublayers; `steps` are of the full run."""
    arg = common.parse(arg, steps=150)
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh.update({"data": 1, "tensor": -1})
    config.placement = [{"derive": "redco"}]
    return config
