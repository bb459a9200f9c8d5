"""Compositional embeddings in the small language model: 32 rows instead of 256 for all bytes.

Command: python train.py --config=configs/compositional_embeddings.py \\
    --workdir=runs/compositional_embeddings
Others: ...:operation=add or concat; partition=chinese_remainder; operation=table is the baseline.
Hardware: two CPU cores, about three minutes.
Expected: 2.579 held-out bits per byte with 1,810,560 parameters; 2.612 with the full table and
          1,853,568 (Python 3.11.7, one seed each).
The head is tied, so that its table is composed as well.
"""

from configs import common


def get_config(arg=None):
    """The config; `operation` is multiply, add, concat, or `table` for the full table."""
    arg = common.parse(arg, operation="multiply", partition="mixed_radix", steps=600)
    config = common.small_lm(arg, steps=arg.steps)
    if arg.operation != "table":
        names = {"operation": arg.operation, "partition": arg.partition}
        config.rules = [{"at": "embed", "use": "compositional", **names}, *config.rules]
    return config
