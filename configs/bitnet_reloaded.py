"""BitNet b1.58 Reloaded: small models with ternary weights in all their blocks.

Command: python train.py --config=configs/bitnet_reloaded.py --workdir=runs/bitnet_reloaded
         (`:dense` is the baseline of equal shape, `:doubled` has twice the hidden sizes;
         `:vision` and `:vision,dense` classify digits)
Hardware: two CPU cores.
Expected: `:vision` 94.7% and 93.5% of held-out digits with seeds 0 and 1, `:vision,dense` 94.7% and
          96.1%. Language model: 2.991 held-out bits per byte, and 2.612 with `:dense` (Python
          3.11.7, one seed each).
"""

from configs import common


def get_config(arg=None):
    """Every linear in the blocks is `bitlinear`; embeddings and head stay in full precision."""
    arg = common.parse(arg, dense=False, doubled=False, vision=False, measure="median")
    config = common.digits(arg) if arg.vision else common.small_lm(arg, steps=600)
    if arg.doubled and not arg.vision:
        config.model.width *= 2
        config.rules = common.gpt2(config.model.width, config.model.depth, 2 if arg.smoke else 6)
    if not arg.dense:
        ternary = {"at": r"(stages/\d+/)?blocks/.*", "use": "bitlinear", "measure": arg.measure}
        config.rules = [ternary, *(rule for rule in config.rules if rule["use"] != "dense")]
    return config
