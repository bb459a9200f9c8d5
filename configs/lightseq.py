"""Ring attention: the sequences of the small language model split over devices (LightSeq).

Keys and values travel round the devices; tokens lie in zig-zag order, so that every device has the
same work under the causal mask.

Command: python train.py --config=configs/lightseq.py --workdir=runs/lightseq
Others: ...=configs/lightseq.py:order=contiguous, which leaves tokens in their order;
        ways=4 is the number of devices that share a sequence.
Hardware: two devices; a CPU is asked for two that share its cores.
Expected: the smoke run ends without error; no full run was made. The steps are those of one device.
"""

from configs import common


def get_config(arg=None):
    """`ways` devices a sequence; twice that divides its length in zig-zag order."""
    arg = common.parse(arg, ways=2, order="zigzag", steps=300)
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh.update({"data": -1, "sequence": arg.ways})
    config.sequence = {"name": "ring", "order": arg.order}
    return config
