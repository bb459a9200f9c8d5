"""S2-Attention: six heads, each with its own sixth of the context's blocks, in a small GPT-2 shape.

Command: python train.py --config=configs/s2_attention.py --workdir=runs/s2_attention
Baseline: configs/s2_attention.py:stride=1, full attention with the same parameters.
Hardware: two CPU cores, four minutes on a loaded machine.
Expected: 2.618 held-out bits per byte after 600 steps, the baseline 2.612 (bigram model 3.579);
one seed each, Python 3.11. The heads compute 18% to 28% of causal attention's scores, 22% on
average. No time is saved at this size: 128 tokens are two blocks of the CPU's program.
"""

from configs import common


def get_config(arg=None):
    """The config; stride 1 is full attention by another name."""
    arg = common.parse(arg, stride=6, block=8, local_blocks=1, dense_layers=0)
    config = common.small_lm(arg, steps=600)
    heads = 2 if arg.smoke else 6
    sparse = {"use": "s2_attention", "stride": arg.stride, "block": arg.block, "heads": heads}
    layers = "|".join(str(i) for i in range(arg.dense_layers, config.model.depth))
    mixer = {"at": rf"blocks/({layers})/mixer", **sparse, "bias": True}
    config.rules = [mixer | {"local_blocks": arg.local_blocks}, *config.rules]
    return config
