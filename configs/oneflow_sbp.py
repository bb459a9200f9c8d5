"""OneFlow's SBP: the small language model split over all devices, and what its placement sends.

Command: python -m efficient.parallel.sbp --config=configs/oneflow_sbp.py --mesh tensor=4
         python train.py --config=configs/oneflow_sbp.py --workdir=runs/oneflow_sbp
"""

from configs import common


def get_config(arg=None):
    """`plain` leaves residuals whole, as Megatron of 2019; `steps` are of the full run."""
    arg = common.parse(arg, plain=False, steps=150)
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh = {"data": 1, "tensor": -1}
    if arg.plain:
        rule = {"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}
        config.placement = [rule]
    return config
