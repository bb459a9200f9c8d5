"""A stacked tensorial network learns the solution operator of a parametric PDE.

From the boundary values of a screened Poisson equation on a rectangle, its coefficient and the
rectangle's height to the field on 16 x 16 points: eight tensor trains of rank 8, weighted by a
network of the two parameters. mode=network is a dense one of as many parameters (21,574 and
21,654) that reads all at once, mode=dense stacks dense maps (133,270).

Command: python train.py --config=configs/stacked_tensorial.py --workdir=runs/stacked_tensorial
Others: ...=configs/stacked_tensorial.py:mode=network and :mode=dense; stacks=4, rank=12 and so on.
Hardware: two CPU cores, minutes.
Expected: relative error of the held-out fields 0.0415; 0.115 with mode=network and 0.0285 with
mode=dense (one seed).
"""

from configs import common

MODES = ("tensorial", "dense", "network")
SHAPES = {"in_shape": [4, 4, 4], "out_shape": [4, 8, 8]}  # 4 sides of 16 values; 16 x 16 points


def get_config(arg=None):
    """The config; `mode` is one of `MODES`."""
    arg = common.parse(arg, mode="tensorial", stacks=8, rank=8, width=66, steps=3000)
    if arg.mode not in MODES:
        raise common.UserError(f"mode={arg.mode!r}; {common.nearest(arg.mode, MODES)}")
    config = common.defaults()
    sizes = {"in_features": 64, "out_features": 256, "parameters": 2}
    if arg.mode == "network":
        config.model = {"name": "network", **sizes, "hidden": arg.width}
    else:
        stack = {"stacks": arg.stacks, "hidden": 30, "depth": 3}
        config.model = {"name": "stacked", **sizes, **stack}
    if arg.mode == "tensorial":
        config.rules = [{"at": "maps/.*", "use": "tensor_train", "rank": arg.rank, **SHAPES}]
    config.data = {"name": "screened_poisson", "grid": 16}
    config.batch_size = 64
    steps = 6 if arg.smoke else arg.steps
    if arg.smoke:
        config.data.update({"train_size": 256, "eval_size": 64})
    schedule = {"name": "cosine", "peak": 5e-3, "warmup": max(1, steps // 20)}
    optimizer = {"name": "adam", "learning_rate": schedule}
    config.phases = [common.phase(steps, objective={"name": "regression"}, optimizer=optimizer)]
    config.log_every = 2 if arg.smoke else 100
    return config
