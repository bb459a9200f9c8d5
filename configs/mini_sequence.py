"""Mini-sequences: feed-forward blocks and the head's loss in pieces of the sequence.

Command: python train.py --config=configs/mini_sequence.py --workdir=runs/mini_sequence
         python train.py --config=configs/mini_sequence.py:whole --workdir=runs/whole
         python train.py --config=configs/mini_sequence.py:llama,length=32768 --plan=v5p:2x2x1
         python train.py --config=configs/mini_sequence.py:llama,length=32768,whole \\
             --plan=v5p:2x2x1
Hardware: two CPU cores, about two minutes; the plans need no hardware.
Expected: 3.635 held-out bits per byte, and 3.651 with `whole`, which starts from other draws, since
          those depend on paths (Python 3.11.7, one seed each). By the plans, one sequence of 32,768
          tokens a chip of Llama 3 8B takes temporaries of 19.8 GiB, and 44.5 GiB with `whole`, at
          the same traffic between chips (reports in benchmarks/results; nothing was run).
"""

from configs import common


def get_config(arg=None):
    """`whole` computes the sequence whole; `llama` is the shape of Llama 3 8B, for plans.

    `length=...` sets the sequence's length (0: the shape's own), `pieces=...` M.
    """
    arg = common.parse(arg, whole=False, llama=False, length=0, pieces=8)
    config = _llama(arg) if arg.llama and not arg.smoke else _small(arg)
    if arg.whole:
        return config
    use, rules = ("glu", []) if arg.llama else ("mlp", _output_init(config))
    channel = next(rule for rule in config.rules if rule["use"] == use)
    arguments = {k: v for k, v in channel.items() if k not in ("at", "use")}
    pieces = {"use": "mini_sequence", "of": use, "pieces": arg.pieces, "arguments": arguments}
    config.rules = [{"at": r"blocks/\d+/channel", **pieces}, *rules, *config.rules]
    objective = {"name": "mini_sequence_loss", "pieces": arg.pieces}
    config.phases = [{**config.phases[0], "objective": objective}]
    return config


def _small(arg):
    config = common.small_lm(arg, steps=150)
    if arg.llama:
        config.rules = common.llama(2, 1, 128)
    if not arg.smoke:
        config.model.max_length = config.data.length = arg.length or 512
        config.batch_size = 8
    return config


def _output_init(config):
    """The small model's scaled initialization, at the path that it has inside mini-sequences."""
    std = 0.02 / (2 * config.model.depth) ** 0.5
    return [{"at": r"blocks/\d+/channel/base/down", "use": "dense", "init_std": std}]


def _llama(arg):
    """Llama 3 8B (arXiv 2407.21783, table 3), one sequence a chip."""
    config = common.defaults()
    length = arg.length or 4096
    config.model = {
        "name": "decoder",
        "vocab_size": 128_256,
        "width": 4096,
        "depth": 32,
        "max_length": length,
        "tied": False,
        "remat": "full",
    }
    config.rules = common.llama(32, 8, 14_336, theta=500_000.0)
    config.data = {"name": "stdlib", "length": length}
    config.batch_size = 4
    config.compute_dtype = "bfloat16"
    config.mesh.update({"data": 1, "fsdp": -1})
    config.phases = [common.phase(1000)]
    return config
