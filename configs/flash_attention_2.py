"""FlashAttention-2 on a small Llama-shaped model: rotary positions and grouped queries.

Command: python train.py --config=configs/flash_attention_2.py --workdir=runs/flash_attention_2
Baseline: ...=configs/flash_attention_2.py:kernel=reference, standard attention.
Expected: 2.789 held-out bits per byte with either (Python 3.11.7, one seed).
Hardware: two CPU cores, minutes. `--plan=v5e:2x2 --config.compute_dtype=bfloat16` shows the TPU
          program.
Differs from small_lm: Llama's shape with 6 query heads on 2 key heads, 4 sequences of 512 tokens a
step in place of 16 of 128, and 300 steps.
"""

from configs import common


def get_config(arg=None):
    """The config; `kernel` is that of the attention mixer, empty for the platform's."""
    arg = common.parse(arg, kernel="", length=512, steps=300)
    config = common.small_lm(arg, steps=arg.steps)
    if not arg.smoke:
        config.model.max_length = config.data.length = arg.length
        config.batch_size = max(1, 2048 // arg.length)
    heads, kv_heads = (2, 1) if arg.smoke else (6, 2)
    kernel = {"kernel": arg.kernel} if arg.kernel else {}
    rules = common.llama(heads, kv_heads, hidden=2 * config.model.width)
    config.rules = [r | kernel if r["use"] == "attention" else r for r in rules]
    return config
