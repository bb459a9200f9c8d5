"""(IA)^3: pretrain the small language model, then train only vectors that rescale activations.

Command: python train.py --config=configs/ia3.py --workdir=runs/ia3
Hardware: two CPU cores, about three minutes.
Expected: 2.932 held-out bits per byte before and 2.924 after the second phase, which trains 4608
          numbers (Python 3.11.7, one seed).
"""

from configs import common
from efficient.surgery import ia3
from efficient.surgery.common import train_only


def get_config(arg=None):
    """Two phases: all parameters, then 4 (192 + 192 + 768) = 4608 of them."""
    arg = common.parse(arg)
    config = common.small_lm(arg, steps=400)
    steps = 4 if arg.smoke else 200
    adapt = common.phase(
        steps,
        surgery=[{"name": "ia3"}],
        parameters=train_only(ia3.TRAINED),
        optimizer={
            "name": "adamw",
            "learning_rate": {"name": "cosine", "peak": 3e-3, "warmup": max(1, steps // 10)},
        },
    )
    config.phases = [*config.phases, adapt]
    return config
