"""HybridNorm on the small language model: norms of q, k and v inside attention, post-norm FFN.

Command: python train.py --config=configs/hybrid_norm.py --workdir=runs/hybrid_norm
Baselines: ...=configs/hybrid_norm.py:wiring=pre_norm and wiring=post_norm, the same in all else.
Hardware: two CPU cores, about three minutes.
Expected: 2.859 held-out bits per byte, and 2.621 with wiring=pre_norm (Python 3.11.7, one seed
          each): at this size and learning rate the paper's gain is not reproduced, it is a loss.
Differs from small_lm: RMS norm with epsilon 1e-5, as the paper's models have, and the wiring.
`starred` (the default) is HybridNorm*, whose first block is pre-norm.
"""

from configs import common


def get_config(arg=None):
    """The config; `wiring` is hybrid_norm, pre_norm or post_norm, `starred` HybridNorm*."""
    arg = common.parse(arg, wiring="hybrid_norm", starred=True, steps=600)
    config = common.small_lm(arg, steps=arg.steps)
    hybrid = arg.wiring == "hybrid_norm"
    first = [{"at": "blocks/0", "use": arg.wiring, "pre_norm": True}] if hybrid else []
    norms = r"(.*/)?(mixer|channel|final|q|k|v)_norm"
    config.rules = [
        *(first if arg.starred else []),
        {"at": r"blocks/\d+", "use": arg.wiring},
        {
            "at": norms if hybrid else norms.replace("|q|k|v", ""),
            "use": "rms_norm",
            "epsilon": 1e-5,
        },
        *(rule for rule in config.rules if rule["use"] != "layer_norm"),
    ]
    return config
