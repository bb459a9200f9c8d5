"""Pixelfly in the small language model: all projections of attention and MLP at a quarter density.

A layer keeps `density` of a dense one's parameters: a flat block butterfly and a low-rank term.
mode=random has blocks at random places of the same density instead, mode=dense is the baseline.
Blocks are a sixteenth of the width.

Command: python train.py --config=configs/pixelfly.py --workdir=runs/pixelfly
Others: ...=configs/pixelfly.py:mode=random and :mode=dense; density=0.5 and so on.
Hardware: two CPU cores, minutes.
Expected: 2.677 held-out bits per byte (521,880 parameters) and 2.484 with mode=random; 2.612 with
mode=dense (1,853,568), which a rate of 0.004 brings to 2.565 (Python 3.11.7, one seed each). Sparse
matrices start as large as dense ones and learn at four times their rate, the best of 0.004, 0.008
and 0.016 for Pixelfly; as the authors start them, and at the dense model's rate, it was at 2.906.
"""

from configs import common

MODES = ("pixelfly", "random", "dense")
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `mode` is one of `MODES`."""
    arg = common.parse(arg, mode="pixelfly", density=0.25, steps=600)
    if arg.mode not in MODES:
        raise common.UserError(f"mode={arg.mode!r}; {common.nearest(arg.mode, MODES)}")
    config = common.small_lm(arg, steps=arg.steps)
    if arg.mode != "dense":
        sparse = {
            "use": "pixelfly" if arg.mode == "pixelfly" else "block_sparse",
            "density": arg.density,
            "block": config.model.width // 16,
            "bias": True,
        }
        config.rules = [*common.gpt2_linear(LAYERS, config.model.depth, **sparse), *config.rules]
        config.phases[0]["optimizer"]["learning_rate"]["peak"] = 8e-3
    return config
