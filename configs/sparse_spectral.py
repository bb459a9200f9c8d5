"""Sparse spectral training of the small language model: all projections of the blocks.

At a twelfth of the width as rank, the share of the paper's OPT-125M. Iterations have 25 steps and
so a round 300 (the paper: 200, and its runs are longer). mode=low_rank has two factors of the same
rank instead, the leading parts of a matrix as dense layers start with, mode=dense whole matrices,
both with AdamW.

Command: python train.py --config=configs/sparse_spectral.py --workdir=runs/sparse_spectral
Others: ...=configs/sparse_spectral.py:mode=low_rank and :mode=dense; rank=32 and so on.
Hardware: two CPU cores, minutes.
Expected: 3.138 held-out bits per byte (2,742,912 parameters, of which few are trained at a time);
2.612 with mode=dense (1,853,568) (Python 3.11.7, one seed).
"""

from configs import common

MODES = ("sparse", "low_rank", "dense")
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `mode` is one of `MODES`, `rank` 0 a twelfth of the width."""
    arg = common.parse(arg, mode="sparse", rank=0, interval=25, warmup=3, steps=600)
    if arg.mode not in MODES:
        raise common.UserError(f"mode={arg.mode!r}; {common.nearest(arg.mode, MODES)}")
    config = common.small_lm(arg, steps=arg.steps)
    # So that a smoke run's six steps have a whole round, of two iterations.
    rank = arg.rank or config.model.width // (2 if arg.smoke else 12)
    if arg.mode == "low_rank":
        low = common.gpt2_low_rank(LAYERS, rank, config.model.depth)
        config.rules = [*low, *config.rules]
    if arg.mode == "sparse":
        sparse = {"at": LAYERS, "use": "sparse_spectral", "init_std": 0.02, "bias": True}
        config.rules = [sparse, *config.rules]
        interval, warmup = (2, 1) if arg.smoke else (arg.interval, arg.warmup)
        rules = {"rank": rank, "interval": interval, "warmup": warmup}
        first = config.phases[0]
        config.phases = [
            {**first, "optimizer": {**first["optimizer"], "name": "sst_adam", **rules}}
        ]
    return config
