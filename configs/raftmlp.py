"""RaftMLP: vertical and horizontal mixing of channel rafts in place of the ViT's attention.

Command: python train.py --config=configs/raftmlp.py --workdir=runs/raftmlp
Baselines: configs/digits.py, the same model with attention and learned positions, and
configs/poolformer.py:digits, two narrower stages with as many steps.
Hardware: two CPU cores, minutes.
Expected: measured, seed 0, 673 steps, the 355 held-out digits (one is 0.28%): 98.0% at a loss of
0.091 (137,226 parameters), attention 95.5% at 0.172 (202,058), poolformer 97.2% at 0.147 (230,698).
`raft=1` reaches 97.7% at 0.098 and `raft=4` 98.6% at 0.038. One seed each, so the order of the
rafts is not established. On this 4x4 grid rafts of 2 take as many products as MLP-Mixer's tokens.

`variant` r1, r2 and r4 are the authors' ablation on ImageNet-1K at 224x224: 12 blocks of 768
features on 14x14 patches, rafts of 1, 2 and 4. As they train it: AdamW, learning rate 2e-3 for
2048 images a step, cosine to 1e-5, weight decay 0.05 of all parameters, no clipping, 305 epochs of
which 5 warm up, label smoothing 0.1, drop path 0.1. Their augmentation (MixUp, CutMix, cutout,
color jitter) is not part of this project.
Command: python train.py --config=configs/raftmlp.py:variant=r4 --workdir=runs/raftmlp_r4
Hardware: not run here; needs the data set and accelerators.
"""

from configs import common

RAFTS = {"r1": 1, "r2": 2, "r4": 4}
VARIANTS = ("digits", *RAFTS)
IMAGENET_EXAMPLES = 1_281_167


def get_config(arg=None):
    """The config; `raft` is the size of the rafts on the digits."""
    arg = common.parse(arg, variant="digits", raft=2, epochs=30)
    if arg.variant not in VARIANTS:
        raise common.UserError(f"variant={arg.variant!r}; {common.nearest(arg.variant, VARIANTS)}")
    config = common.digits(arg, epochs=arg.epochs)
    if arg.variant in RAFTS and not arg.smoke:
        return imagenet(config, RAFTS[arg.variant])
    config.rules = [*rafts(arg.raft), *config.rules]
    return config


def rafts(raft):
    """Rules that put the mixer, which has norms of its own, into every block, without positions."""
    return [
        {"at": "stages/0/position", "use": "no_position"},
        {"at": r".*/mixer", "use": "raft", "raft": raft},
        {"at": r".*/mixer_norm", "use": "identity"},
    ]


def imagenet(config, raft):
    """The model of the authors' ablation and, but for augmentation, its training."""
    stage = {"width": 768, "depth": 12, "kernel": 16, "stride": 16}
    config.model = {"name": "vision", "stages": [stage], "pooling": "mean"}
    config.rules = [
        *rafts(raft),
        {"at": r"stages/0/blocks/\d+", "use": "pre_norm", "drop_path": 0.1},
        {"at": r".*/channel", "use": "mlp", "activation": "gelu_exact", "bias": True},
        {"at": common.NORMS, "use": "layer_norm"},
    ]
    config.data = {
        "name": "tfds",
        "dataset": "imagenet2012",
        "eval_split": "validation",
        "image_size": 224,
    }
    config.batch_size = 2048
    config.compute_dtype = "bfloat16"
    epoch = IMAGENET_EXAMPLES // config.batch_size
    schedule = {"name": "cosine", "peak": 2e-3, "final": 1e-5, "warmup": 5 * epoch}
    phase = config.phases[0]
    phase["steps"] = 305 * epoch
    phase["objective"] = {"name": "classification", "label_smoothing": 0.1}
    phase["optimizer"] = {"name": "adamw", "learning_rate": schedule, "weight_decay": 0.05}
    phase["parameters"], phase["clip"] = [], None  # everything decays, nothing is clipped
    config.phases = [phase]
    return config
