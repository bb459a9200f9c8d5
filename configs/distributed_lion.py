"""Distributed Lion: the small language model on replicas that vote by one bit a parameter.

Command: python train.py --config=configs/distributed_lion.py --workdir=runs/distributed_lion
Others: ...=configs/distributed_lion.py:vote=average; replicas=8; :lion and :adamw, the baselines on
        gradients that are summed.
Hardware: four devices; a CPU is asked for four that share its cores.
Expected: no full run was made; the smoke run ends without error.
"""

from configs import common


def get_config(arg=None):
    """The learning rate is a tenth of AdamW's; `peak` is another one."""
    arg = common.parse(
        arg, vote="majority", replicas=4, lion=False, adamw=False, peak=2e-4, steps=300
    )
    config = common.small_lm(arg, steps=arg.steps)
    config.mesh.data = arg.replicas
    if arg.adamw:
        return config
    first = config.phases[0]
    schedule = {**first["optimizer"]["learning_rate"], "peak": arg.peak}
    optimizer = {"name": "lion", "learning_rate": schedule, "weight_decay": 0.1}
    if not arg.lion:
        optimizer |= {"name": "distributed_lion", "vote": arg.vote}
    config.phases = [{**first, "optimizer": optimizer}]
    return config
