"""GradNormLoRP: pretrain the small language model, then adapt weight-normalized low-rank layers.

Command: python train.py --config=configs/gwnlp.py --workdir=runs/gwnlp
         (`:bits=8` for moments in 8 bits, `:lora` for LoRA with AdamW, the baseline)
         python train.py --config=configs/gwnlp.py:pretrain --workdir=runs/gwnlp_pretrain
         (the projected optimizer alone, on whole matrices)
Hardware: two CPU cores, minutes.
Expected: 2.934 held-out bits per byte before fine-tuning and 2.906 after; 2.838 with :lora
(Python 3.11.7, one seed).
"""

from configs import common
from efficient.surgery import gwnlp, lora
from efficient.surgery.common import train_only

EVERYWHERE = r".*/(mixer|channel)/.*"


def get_config(arg=None):
    """Two phases: all parameters, then magnitudes and low-rank factors of every linear."""
    arg = common.parse(arg, lora=False, pretrain=False, rank=8, bits=32, period=100)
    config = common.small_lm(arg, steps=400)
    period = 2 if arg.smoke else arg.period
    if arg.pretrain:
        first = config.phases[0]
        rules = {"rank": 64, "period": period, "scale": 0.25, "bits": arg.bits}
        peak = {"name": "cosine", "peak": 1e-2, "warmup": max(1, first["steps"] // 10)}
        optimizer = {"name": "gwnlp", "learning_rate": peak, **rules}
        config.phases = [{**first, "optimizer": optimizer}]
        return config
    steps = 4 if arg.smoke else 200
    schedule = {"name": "cosine", "peak": 3e-3, "warmup": max(1, steps // 10)}
    projected = {"name": "gwnlp", "rank": arg.rank, "period": period, "bits": arg.bits}
    adapt = common.phase(
        steps,
        surgery=[{"name": "lora" if arg.lora else "gwnlp", "rank": arg.rank, "at": EVERYWHERE}],
        parameters=train_only(lora.TRAINED if arg.lora else gwnlp.TRAINED),
        optimizer={**({"name": "adamw"} if arg.lora else projected), "learning_rate": schedule},
    )
    config.phases = [*config.phases, adapt]
    return config
