"""Long Range Arena's ListOps and Pathfinder (Tay et al. 2020, arXiv 2011.04006), generated here.

Command: python train.py --config=configs/long_range.py --workdir=runs/listops
         python train.py --config=configs/long_range.py:task=pathfinder --workdir=runs/pathfinder
Hardware: a GPU or TPU at the benchmark's 2000 and 1024 tokens; a CPU for ListOps at `length=128`.
Expected: not run at full length. A causal decoder reads the class at the last token, where the
benchmark's models pool over tokens that see each other, so its figures are no aim here.
"""

from configs import common
from efficient.errors import UserError, nearest

TASKS = ("listops", "pathfinder")


def get_config(arg=None):
    """The config; `task=pathfinder`, `length=` of ListOps, `steps=`."""
    arg = common.parse(arg, task="listops", length=2000, steps=5000)
    if arg.task not in TASKS:
        raise UserError(f"config argument task={arg.task!r}; {nearest(arg.task, TASKS)}")
    config = common.small_lm(arg, steps=arg.steps, objective={"name": "classification"})
    if arg.task == "listops":
        length = 64 if arg.smoke else arg.length
        config.data = {"name": "listops", "length": length}
        config.data = {**config.data, "min_length": length // 4, "max_length": length}
    else:
        length = 32**2
        config.data = {"name": "pathfinder", "image_size": 32}
    if arg.smoke:
        config.data = {**config.data, "train_size": 64, "eval_size": 16}
    config.model = {**config.model, "max_length": length}
    config.batch_size = 4 if arg.smoke else 32
    return config
