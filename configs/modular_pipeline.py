"""Layered gradient accumulation: all microbatches through a layer before the next one.

Layers are dealt to the stages in turn, so that the gradients of a layer are complete early and
their sum over data-parallel devices may overlap with the passes through other layers.

Command: python train.py --config=configs/modular_pipeline.py --workdir=runs/modular
Picture: python -m efficient.parallel.schedules modular --stages 2 --microbatches 8 --chunks 2 \\
             --draw modular.png
Hardware: two devices; a CPU is asked for two that share its cores.
Expected: the smoke run ends without error; no full run was made. The order of passes is the
          paper's; sums over devices follow the last pass in the program, so that nothing overlaps.
"""

from configs import gpipe


def get_config(arg=None):
    """As of `configs/gpipe.py`; a smoke run, of two layers, has one chunk a stage."""
    smoke = arg is not None and "smoke" in arg.split(",")
    ours = f"stages=2,schedule=modular,chunks={1 if smoke else 2}"
    return gpipe.get_config(",".join(filter(None, (ours, arg))))
