"""Monarch matrices in the small language model: reverse sparsification.

Nine tenths of the steps train Monarch matrices in all projections of the blocks; then the factors
are multiplied out and the dense model trains to the end, as for GPT-2 in the paper.

Command: python train.py --config=configs/monarch.py --workdir=runs/monarch
Others: ...=configs/monarch.py:mode=sparse stays Monarch to the end, mode=dense is the baseline,
mode=finetune projects a dense model of nine tenths of the steps onto Monarch matrices.
Hardware: two CPU cores, minutes.
Expected: 2.765 held-out bits per byte after the Monarch steps (747,648 parameters) and 2.742 at
the end; 2.612 with mode=dense (1,853,568), which a rate of 0.004 brings to 2.565 (Python 3.11.7,
one seed each). Monarch matrices start as large as dense ones and learn at 0.004, dense ones at
0.002; as their authors start them, and at 0.002, Monarch was at 2.916 and 2.929.
"""

from configs import common

MODES = ("reverse", "sparse", "dense", "finetune")
LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `mode` is one of `MODES`, `blocks` the number of blocks of each factor."""
    arg = common.parse(arg, mode="reverse", blocks=4, steps=600)
    if arg.mode not in MODES:
        raise common.UserError(f"mode={arg.mode!r}; {common.nearest(arg.mode, MODES)}")
    config = common.small_lm(arg, steps=arg.steps)
    first = config.phases[0]
    if arg.mode in ("reverse", "sparse"):
        monarch = {"use": "monarch", "blocks": arg.blocks, "bias": True}
        config.rules = [*common.gpt2_linear(LAYERS, config.model.depth, **monarch), *config.rules]
        first["optimizer"]["learning_rate"]["peak"] = 4e-3
    surgery = {
        "reverse": {"name": "monarch_to_dense"},
        "finetune": {"name": "dense_to_monarch", "at": LAYERS, "blocks": arg.blocks},
    }.get(arg.mode)
    if surgery:
        steps = max(1, first["steps"] // 10)
        # A schedule lasts for its phase, so the second warms up and decays once more, from less.
        schedule = {"name": "cosine", "peak": 1e-3, "warmup": max(1, steps // 10)}
        optimizer = {**first["optimizer"], "learning_rate": schedule}
        second = {**first, "steps": steps, "optimizer": optimizer, "surgery": [surgery]}
        config.phases = [{**first, "steps": first["steps"] - steps}, second]
    return config
