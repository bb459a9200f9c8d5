"""Megatron-LM: the small language model with its sublayers split over devices.

Command: python train.py --config=configs/megatron.py --workdir=runs/megatron
         python train.py --config=configs/megatron.py:model=8.3b,tensor=8 --plan=v5e:8x8
Others: ...=configs/megatron.py:plain is the form of 2019, whose norms every device computes;
        tensor=2 is the number of devices a sublayer is split over.
Hardware: two devices; a CPU is asked for two that share its cores. The plan needs none.
Expected: the smoke run ends without error; no full run was made, nor the plan. The steps are those
          of one device.
"""

from configs import common
from efficient.errors import UserError, nearest

# Width, depth, heads of the paper's models, written from memory: its table was not read here.
SHAPES = {
    "1.2b": (1536, 40, 16),
    "2.5b": (1920, 54, 20),
    "4.2b": (2304, 64, 24),
    "8.3b": (3072, 72, 32),
}


def get_config(arg=None):
    """`model` is `small` or one of `SHAPES`, of 1,024 tokens and bfloat16."""
    arg = common.parse(arg, tensor=2, plain=False, model="small", steps=300)
    if arg.model != "small" and arg.model not in SHAPES:
        raise UserError(f"config argument model={arg.model!r}; {nearest(arg.model, SHAPES)}")
    config = common.small_lm(arg, steps=arg.steps)
    if arg.model != "small" and not arg.smoke:
        width, depth, heads = SHAPES[arg.model]
        config.model = {
            "name": "decoder",
            "vocab_size": 51_200,
            "width": width,
            "depth": depth,
            "max_length": 1024,
            "remat": "full",
        }
        config.rules = common.gpt2(width, depth, heads)
        config.data = {"name": "stdlib", "length": 1024}
        config.batch_size = 512
        config.compute_dtype = "bfloat16"
    config.mesh.update({"data": -1, "tensor": arg.tensor})
    if arg.plain:
        config.placement = [{"at": "activations/tokens", "spec": [["data", "fsdp"], "sequence"]}]
    return config
