"""The small language model in stages, its microbatches through them by a schedule (GPipe).

Command: python train.py --config=configs/gpipe.py --workdir=runs/gpipe
Others: ...=configs/gpipe.py:stages=2,microbatches=16, and schedule=eager_1f1b
Pictures: python -m efficient.parallel.schedules gpipe --stages 4 --microbatches 8 --draw gpipe.png
Hardware: as many devices as stages; a CPU is asked for as many that share its cores.
Expected: the smoke run ends without error; no full run was made. Its steps are those of
          `stages=1`, which accumulates the gradients of the same microbatches.
"""

from configs import common


def get_config(arg=None):
    """`stages` times `chunks` divide the four layers (two of a smoke run)."""
    arg = common.parse(arg, stages=0, microbatches=8, chunks=1, schedule="gpipe", steps=300)
    config = common.small_lm(arg, steps=arg.steps)
    stages = arg.stages or config.model.depth // arg.chunks
    config.mesh.update({"data": 1, "pipeline": stages})
    config.pipeline = {"schedule": arg.schedule, "chunks": arg.chunks}
    config.accumulate = min(arg.microbatches, config.batch_size)
    return config
