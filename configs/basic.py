"""BASIC: contrastive training of an image tower and a text tower, the batch larger than memory.

Command: python train.py --config=configs/basic.py --workdir=runs/basic
         python train.py --config=configs/basic.py:microbatches=1 --workdir=runs/whole
Hardware: two CPU cores; it took 18 minutes on one that was shared.
Expected: an image finds a caption of its triple in 0.876 of held-out pairs, by chance 0.005; loss
1.723 nats. Eight microbatches, one seed; the other command was not run to its end.

Images of three digits are matched with captions; held out are triples that no caption of training
named. `accuracy` is over the captions of a batch: 512 pairs name some 185 of the 200 held-out
triples.
"""

from configs import common


def get_config(arg=None):
    """`microbatches` of a batch of `batch_size` pairs are in memory one after the other."""
    arg = common.parse(arg, microbatches=8, batch_size=512, steps=400)
    width, depth, heads = (32, 1, 2) if arg.smoke else (64, 4, 4)
    steps = 6 if arg.smoke else arg.steps
    config = common.defaults()
    config.model = {
        "name": "dual_encoder",
        "stages": [{"width": width, "depth": depth, "kernel": 2, "stride": 2}],
        "text": {"width": width, "depth": depth},
        "max_length": 8,
        "embedding": width,
    }
    blocks = r"(image/stages/\d+|text)/blocks/\d+"
    config.rules = [
        {"at": "text/position", "use": "learned", "init_std": 0.01},
        {"at": f"{blocks}/mixer", "use": "attention", "heads": heads, "bias": True},
        {"at": f"{blocks}/channel", "use": "mlp", "hidden": 4 * width, "bias": True},
        {"at": common.NORMS, "use": "layer_norm"},
    ]
    config.data = {"name": "captions"}
    config.batch_size = 64 if arg.smoke else arg.batch_size
    schedule = {"name": "cosine", "peak": 2e-3, "warmup": max(1, steps // 10)}
    config.phases = [
        common.phase(
            steps,
            objective={"name": "contrastive", "microbatches": arg.microbatches},
            optimizer={"name": "adamw", "learning_rate": schedule, "weight_decay": 0.05},
            parameters=[common.NO_DECAY],
        )
    ]
    config.log_every = 2 if arg.smoke else 20
    return config
