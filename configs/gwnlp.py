"""GradNormLoRP: pretrain the small language model, then adapt weight-normalized low-rank layers.

Command: python train.py --config=configs/gwnlp.py --workdir=runs/gwnlp
         (`:bits=8` for moments in 8 bits, `:lora` for LoRA with AdamW, the baseline)
         python train.py --config=configs/gwnlp.py:pretrain --workdir=runs/gwnlp_pretrain
         (whole weight-normalized matrices from the start, by the projected optimizer; with :plain
         the same optimizer without the normalization, which is GaLore's way)
         `:rank=N` is the rank of each; by default 8, and 64 with :pretrain.
Hardware: two CPU cores, minutes.
Expected: 2.934 held-out bits per byte before fine-tuning and 2.906 after; 2.838 with :lora. 2.989
with :pretrain, 3.033 with :pretrain,plain (Python 3.11.7, one seed each).
"""

from configs import common
from efficient.errors import UserError
from efficient.surgery import gwnlp, lora
from efficient.surgery.common import train_only

EVERYWHERE = r".*/(mixer|channel)/.*"


def get_config(arg=None):
    """Two phases: all parameters, then magnitudes and low-rank factors of every linear."""
    arg = common.parse(arg, lora=False, pretrain=False, plain=False, rank=0, bits=32, period=100)
    if arg.pretrain and arg.lora:
        raise UserError("config argument lora is for adapting; leave out pretrain or lora")
    if arg.plain and not arg.pretrain:
        raise UserError("config argument plain is for pretraining; add pretrain")
    config = common.small_lm(arg, steps=400)
    rank = arg.rank or (64 if arg.pretrain else 8)
    period = 2 if arg.smoke else arg.period
    projected = {"name": "gwnlp", "rank": rank, "period": period, "bits": arg.bits}
    if arg.pretrain:
        first = config.phases[0]
        peak = {"name": "cosine", "peak": 1e-2, "warmup": max(1, first["steps"] // 10)}
        optimizer = {**projected, "learning_rate": peak, "scale": 0.25}
        surgery = [] if arg.plain else [{"name": "gwnlp", "rank": None, "at": EVERYWHERE}]
        # The first phase draws the matrices whose norms the magnitudes start as.
        config.phases = [common.phase(0), {**first, "optimizer": optimizer, "surgery": surgery}]
        return config
    steps = 4 if arg.smoke else 200
    schedule = {"name": "cosine", "peak": 3e-3, "warmup": max(1, steps // 10)}
    adapt = common.phase(
        steps,
        surgery=[{"name": "lora" if arg.lora else "gwnlp", "rank": rank, "at": EVERYWHERE}],
        parameters=train_only(lora.TRAINED if arg.lora else gwnlp.TRAINED),
        optimizer={**({"name": "adamw"} if arg.lora else projected), "learning_rate": schedule},
    )
    config.phases = [*config.phases, adapt]
    return config
