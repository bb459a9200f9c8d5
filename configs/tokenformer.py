"""TokenFormer: the small language model of token-parameter attention, grown in mid-training.

Command: python train.py --config=configs/tokenformer.py --workdir=runs/tokenformer
         (`:scratch` trains the grown size from the start, the baseline)
Hardware: two CPU cores, minutes.
Expected: 3.489 held-out bits per byte before it grows (2,433,408 trained parameters), 3.336 at the
end; 3.215 with :scratch (4,792,704) (Python 3.11.7, one seed).
"""

from configs import common

FIXED_NORMS = {"at": r".*(mixer|channel)_norm/.*", "train": False}  # norms without parameters


def get_config(arg=None):
    """300 steps, then 150 with twice the pairs."""
    arg = common.parse(arg, scratch=False, factor=2)
    config = common.small_lm(arg, steps=450 if arg.scratch else 300)
    width, depth = config.model["width"], config.model["depth"]
    size = arg.factor if arg.scratch else 1
    stds = {"value_std": 2 / depth / width**0.5}
    config.rules = [
        {
            "at": r"blocks/\d+/mixer/(q|k|v|out)",
            "use": "pattention",
            "bias": False,
            "tokens": size * width,
            **stds,
        },
        {"at": r"blocks/\d+/channel", "use": "tokenformer", "tokens": 4 * size * width, **stds},
        *config.rules,
    ]
    first = {**config.phases[0], "parameters": [FIXED_NORMS, common.NO_DECAY]}
    config.phases = [first]
    if not arg.scratch:
        steps = 4 if arg.smoke else 150
        schedule = {**first["optimizer"]["learning_rate"], "warmup": max(1, steps // 10)}
        grown = {
            **first,
            "steps": steps,
            "surgery": [{"name": "grow_tokens", "factor": arg.factor}],
            "optimizer": {**first["optimizer"], "learning_rate": schedule},
        }
        config.phases = [first, grown]
    return config
