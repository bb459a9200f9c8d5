"""What configs share: the argument after the colon, the defaults of a run, and model shapes.

A config file defines `get_config(arg)`. `--config=configs/x.py:smoke,key=value` passes
`smoke,key=value`; `parse` turns it into a ConfigDict, and `finish` shrinks a smoke run, so that
every config has one.
"""

from ml_collections import ConfigDict

from efficient.errors import UserError, nearest


def parse(arg: str | None = None, **defaults) -> ConfigDict:
    """`smoke,depth=4` -> ConfigDict(smoke=True, depth=4), typed by the defaults.

    A bare name sets a boolean. Unknown keys and values of another type are refused.
    """
    parsed = ConfigDict({"smoke": False, **defaults})
    for item in filter(None, (arg or "").split(",")):
        key, _, value = item.partition("=")
        if key not in parsed:
            raise UserError(f"config argument {key!r} is unknown; {nearest(key, parsed.keys())}")
        kind = type(parsed[key])
        if kind is bool:
            if value not in ("", "true", "false", "True", "False"):
                raise UserError(f"config argument {key} is on or off; write {key} or {key}=false")
            parsed[key] = value in ("", "true", "True")
            continue
        try:
            parsed[key] = kind(value)
        except ValueError:
            raise UserError(f"config argument {key}={value!r} is no {kind.__name__}") from None
    return parsed


def defaults() -> ConfigDict:
    """Every field of a config, with the value a run takes where the config is silent."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {"name": "decoder"},
            "rules": [],  # where, what, how: [{at: pattern, use: technique, **arguments}]
            "imports": [],  # modules to import first, which register techniques of your own
            "data": {"name": "stdlib"},
            "batch_size": 16,  # examples a step, over all devices
            "data_workers": 0,  # loading processes; 0 reads in the training process
            "phases": [],  # see `phase`
            "compute_dtype": "float32",
            "accumulate": 1,  # microbatches a step
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1, "pipeline": 1},
            # The order of passes over mesh.pipeline, whose microbatches are `accumulate`, and the
            # chunks of layers a stage has.
            "pipeline": {"schedule": "eager_1f1b", "chunks": 1},
            "sequence": {"name": "ring"},  # how attention crosses a sequence split by mesh.sequence
            # Over which batch axes each is split: none ("replicated"), fsdp ("group"), fsdp and
            # data ("global"). The "compiler" or each "block" gathers parameters.
            "scopes": {
                "parameters": "group",
                "gradients": "group",
                "optimizer": "group",
                "gather": "compiler",
            },
            "placement": [],  # [{at: pattern, spec: [mesh axis or None, ...]}] before the defaults
            "init_from": "",  # workdir of another run whose parameters to start from
            "log_every": 20,
            "eval_every": 0,  # 0: at the end of each phase only
            "eval_batches": 0,  # 0: all held-out examples
            "checkpoint_every": 0,  # 0: at the end of each phase only
            "keep_checkpoints": 2,
            "profile": (),  # [first, last] steps to trace for TensorBoard
            "sample": {"prompt": "", "length": 0, "temperature": 0.8},
            "plot": True,
        }
    )


def phase(steps: int, **fields) -> dict:
    """One phase: surgery on the model, then `steps` of an optimizer on an objective.

    Fields: `objective`, `optimizer` (each {name, **arguments}; an optimizer's numbers may be
    schedules, {name, **arguments}), `surgery` and `parameters` (lists of {...}; parameters are
    rules {at, train, learning_rate, weight_decay} that freeze and scale), `selection`, `clip`
    (global norm), `ema` (decay).
    """
    base = {
        "steps": steps,
        "objective": {"name": "next_token"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "surgery": [],
        "parameters": [],
        "selection": None,
        "clip": 1.0,
        "ema": None,
    }
    unknown = set(fields) - set(base)
    if unknown:
        name = min(unknown)
        raise UserError(f"a phase has no field {name!r}; {nearest(name, base)}")
    return {**base, **fields}


# The norms of blocks and the last one; `.*norm` would also fill attention's optional q/k/v norms.
NORMS = r"(.*/)?(mixer|channel|final)(_out)?_norm"
NO_DECAY = {"at": r".*(bias|scale|norm/.*|position/.*)", "weight_decay": 0.0}


# The layers of a block that write to the residual stream, and their initial standard deviation.
OUTPUTS = r"blocks/\d+/(mixer/out|channel/down)"


def output_std(depth: int) -> float:
    """GPT-2's, of the matrices of `OUTPUTS`; the others have 0.02."""
    return 0.02 / (2 * depth) ** 0.5


def gpt2(width: int, depth: int, heads: int, *, hidden: int | None = None) -> list[dict]:
    """Rules of GPT-2's shape: layer norm, learned positions, biases, GELU, scaled output init."""
    return [
        {"at": "position", "use": "learned", "init_std": 0.01},
        {"at": r"blocks/\d+/mixer", "use": "attention", "heads": heads, "bias": True},
        {"at": r"blocks/\d+/channel", "use": "mlp", "hidden": hidden or 4 * width, "bias": True},
        {"at": OUTPUTS, "use": "dense", "init_std": output_std(depth)},
        {"at": r"blocks/.*", "use": "dense", "init_std": 0.02},
        {"at": NORMS, "use": "layer_norm"},
    ]


def gpt2_linear(at: str, depth: int, **rule) -> list[dict]:
    """Rules to put before those of `gpt2`: this linear, of a matrix that starts at its deviation.

    For linears whose `init_std` is that of the matrix, or about it.
    """
    return [
        {"at": f"(?={OUTPUTS}$)({at})", **rule, "init_std": output_std(depth)},
        {"at": at, **rule, "init_std": 0.02},
    ]


def gpt2_low_rank(at: str, rank: int, depth: int, init: str = "spectral") -> list[dict]:
    """`gpt2_linear` of two factors: `spectral` cuts a matrix of its deviation to the rank.

    With `normal` the product of the factors has the deviation.
    """
    rules = gpt2_linear(at, depth, use="low_rank", rank=rank, init=init, bias=True)
    if init == "normal":  # init_std is of the factors
        rules = [{**rule, "init_std": (rule["init_std"] / rank**0.5) ** 0.5} for rule in rules]
    return rules


def llama(heads: int, kv_heads: int, hidden: int, *, theta: float = 10_000.0) -> list[dict]:
    """Rules of Llama's shape: RMS norm, rotary positions, grouped queries, SwiGLU, no biases."""
    attention = {"use": "attention", "heads": heads, "kv_heads": kv_heads, "rope": theta}
    return [
        {"at": r"blocks/\d+/mixer", **attention},
        {"at": r"blocks/\d+/channel", "use": "glu", "hidden": hidden, "activation": "silu"},
        {"at": NORMS, "use": "rms_norm", "epsilon": 1e-5},
    ]


def gemma(heads: int, kv_heads: int, head_size: int, hidden: int) -> list[dict]:
    """Rules of Gemma's shape: scaled embeddings, zero-centred RMS norm, GeGLU, wide heads."""
    attention = {"use": "attention", "heads": heads, "kv_heads": kv_heads, "rope": 10_000.0}
    return [
        {"at": "embed", "use": "table", "scale_by_width": True},
        {"at": r"blocks/\d+/mixer", **attention, "head_size": head_size},
        {"at": r"blocks/\d+/channel", "use": "glu", "hidden": hidden, "activation": "gelu"},
        {"at": NORMS, "use": "rms_norm", "zero_centered": True},
    ]


def small_lm(arg: ConfigDict, steps: int = 300, **phase_fields) -> ConfigDict:
    """The small language model on the embedded corpus that papers are compared on.

    A GPT-2-shaped decoder, bytes of the running Python's standard library, AdamW with warm-up and
    cosine decay. About three minutes on two CPU cores at 600 steps; `smoke` runs 6 steps of a
    two-layer model.
    """
    width, depth, heads, length = (64, 2, 2, 64) if arg.smoke else (192, 4, 6, 128)
    steps = 6 if arg.smoke else steps
    config = defaults()
    config.model = {
        "name": "decoder",
        "width": width,
        "depth": depth,
        "max_length": length,
        "tied": True,
    }
    config.rules = gpt2(width, depth, heads)
    config.data = {"name": "stdlib", "length": length}
    config.batch_size = 4 if arg.smoke else 16
    schedule = {"name": "cosine", "peak": 2e-3, "warmup": max(1, steps // 10)}
    optimizer = {"name": "adamw", "learning_rate": schedule, "weight_decay": 0.1, "b2": 0.95}
    fields = {"optimizer": optimizer, "parameters": [NO_DECAY], **phase_fields}
    config.phases = [phase(steps, **fields)]
    config.eval_batches = 2 if arg.smoke else 32
    config.log_every = 2 if arg.smoke else 20
    return config


def digits(arg: ConfigDict, epochs: int = 20, **phase_fields) -> ConfigDict:
    """The small image classifier on scikit-learn's digits: a ViT on 8x8 images, AdamW."""
    width, depth, heads = (32, 2, 2) if arg.smoke else (64, 4, 4)
    batch_size = 64
    steps = 6 if arg.smoke else epochs * 1437 // batch_size
    config = defaults()
    config.model = {
        "name": "vision",
        "stages": [{"width": width, "depth": depth, "kernel": 2, "stride": 2}],
        "pooling": "mean",
    }
    config.rules = [
        {"at": r"stages/\d+/blocks/\d+/mixer", "use": "attention", "heads": heads, "bias": True},
        {"at": r"stages/\d+/blocks/\d+/channel", "use": "mlp", "hidden": 4 * width, "bias": True},
        {"at": NORMS, "use": "layer_norm"},
    ]
    config.data = {"name": "digits"}
    config.batch_size = batch_size
    schedule = {"name": "cosine", "peak": 2e-3, "warmup": max(1, steps // 10)}
    optimizer = {"name": "adamw", "learning_rate": schedule, "weight_decay": 0.05}
    fields = {
        "objective": {"name": "classification"},
        "optimizer": optimizer,
        "parameters": [NO_DECAY],
        **phase_fields,
    }
    config.phases = [phase(steps, **fields)]
    config.log_every = 2 if arg.smoke else 20
    return config
