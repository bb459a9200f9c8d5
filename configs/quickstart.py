"""The first run: a byte-level GPT-2-shaped model of the running Python's standard library.

Command: python train.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware: two CPU cores, about three minutes.
Expected: 2.405 held-out bits per byte with Python 3.11.7 (the bigram model: 3.579), in 3 min 21 s.
"""

from configs import common


def get_config(arg=None):
    """The config; `:smoke` is a run of seconds."""
    arg = common.parse(arg)
    config = common.small_lm(arg, steps=800)
    config.checkpoint_every = 3 if arg.smoke else 200
    config.eval_every = 3 if arg.smoke else 200
    config.sample = {"prompt": "def ", "length": 32 if arg.smoke else 120, "temperature": 0.8}
    return config
