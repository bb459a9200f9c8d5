"""FlashAttention on the small language model: exact attention in memory linear in the length.

Command: python train.py --config=configs/flash_attention.py --workdir=runs/flash_attention
Baseline: ...=configs/flash_attention.py:kernel=reference, standard attention with its T x T arrays.
Expected: 3.519 held-out bits per byte with either (Python 3.11.7, one seed).
Hardware: two CPU cores, minutes. `--plan=v5e:2x2 --config.compute_dtype=bfloat16` shows the TPU
          program.
Differs from small_lm: 4 sequences of 512 tokens a step in place of 16 of 128, and 300 steps.
"""

from configs import common


def get_config(arg=None):
    """The config; `kernel` is that of the attention mixer, empty for the platform's."""
    arg = common.parse(arg, kernel="", length=512, steps=300)
    config = common.small_lm(arg, steps=arg.steps)
    if not arg.smoke:
        config.model.max_length = config.data.length = arg.length
        config.batch_size = max(1, 2048 // arg.length)
    kernel = {"kernel": arg.kernel} if arg.kernel else {}
    config.rules = [r | kernel if r["use"] == "attention" else r for r in config.rules]
    return config
