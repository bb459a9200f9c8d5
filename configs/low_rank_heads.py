"""Low-rank attention heads: queries, keys and values of the small language model in two factors.

Command: python train.py --config=configs/low_rank_heads.py --workdir=runs/low_rank_heads
         (`:full` for full projections, the baseline; `share=4` for a quarter of the width as rank)
Hardware: two CPU cores, minutes.
Expected: 3.216 held-out bits per byte; 3.110 with :full, of as many parameters (Python 3.11.7, one
seed).
"""

from configs import common


def get_config(arg=None):
    """Rank D / 2 by default, at which q, k and v have as many parameters as without factors."""
    arg = common.parse(arg, full=False, share=2, depth=0)
    config = common.small_lm(arg, steps=300)
    if arg.depth:
        config.model["depth"] = arg.depth
    if not arg.full:
        rank = config.model["width"] // arg.share
        projections = {"at": r"blocks/\d+/mixer/(q|k|v)", "use": "low_rank", "rank": rank}
        config.rules = [{**projections, "init_std": 0.02}, *config.rules]
    return config
