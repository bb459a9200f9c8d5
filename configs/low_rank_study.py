"""Low-rank training of the small language model from scratch: initialization, decay, warm-up.

All projections of the blocks in two factors of a quarter of the width as rank, drawn as the leading
parts of a Gaussian matrix and decayed by the norm of their product. Each choice has its opposite,
one argument each:

  init=normal         both factors Gaussian; init=spectral_ones keeps the directions alone
  decay=weight        decays the factors themselves
  warmup=0.25         trains dense for a quarter of the steps and then cuts to the rank
  share=0.5           half the width as rank
  dense               the baseline, whole matrices with AdamW

Command: python train.py --config=configs/low_rank_study.py --workdir=runs/low_rank_study
         (`:init=normal`, `:decay=weight`, `:init=normal,decay=weight`, `:warmup=0.25`, `:dense`)
Hardware: two CPU cores, minutes.
Expected: 2.898 held-out bits per byte (747,648 parameters); 3.185 with init=normal,decay=weight and
2.612 with :dense (1,853,568) (Python 3.11.7, one seed).
"""

from configs import common

INITS = ("spectral", "spectral_ones", "normal")
DECAYS = ("frobenius", "weight")
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `decay_rate` is that of the factors or of their product."""
    choices = {"init": "spectral", "decay": "frobenius", "warmup": 0.0, "share": 0.25}
    arg = common.parse(arg, dense=False, steps=600, decay_rate=0.1, **choices)
    for name, known in (("init", INITS), ("decay", DECAYS)):
        if arg[name] not in known:
            raise common.UserError(f"{name}={arg[name]!r}; {common.nearest(arg[name], known)}")
    if not 0 <= arg.warmup < 1:
        raise common.UserError(f"warmup={arg.warmup} must be from 0 to below 1, a share of steps")
    config = common.small_lm(arg, steps=arg.steps)
    if arg.dense:
        return config
    rank, whole = max(1, round(arg.share * config.model.width)), config.phases[0]
    if arg.decay == "frobenius":
        optimizer = {"name": "frobenius_adamw", "frobenius_decay": arg.decay_rate}
        optimizer = {**whole["optimizer"], **optimizer}
    else:
        optimizer = {**whole["optimizer"], "weight_decay": arg.decay_rate}
    if not arg.warmup:
        low = {"at": LAYERS, "use": "low_rank", "rank": rank, "init": arg.init, "bias": True}
        config.rules = [low | {"init_std": 0.02}, *config.rules]
        config.phases = [{**whole, "optimizer": optimizer}]
        return config
    before = max(1, round(arg.warmup * whole["steps"]))
    steps = whole["steps"] - before
    peak = whole["optimizer"]["learning_rate"]["peak"]
    rising = {"name": "constant", "value": peak, "warmup": max(1, before // 10)}
    falling = {"name": "cosine", "peak": peak, "warmup": max(1, steps // 20)}
    cut = {"name": "dense_to_low_rank", "at": LAYERS, "rank": rank}
    config.phases = [
        {**whole, "steps": before, "optimizer": {**whole["optimizer"], "learning_rate": rising}},
        {
            **whole,
            "steps": steps,
            "optimizer": {**optimizer, "learning_rate": falling},
            "surgery": [cut],
        },
    ]
    return config
