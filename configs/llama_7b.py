"""Llama 7B's shape (Touvron et al. 2023, arXiv 2302.13971): for planning, and for a pod.

Command: python train.py --config=configs/llama_7b.py --plan=v5e:16x16
         python train.py --config=configs/llama_7b.py --plan=v5p:4x4x4
         python train.py --config=configs/llama_7b.py:length=32768,batch_size=16,sequence=16
         --plan=v5e:16x16
Hardware: TPU pod slices; on a pod drop --plan, add --workdir and --distributed on every host, and
give `config.data` a tokenized corpus.
Expected: the plan fits on both: 2.63 of 15.75 GiB a chip on v5e:16x16, 10.07 of 95.73 on v5p:4x4x4
and, sequences of 32,768 tokens each over 16 chips, 7.58 of 15.75 on v5e:16x16 (reports in
benchmarks/results; nothing was run).
"""

from configs import common


def get_config(arg=None):
    """The config; `:tensor=4` and `:sequence=16` set axes, `:batch_size=1024` suits 1024 chips."""
    arg = common.parse(arg, tensor=1, sequence=1, length=2048, batch_size=512)
    config = of_shape(arg, width=4096, depth=32, heads=32, kv_heads=32, hidden=11008)
    if not arg.smoke:
        config.mesh.update({"tensor": arg.tensor, "sequence": arg.sequence})
    return config


def of_shape(arg, *, width: int, depth: int, heads: int, kv_heads: int, hidden: int):
    """Llama's training at this shape; of `arg` its `length`, `batch_size` and `smoke`."""
    config = common.defaults()
    vocab, length = 32000, arg.length
    if arg.smoke:
        width, depth, heads, kv_heads, hidden, vocab, length = 64, 2, 4, 4, 128, 256, 64
    config.model = {
        "name": "decoder",
        "vocab_size": vocab,
        "width": width,
        "depth": depth,
        "max_length": length,
        "tied": False,
        "remat": "full",
    }
    config.rules = common.llama(heads, kv_heads, hidden)
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
    config.mesh.update({"data": 1, "fsdp": -1})
    config.eval_batches = 2 if arg.smoke else 16
    config.log_every = 2 if arg.smoke else 20
    config.checkpoint_every = 0 if arg.smoke else 1000
    return config
