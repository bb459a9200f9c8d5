"""One training step of a small GPT-2 on the CPU: JAX against transformers and torch.

    python -m benchmarks.step_vs_transformers [--pairs N] [--vocab V] [--json PATH]

Both sides do the forward pass, the backward pass and AdamW in float32 on the same shape (biases,
tied head, tanh GELU, learned positions, no dropout) with as many threads as the process has cores.
JAX starts from torch's weights, and where the losses of the first steps differ by more than
rounding nothing is reported, since then the work would not be the same. Steps alternate in one
process, so that what else runs on the machine meets both; the figure is the median over pairs of
torch's time over JAX's. A loaded machine hurts torch more (its threads
spin at barriers), so trust a figure only where the load printed before it is near zero, and see
the ratio of the fastest steps beside it. Both run with huge pages, as train.py does: they help JAX
by a sixth and leave torch as it is.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from efficient.training.pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()

import jax
import numpy as np

from configs import common
from efficient.training.run import Run

_LEARNING_RATE, _DECAY = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Shape:
    """The peer's and the model's dimensions."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    length: int = 256
    batch: int = 8
    vocab: int = 512


def tokens(shape: Shape) -> np.ndarray:
    """The batch [B, T] that both sides train on."""
    return np.random.default_rng(0).integers(0, shape.vocab, (shape.batch, shape.length))


def make_torch_step(
    shape: Shape, threads: int
) -> tuple[Callable[[], float], dict[str, np.ndarray]]:
    """A step of transformers' GPT2LMHeadModel under torch AdamW, which returns the loss.

    Also the weights it starts from, by the names they have in `make_jax_step`'s model.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY)
    ids = torch.from_numpy(tokens(shape))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    weights = {name: array.numpy().copy() for name, array in model.state_dict().items()}
    return step, _by_our_names(weights, shape)


_NAMES = {
    "ln_1": "mixer_norm",
    "ln_2": "channel_norm",
    "attn.c_proj": "mixer/out",
    "mlp.c_fc": "channel/up",
    "mlp.c_proj": "channel/down",
}


def _by_our_names(weights: dict[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
    """GPT2LMHeadModel's weights under the names of our decoder; its kernels are [I, O] as ours."""
    found = {
        "embed/table": weights["transformer.wte.weight"],
        "position/table": weights["transformer.wpe.weight"],
        "final_norm/scale": weights["transformer.ln_f.weight"],
        "final_norm/bias": weights["transformer.ln_f.bias"],
    }
    for layer in range(shape.layers):
        block, theirs = f"blocks/{layer}", f"transformer.h.{layer}"
        for name, ours in _NAMES.items():
            kernel = "scale" if name.startswith("ln") else "kernel"
            found[f"{block}/{ours}/{kernel}"] = weights[f"{theirs}.{name}.weight"]
            found[f"{block}/{ours}/bias"] = weights[f"{theirs}.{name}.bias"]
        for kind, name in (("weight", "kernel"), ("bias", "bias")):
            parts = np.split(weights[f"{theirs}.attn.c_attn.{kind}"], 3, axis=-1)
            for part, array in zip("qkv", parts):
                found[f"{block}/mixer/{part}/{name}"] = array
    return found


def make_jax_step(
    shape: Shape, remat: str, weights: dict[str, np.ndarray]
) -> tuple[Callable, Any, Any]:
    """The project's own train step from these weights: compiled, with its state and a batch."""
    config = common.defaults()
    config.model = {
        "name": "decoder",
        "vocab_size": shape.vocab,
        "width": shape.width,
        "depth": shape.layers,
        "max_length": shape.length,
        "tied": True,
        "remat": remat,
    }
    config.rules = common.gpt2(shape.width, shape.layers, shape.heads)
    config.data = {"name": "stdlib", "length": shape.length}
    config.batch_size = shape.batch
    adamw = {"name": "adamw", "learning_rate": _LEARNING_RATE, "weight_decay": _DECAY}
    config.phases = [common.phase(1, optimizer=adamw, clip=None)]
    run = Run(config, devices=jax.devices()[:1])
    ids = tokens(shape)
    counted = np.ones(ids.shape, np.float32)
    counted[:, -1] = 0  # as the peer: every token but the first, from those before it
    batch = {"tokens": ids, "targets": np.roll(ids, -1, axis=1), "weights": counted}
    batch = jax.device_put(
        {k: v.astype(np.float32 if v.dtype.kind == "f" else np.int32) for k, v in batch.items()}
    )
    step, state = run.train_step(run.phases[0]), run.start()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in state["params"].items()}:
        raise ValueError("the two models do not have the same parameters")
    state["params"] = {
        k: jax.device_put(weights[k], v.sharding) for k, v in state["params"].items()
    }
    compiled = step.lower(state, batch).compile()

    def run_step(state, batch):
        state, metrics = compiled(state, batch)
        return state, metrics["loss"]

    return run_step, state, batch


def measure(shape: Shape, pairs: int, threads: int, remat: str) -> dict[str, Any]:
    """Times `pairs` alternating steps; milliseconds, ratios, losses, versions."""
    torch_step, weights = make_torch_step(shape, threads)
    start = time.perf_counter()
    step, state, batch = make_jax_step(shape, remat, weights)
    compile_seconds = time.perf_counter() - start

    def jax_step() -> float:
        nonlocal state
        state, loss = step(state, batch)
        return float(loss)

    losses = [(torch_step(), jax_step()) for _ in range(3)]
    if not np.allclose(*np.transpose(losses), rtol=1e-4):
        sys.exit(f"torch and JAX do not do the same work: losses (torch, JAX) {losses}")
    times = [(_timed(torch_step), _timed(jax_step)) for _ in range(pairs)]
    torch_ms, jax_ms = 1e3 * np.array(times).T
    quartiles = np.quantile(torch_ms / jax_ms, [0.25, 0.5, 0.75])
    return {
        "torch_ms": float(np.median(torch_ms)),
        "jax_ms": float(np.median(jax_ms)),
        "ratio": float(quartiles[1]),
        "ratio_quartiles": [float(quartiles[0]), float(quartiles[2])],
        "ratio_of_fastest": float(torch_ms.min() / jax_ms.min()),
        "losses_of_first_steps": {"torch": [a for a, _ in losses], "jax": [b for _, b in losses]},
        "compile_seconds": compile_seconds,
        "pairs": pairs,
        "shape": dataclasses.asdict(shape),
        "remat": remat,
    }


def _timed(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def describe_machine(threads: int) -> dict[str, Any]:
    """Device, load and versions, so that a figure can be traced to what made it."""
    packages = ("jax", "jaxlib", "torch", "transformers")
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0, or 2 where the peer is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="steps of each side (default 15)")
    parser.add_argument("--vocab", type=int, default=512, help="vocabulary (default 512)")
    parser.add_argument("--remat", default="none", help="of the JAX model (default none)")
    parser.add_argument("--json", metavar="PATH", help="also write the result here")
    options = parser.parse_args(argv)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        print(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    row = describe_machine(threads)
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    print(
        f"{row['device']} ({row['machine']}), {threads} threads, load {row['load']:.1f}; {versions}"
    )
    row |= measure(Shape(vocab=options.vocab), options.pairs, threads, options.remat)
    low, high = row["ratio_quartiles"]
    print(f"torch {row['torch_ms']:.0f} ms, JAX {row['jax_ms']:.0f} ms (medians of {row['pairs']})")
    print(
        f"JAX is {row['ratio']:.2f} times as fast (quartiles {low:.2f} to {high:.2f}; "
        f"fastest steps {row['ratio_of_fastest']:.2f}; compiled in {row['compile_seconds']:.1f} s)"
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(row, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
