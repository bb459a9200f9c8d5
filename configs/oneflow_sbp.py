"""OneFlow's SBP: the small language model split over all devices, and what its placement sends.

Command: python -m efficient.parallel.sbp --config=configs/oneflow_sbp.py --mesh tensor=2
         python -m efficient.parallel.sbp --config=configs/oneflow_sbp.py:plain --mesh tensor=2
         python train.py --config=configs/oneflow_sbp.py --workdir=runs/oneflow_sbp
Hardware: the tables need none; training runs on one device and on several.
Expected: forward a block takes two all-gathers and two reduce-scatters, with `plain` two
          all-reduces, and in both each device sends 3.15 MB a block and 14.2 MB in all. With
          tensor=4, which does not divide the six heads, four all-to-alls a block come to that.
          The smoke runs end without error on one device and on four; no full run was made.
"""

from configs import common


def get_config(arg=None):
    """`plain` leaves residuals whole, as Megatron of 2019; `steps` are of the full run."""
    arg = common.parse(arg, plain=False, steps=150)
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh.update({"data": 1, "tensor": -1})
    if arg.plain:
        rule = {"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}
        config.placement = [rule]
    return config
