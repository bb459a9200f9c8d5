"""TP-aware dequantization: the small language model is trained, then its MLPs get 4-bit weights.

A last phase without steps quantizes the MLPs of the trained model, the columns of the first product
in the order of the second's rows. The held-out loss is printed at the end of each phase.

Command: python train.py --config=configs/tp_aware_dequant.py --workdir=runs/tp_aware_dequant
Others: ...=configs/tp_aware_dequant.py:group=64, and naive for features permuted at run time.
Hardware: two CPU cores, minutes.
Expected: no full run was made; the smoke run ends without error.
"""

from configs import common


def get_config(arg=None):
    """The config; `group` rows of a matrix share scales and zeros."""
    arg = common.parse(arg, group=32, naive=False, steps=600)
    config = common.small_lm(arg, steps=arg.steps)
    surgery = {"name": "tp_aware_dequant", "group_size": arg.group, "aware": not arg.naive}
    config.phases = [*config.phases, common.phase(0, surgery=[surgery])]
    return config
