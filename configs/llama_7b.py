"""Llama 7B's shape (Touvron et al. 2023, arXiv 2302.13971): for planning, and for a pod.

Command: python train.py --config=configs/llama_7b.py --plan=v5e:16x16
         python train.py --config=configs/llama_7b.py --plan=v5p:4x4x4
Hardware: TPU pod slices; on a pod drop --plan, add --workdir and --distributed on every host, and
give `config.data` a tokenized corpus.
Expected: the plan fits on both: 2.63 of 15.75 GiB a chip on v5e:16x16, 10.07 of 95.73 on v5p:4x4x4
(reports in benchmarks/results; nothing was run).
"""

from configs import common


def get_config(arg=None):
    """The config; `:tensor=4` sets the tensor axis, `:batch_size=1024` suits 1024 chips."""
    arg = common.parse(arg, tensor=1, length=2048, batch_size=512)
    config = common.defaults()
    if arg.smoke:
        width, depth, heads, hidden, vocab, length = 64, 2, 4, 128, 256, 64
    else:
        width, depth, heads, hidden, vocab, length = 4096, 32, 32, 11008, 32000, arg.length
    config.model = {
        "name": "decoder",
        "vocab_size": vocab,
        "width": width,
        "depth": depth,
        "max_length": length,
        "tied": False,
        "remat": "full",
    }
    config.rules = common.llama(heads, heads, hidden)
    config.data = {"name": "stdlib", "length": length}
    config.batch_size = 4 if arg.smoke else arg.batch_size
    config.compute_dtype = "float32" if arg.smoke else "bfloat16"
    steps = 6 if arg.smoke else 100_000
    schedule = {"name": "cosine", "peak": 3e-4, "warmup": min(2000, steps // 2), "final": 0.1}
    config.phases = [
        common.phase(
            steps,
            optimizer={
                "name": "adamw",
                "learning_rate": schedule,
                "b2": 0.95,
                "weight_decay": 0.1,
            },
            parameters=[{"at": r".*norm/scale", "weight_decay": 0.0}],
        )
    ]
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1 if arg.smoke else arg.tensor}
    config.eval_batches = 2 if arg.smoke else 16
    config.log_every = 2 if arg.smoke else 20
    config.checkpoint_every = 0 if arg.smoke else 1000
    return config
