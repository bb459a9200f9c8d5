"""Hydragen: the small language model whose cached keys the technique attends to.

Hydragen changes how a batch that shares a prompt attends while it is sampled, and no weight: what
is trained is the base model. This config trains it with two key heads for six query heads, the
grouped form in which the decomposition's rows are several query heads too. Sampling with shared
prompts is not part of the run; efficient/decoding/hydragen.py holds the attention alone.

Command: python train.py --config=configs/hydragen.py --workdir=runs/hydragen
Hardware: two CPU cores, minutes.
Expected: 3.664 held-out bits per byte after the 100 steps (the bigram model: 3.579), in 33 s of
          training on two busy cores (Python 3.11.7, one seed).
"""

from configs import common


def get_config(arg=None):
    """The config; `kv_heads` of the attention, which divides its heads."""
    arg = common.parse(arg, kv_heads=2, steps=100)
    config = common.small_lm(arg, steps=arg.steps)
    grouped = {"kv_heads": arg.kv_heads}
    config.rules = [r | grouped if r["use"] == "attention" else r for r in config.rules]
    return config
