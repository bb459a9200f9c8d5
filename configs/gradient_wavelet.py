"""Gradient wavelets: Adam with a quarter of its state; `adamw` trains the same with AdamW.

Command: python train.py --config=configs/gradient_wavelet.py --workdir=runs/gradient_wavelet
         python train.py --config=configs/gradient_wavelet.py:adamw --workdir=runs/gwt_adamw
         (`level=1` for half of the state)
Hardware: two CPU cores, minutes.
Expected: 3.195 held-out bits per byte; with the authors' rate, `peak=0.01`, 3.636 and 3.414 with
level=1; 3.110 with :adamw (Python 3.11.7, one seed).
"""

from configs import common


def get_config(arg=None):
    """The authors' scale 0.25; their learning rate of 0.01 is too high for so short a run."""
    arg = common.parse(arg, adamw=False, level=2, scale=0.25, peak=3e-3)
    config = common.small_lm(arg, steps=300)
    if arg.adamw:
        return config
    steps = config.phases[0]["steps"]
    optimizer = {
        "name": "gwt_adam",
        "learning_rate": {"name": "cosine", "peak": arg.peak, "warmup": max(1, steps // 10)},
        "level": arg.level,
        "scale": arg.scale,
    }
    config.phases = [{**config.phases[0], "optimizer": optimizer}]
    return config
