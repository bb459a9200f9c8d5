"""Interleaved 1F1B: two chunks of layers a stage, half of the bubble.

Command: python train.py --config=configs/interleaved_pipeline.py --workdir=runs/interleaved
Picture: python -m efficient.parallel.schedules interleaved --stages 2 --microbatches 8 \\
             --chunks 2 --draw interleaved.png
Hardware: two devices; a CPU is asked for two that share its cores.
Expected: the smoke run ends without error; no full run was made. The bubble of two stages, eight
          microbatches and two chunks is 1/16 of the time of computing, 1/8 of `configs/gpipe.py`.
"""

from configs import gpipe


def get_config(arg=None):
    """As of `configs/gpipe.py`; a smoke run, of two layers, has one chunk a stage."""
    smoke = arg is not None and "smoke" in arg.split(",")
    ours = f"stages=2,schedule=interleaved,chunks={1 if smoke else 2}"
    return gpipe.get_config(",".join(filter(None, (ours, arg))))
