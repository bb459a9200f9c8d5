"""Llama 2 70B's shape (Touvron et al. 2023, arXiv 2307.09288), its layers in stages of a pipeline.

Command: python train.py --config=configs/llama_70b.py --plan=v5p:8x8x16
Others: ...=configs/llama_70b.py:pipeline=4,tensor=16,microbatches=8 and so on.
Hardware: a TPU pod slice; on it drop --plan, add --workdir and --distributed on every host, and
give `config.data` a tokenized corpus.
Expected: the plan fits, 24.04 of 95.73 GiB a chip (report in benchmarks/results; nothing was run).
"""

from configs import common, llama_7b


def get_config(arg=None):
    """Eight stages of ten layers, each split over eight chips; batches of 4 million tokens."""
    arg = common.parse(
        arg, pipeline=8, tensor=8, microbatches=16, schedule="eager_1f1b", length=4096,
        batch_size=1024,
    )  # fmt: skip
    shape = {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 28672}
    config = llama_7b.of_shape(arg, **shape)
    if not arg.smoke:
        # Gathered weights would travel for every microbatch, so that replicas are whole.
        mesh = {"data": -1, "fsdp": 1, "pipeline": arg.pipeline, "tensor": arg.tensor}
        config.mesh.update(mesh)
        config.accumulate, config.pipeline.schedule = arg.microbatches, arg.schedule
    return config
