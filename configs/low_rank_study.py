"""Low-rank training of the small language model from scratch: initialization, decay, warm-up.

All projections of the blocks in two factors of a quarter of the width as rank, drawn as the leading
parts of a Gaussian matrix and decayed by the norm of their product. Each choice has its opposite,
one argument each:

  init=normal         both factors Gaussian, their product of the deviation of a dense layer's
                      matrix; init=spectral_ones keeps the directions alone
  decay=weight        decays the factors themselves; decay_rate is the factors' alone
  warmup=0.25         trains dense for a quarter of the steps and then cuts to the rank, which
                      leaves no init to choose
  share=0.5           half the width as rank
  dense               the baseline, whole matrices with AdamW

Command: python train.py --config=configs/low_rank_study.py --workdir=runs/low_rank_study
         (`:init=normal`, `:decay=weight`, `:init=normal,decay=weight`, `:warmup=0.25`, `:dense`)
Hardware: two CPU cores, minutes.
Expected: 2.925 held-out bits per byte (747,648 parameters); 2.885 with init=normal,decay=weight and
2.612 with :dense (1,853,568) (Python 3.11.7, one seed).
"""

from configs import common

INITS = ("spectral", "spectral_ones", "normal")
# The argument of the optimizer that each sets.
DECAYS = {"frobenius": "frobenius_decay", "weight": "factor_decay"}
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `decay_rate` is that of the factors or of their product, and of nothing else."""
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
    if arg.warmup and arg.init != "spectral":
        raise common.UserError(
            f"init={arg.init} has no effect with warmup={arg.warmup}, which cuts trained matrices;"
            " leave out one"
        )
    rank = max(1, round(arg.share * config.model.width))
    return factorized(config, rank, arg.init, arg.decay, arg.decay_rate, arg.warmup)


def factorized(config, rank: int, init: str, decay: str, rate: float, warmup: float):
    """`config`, of one phase and a model of `common.gpt2`, with these choices."""
    (whole,) = config.phases
    rates = {"frobenius_decay": 0.0, DECAYS[decay]: rate}
    optimizer = {**whole["optimizer"], "name": "frobenius_adamw", **rates}
    if not warmup:
        low = common.gpt2_low_rank(LAYERS, rank, config.model.depth, init)
        config.rules = [*low, *config.rules]
        config.phases = [{**whole, "optimizer": optimizer}]
        return config
    before = max(1, round(warmup * whole["steps"]))
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
