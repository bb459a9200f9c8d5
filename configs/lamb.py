"""LAMB at a batch of 256 sequences; `adamw` trains the same with AdamW.

Command: python train.py --config=configs/lamb.py --workdir=runs/lamb
         python train.py --config=configs/lamb.py:adamw --workdir=runs/lamb_adamw
Hardware: two CPU cores.
Expected: 3.447 held-out bits per byte after 120 steps, AdamW 3.235 (Python 3.11.7, one seed each,
          no search of learning rates): at this size LAMB gains nothing. Bigram model: 3.579.
"""

from configs import common


def get_config(arg=None):
    """`batch_size=...` sets the batch, of which 32 sequences at a time are in memory."""
    arg = common.parse(arg, adamw=False, batch_size=256)
    config = common.small_lm(arg, steps=120)
    steps = config.phases[0]["steps"]
    schedule = {"name": "linear", "peak": 2e-2, "warmup": max(1, steps // 10)}
    if not arg.adamw:
        optimizer = {"name": "lamb", "learning_rate": schedule, "weight_decay": 0.01}
        config.phases = [{**config.phases[0], "optimizer": optimizer}]
    if not arg.smoke:
        config.batch_size, config.accumulate = arg.batch_size, max(1, arg.batch_size // 32)
    return config
