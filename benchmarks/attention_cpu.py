"""Attention by blocks beside materialised attention on the CPU, by turns in one process.

    python -m benchmarks.attention_cpu [--lengths 256,1024,4096] [--turns N] [--json PATH]

`pallas_kernels.attention` and `jax.nn.dot_product_attention(implementation="xla")`, which keeps
all scores, in float32: out, and the gradients of its sum of squares in q, k and v, for 4096 tokens
of 8 heads of 64, with a full and a causal mask. A figure is the median over turns of the time of
the materialised one over that of ours in the same turn, with quartiles. Beside the times, what XLA
takes for temporaries, which is counted and not measured; for 16,384 tokens that alone.
"""

import argparse
import functools
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import by_turns, quartiles, record
from pallas_kernels.attention import Causal, Full, attention

TOKENS, HEADS, SIZE = 4096, 8, 64
LONGEST = 16_384


def programs(causal: bool):
    """direction -> name -> function of (q, k, v)."""
    both = {
        "blockwise": functools.partial(attention, mask=Causal() if causal else Full()),
        "materialised": functools.partial(
            jax.nn.dot_product_attention, is_causal=causal, implementation="xla"
        ),
    }

    def gradients(fn):
        return jax.grad(lambda *qkv: jnp.square(fn(*qkv)).sum(), (0, 1, 2))

    backward = {name: gradients(fn) for name, fn in both.items()}
    return {"forward": both, "forward and backward": backward}


def compiled(fn, length: int):
    """The program for as many sequences of this length as TOKENS hold, at least one."""
    shape = (max(1, TOKENS // length), length, HEADS, SIZE)
    return jax.jit(fn).lower(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3).compile()


def measure(length: int, turns: int) -> list[dict]:
    """A record a mask and direction."""
    rng = np.random.default_rng(0)
    shape = (max(1, TOKENS // length), length, HEADS, SIZE)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
    records = []
    for causal in (False, True):
        for direction, functions in programs(causal).items():
            found = {name: compiled(fn, length) for name, fn in functions.items()}
            entry = {"length": length, "causal": causal, "direction": direction}
            entry |= {f"{n}_temporary_bytes": temporaries(c) for n, c in found.items()}
            if turns:
                ours, theirs = (jax.tree.leaves(c(q, k, v)) for c in found.values())
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))
                calls = {n: functools.partial(c, q, k, v) for n, c in found.items()}
                times = by_turns(calls, turns)
                entry |= {f"{n}_ms": float(np.median(t) * 1e3) for n, t in times.items()}
                entry["as_fast"] = quartiles(times["materialised"] / times["blockwise"])
            records.append(entry)
    return records


def temporaries(program) -> int:
    """Bytes that the compiled program takes beside arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} {platform.machine()} cores")
    records = []
    lengths = [int(n) for n in arguments.lengths.split(",")]
    for length, turns in [*((n, arguments.turns) for n in lengths), (LONGEST, 0)]:
        for entry in measure(length, turns):
            ours, theirs = (
                entry[f"{name}_temporary_bytes"] / 2**20 for name in ("blockwise", "materialised")
            )
            line = f"T {length:<6} {'causal' if entry['causal'] else 'full':<7}"
            line += f"{entry['direction']:<21} {ours:8.0f} MiB, materialised {theirs:8.0f}"
            if turns:
                low, median, high = entry["as_fast"]
                line += f"  {entry['blockwise_ms']:8.1f} ms  {median:5.2f} times as fast"
                line += f" ({low:.2f} to {high:.2f})"
            print(line, flush=True)
            records.append(entry)
    if arguments.json:
        command = (
            f"python -m benchmarks.attention_cpu --lengths {arguments.lengths}"
            f" --turns {arguments.turns}"
        )
        record(arguments.json, command, records=records)


if __name__ == "__main__":
    main()
