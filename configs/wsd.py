"""WSD: a stable run, and its branches that decay; `cosine` is the schedule it is compared with.

Command: python train.py --config=configs/wsd.py --workdir=runs/wsd
         python train.py --config=configs/wsd.py:cosine --workdir=runs/wsd_cosine
Hardware: two CPU cores, minutes.
Expected: 2.999 held-out bits per byte, and 3.111 with `:cosine` (Python 3.11.7, one seed each).

`steps=...` plans another length: up to the decay such runs are the same run.
"""

from configs import common


def get_config(arg=None):
    """`decay=...` sets the steps of the decay, a tenth of the run where it is 0."""
    arg = common.parse(arg, cosine=False, steps=300, decay=0)
    config = common.small_lm(arg, steps=arg.steps)
    phase = dict(config.phases[0])
    steps = phase["steps"]
    schedule = {
        "name": "wsd",
        "peak": 2e-3,
        "warmup": max(1, min(30, steps // 10)),
        "decay": arg.decay or max(1, steps // 10),
    }
    if not arg.cosine:
        phase["optimizer"] = {**phase["optimizer"], "learning_rate": schedule}
    config.phases = [phase]
    return config
