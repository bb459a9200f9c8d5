"""Gemma 2B's shape (Gemma Team 2024, arXiv 2403.08295): one key-value head, wide heads, GeGLU.

Command: python train.py --config=configs/gemma_2b.py --plan=v5e:4x4
Hardware: sixteen TPU v5e chips or more; `:smoke` is a tiny model of the same rules.
Expected: 2,506,172,416 parameters, which a test counts.
"""

from configs import common


def get_config(arg=None):
    """The config. The head is tied to the embedding; positions are rotary."""
    arg = common.parse(arg)
    if arg.smoke:
        width, depth, heads, head_size, hidden, vocab, length = 64, 2, 2, 48, 128, 256, 64
    else:
        width, depth, heads, head_size, hidden = 2048, 18, 8, 256, 16384
        vocab, length = 256000, 8192
    config = common.small_lm(arg)
    config.model = {
        "name": "decoder",
        "vocab_size": vocab,
        "width": width,
        "depth": depth,
        "max_length": length,
        "tied": True,
        "remat": "full",
    }
    config.rules = common.gemma(heads, 1, head_size, hidden)
    config.data = {"name": "stdlib", "length": length}
    config.phases[0]["parameters"] = [{"at": r".*norm/scale", "weight_decay": 0.0}]
    if not arg.smoke:
        config.batch_size = 64
        config.compute_dtype = "bfloat16"
        config.mesh.update({"data": 1, "fsdp": -1})
    return config
