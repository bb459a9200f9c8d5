"""Sparse 8-bit inference: the small language model is trained, pruned in blocks and quantized.

Three quarters of the steps train it whole; then blocks of 4 x 16 weights go until a fifth is left
of every projection, in two turns, each followed by training; a last phase without steps turns what
is left into 8 bits. The held-out loss is printed at the end of each.

Command: python train.py --config=configs/sparse_cpu_inference.py --workdir=runs/sparse_inference
Others: ...=configs/sparse_cpu_inference.py:sparsity=0.9, and dense for the same steps unpruned.
Times: python -m benchmarks.sparse_cpu_inference
Hardware: two CPU cores, minutes.
Expected: held-out bits per byte 2.627 whole, 2.674 with three fifths left, 3.004 with a fifth and
3.004 once that is in 8 bits (Python 3.11.7, one seed).
"""

from configs import common

LAYERS = r"blocks/\d+/(mixer/(q|k|v|out)|channel/(up|down))"


def get_config(arg=None):
    """The config; `inputs` x `outputs` is the size of a block."""
    arg = common.parse(arg, sparsity=0.8, inputs=4, outputs=16, dense=False, steps=800)
    config = common.small_lm(arg, steps=arg.steps)
    if arg.dense:
        return config
    first = config.phases[0]
    block = [arg.inputs, arg.outputs]
    tuned = max(1, first["steps"] // 8)
    schedule = {"name": "cosine", "peak": 1e-3, "warmup": max(1, tuned // 10)}
    optimizer = {**first["optimizer"], "learning_rate": schedule}

    def pruned(sparsity):
        surgery = {"name": "block_prune", "at": LAYERS, "sparsity": sparsity, "block": block}
        return {**first, "steps": tuned, "optimizer": optimizer, "surgery": [surgery]}

    config.phases = [
        {**first, "steps": first["steps"] - 2 * tuned},
        pruned(arg.sparsity / 2),
        pruned(arg.sparsity),
        common.phase(0, surgery=[{"name": "sparse_int8"}]),
    ]
    return config
