"""DeepSpeed-Ulysses: split sequences, whole ones for some of the heads within attention.

Command: python train.py --config=configs/ulysses.py --workdir=runs/ulysses
Others: ...=configs/ulysses.py:ways=... is the number of devices that share a sequence.
Hardware: two devices; a CPU is asked for two that share its cores.
Expected: the smoke run ends without error; no full run was made. The steps are those of one device.
"""

from configs import common


def get_config(arg=None):
    """`ways` devices a sequence; it divides the six heads (two of a smoke run) and the length."""
    arg = common.parse(arg, ways=2, steps=300)
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh.update({"data": -1, "sequence": arg.ways})
    config.sequence = {"name": "ulysses"}
    return config
