"""LoRA-Mini: pretrain the small language model, then train only the inner matrices of adapters.

Command: python train.py --config=configs/lora_mini.py --workdir=runs/lora_mini
         (`:lora` for plain LoRA of the same rank, the baseline)
Hardware: two CPU cores, about three minutes.
Expected: 2.932 held-out bits per byte before and 2.930 after the second phase, which trains 2048
          numbers; 2.906 with `:lora` and 24,576 (Python 3.11.7, one seed each).
"""

from configs import common
from efficient.surgery import lora, lora_mini
from efficient.surgery.common import train_only


def get_config(arg=None):
    """Two phases: all parameters, then 256 numbers a linear (LoRA: 3072) on q and v."""
    arg = common.parse(arg, lora=False, rank=8)
    config = common.small_lm(arg, steps=400)
    steps = 4 if arg.smoke else 200
    surgery = {"name": "lora" if arg.lora else "lora_mini", "rank": arg.rank}
    adapt = common.phase(
        steps,
        surgery=[surgery],
        parameters=train_only(lora.TRAINED if arg.lora else lora_mini.TRAINED),
        optimizer={
            "name": "adamw",
            "learning_rate": {"name": "cosine", "peak": 3e-3, "warmup": max(1, steps // 10)},
        },
    )
    config.phases = [*config.phases, adapt]
    return config
