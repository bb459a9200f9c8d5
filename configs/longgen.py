"""LongGen: a model of 128 bytes of context is extended to 512 as a hybrid, by two runs.

Command: python train.py --config=configs/longgen.py:part=base --workdir=runs/longgen_base
         python train.py --config=configs/longgen.py --workdir=runs/longgen
Baseline: configs/longgen.py:part=full, which extends with full attention in all layers.
Hardware: two CPU cores; six minutes for the base and two for the extension, on a loaded machine.
Expected: the base has 1.927 held-out bits per byte at 128. After 150 steps at 512 (Llama-shaped,
six layers, of which the middle two are full; one seed each, Python 3.11) the hybrid has 1.885, full
attention 1.889. Bits per byte of the last 64 bytes of the same contexts (eval.py
--lengths=128,256,512):

    bytes of context                  128     256     512
    base, full attention            2.013   3.182   4.073
    base made a hybrid, untrained   2.015   2.749   3.448
    hybrid, extended                2.010   2.010   2.022
    full, extended                  2.013   2.011   2.028

For 512 tokens the hybrid's cache holds 1,664 tokens of 3,072 in all layers, 46% fewer, with
`pattern=sinks` (not trained here) 1,344. The paper's layers are full in the middle third; its
windows and strides were not to be read, and these are ours.
"""

from configs import common

PARTS = ("base", "hybrid", "full")


def get_config(arg=None):
    """The config; `part` is the model that is extended, the hybrid, or its full baseline."""
    arg = common.parse(arg, part="hybrid", pattern="stride", init="runs/longgen_base")
    if arg.part not in PARTS:
        raise common.UserError(f"part={arg.part!r}; {common.nearest(arg.part, PARTS)}")
    if arg.pattern not in PATTERNS:
        raise common.UserError(f"pattern={arg.pattern!r}; {common.nearest(arg.pattern, PATTERNS)}")
    base = arg.part == "base"
    config = common.small_lm(arg, steps=600 if base else 150)
    width, depth = config.model.width, 3 if arg.smoke else 6
    heads = width // 32
    config.model.depth = depth
    rules = common.llama(heads, heads // 2, hidden=8 * width // 3)
    config.rules = rules if arg.part != "hybrid" else [hybrid(depth, arg.pattern, heads), *rules]
    if not base:
        extend(config, 4)
        config.init_from = "" if arg.smoke else arg.init
    return config


# Of 512 tokens, a sparse layer's cache holds 160 with strided blocks and 80 with sinks.
PATTERNS = {
    "stride": {"window": 64, "stride": 6, "block": 16},
    "sinks": {"window": 64, "sinks": 16},
}


def hybrid(depth, pattern, heads):
    """The rule that makes the layers below and above the middle third sparse."""
    layers = "|".join(str(i) for i in range(depth) if i not in full_layers(depth))
    shape = {"heads": heads, "kv_heads": heads // 2, "rope": 10_000.0}
    return {"at": rf"blocks/({layers})/mixer", "use": "longgen", **PATTERNS[pattern], **shape}


def full_layers(depth):
    """The middle third of the layers, rounded."""
    count = max(1, round(depth / 3))
    first = (depth - count) // 2
    return range(first, first + count)


def extend(config, times):
    """As many tokens a step in fewer, longer texts, and a lower learning rate."""
    config.model.max_length *= times
    config.data.length *= times
    config.batch_size //= times
    config.phases[0]["optimizer"]["learning_rate"]["peak"] = 5e-4
