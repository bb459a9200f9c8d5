"""Ladder Residual on the small language model, its sublayers split over devices.

Command: python train.py --config=configs/ladder_residual.py --workdir=runs/ladder
Baseline: ...=configs/ladder_residual.py:wiring=pre_norm, the same in all else.
Hardware: two devices; a CPU is asked for two that share its cores. tensor=1 takes one.
Expected: the smoke run ends without error; no full run was made.
"""

from configs import common


def get_config(arg=None):
    """The config; `wiring` is ladder_residual or pre_norm."""
    arg = common.parse(arg, wiring="ladder_residual", tensor=2, steps=600)
    config = common.small_lm(arg, steps=arg.steps)
    config.rules = [{"at": r"blocks/\d+", "use": arg.wiring}, *config.rules]
    config.mesh.update({"data": -1, "tensor": arg.tensor})
    return config
