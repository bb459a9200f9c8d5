"""LM-Infinite: a small Llama-shaped model trained on 128 bytes reads 2,048 of them.

Command: python train.py --config=configs/lm_infinite.py --workdir=runs/lm_infinite
         python eval.py --workdir=runs/lm_infinite --lengths=128,256,512,1024,2048
         python eval.py --workdir=runs/lm_infinite --lengths=128,256,512,1024,2048 \
             --config=configs/lm_infinite.py:mixer=attention          (and mixer=window)
Hardware: two CPU cores, three minutes and one minute an evaluation on a loaded machine.
Expected: 1.961 held-out bits per byte (bigram model 3.579). Bits per byte of the last 64 bytes of
121 contexts, the same bytes at every length (docs/lm_infinite.png), Python 3.11, seed 0:

    bytes of context     128     256     512   1,024   2,048
    lm_infinite        1.991   1.998   1.999   1.997   1.998
    attention          1.991   3.745   4.343   4.811   5.054
    window of 128      1.991   1.995   1.995   1.995   1.995

At this size a plain sliding window is as flat, and a little better: sinks and the limit of
distances earn nothing here. That large models break without their first tokens is not shown.
"""

from configs import common

MIXERS = ("lm_infinite", "attention", "window")


def get_config(arg=None):
    """The config; `mixer` is one of `MIXERS`, which share parameters and agree up to 128 bytes."""
    arg = common.parse(arg, mixer="lm_infinite", sinks=10)
    if arg.mixer not in MIXERS:
        raise common.UserError(f"mixer={arg.mixer!r}; {common.nearest(arg.mixer, MIXERS)}")
    config = common.small_lm(arg, steps=600)
    width, length = config.model.width, config.model.max_length
    heads = width // 32
    shape = {"heads": heads, "kv_heads": heads // 2, "rope": 10_000.0}
    mixer = {
        "lm_infinite": {"use": "lm_infinite", "window": length, "sinks": arg.sinks},
        "attention": {"use": "attention"},
        "window": {"use": "attention", "window": length},
    }[arg.mixer]
    config.rules = [
        {"at": r"blocks/\d+/mixer", **mixer, **shape},
        *common.llama(heads, heads // 2, hidden=8 * width // 3),
    ]
    return config
