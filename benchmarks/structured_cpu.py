"""Structured layers against a dense one on the CPU, by turns in one process.

    python -m benchmarks.structured_cpu [--n 1024,2048,4096] [--rows M] [--turns N] [--json PATH]

Times y = x W and its gradients in float32: dense, Monarch with 8, 16 and 32 blocks, and Pixelfly
with blocks of 128 at density 1/8 (1/4 at n 1024). In every turn each is run once, in another order
each time, so that what else runs on the machine meets all; the figure is the median over turns of
the dense layer's time over the structured one's of the same turn, with quartiles. 64 rows of y are
compared with the dense product of the materialized matrix.
"""

import argparse
import functools
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import by_turns, quartiles, record
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mask import flat_butterfly
from pallas_kernels.monarch_matmul import monarch_matmul

BLOCK = 128


def layers(n: int, rng):
    """name -> (function of x and weights, weights, fraction of a dense layer's parameters)."""

    def normal(*shape, fan_in):
        return jnp.asarray(rng.normal(size=shape) * fan_in**-0.5, jnp.float32)

    found = {"dense": (lambda x, w: x @ w, (normal(n, n, fan_in=n),), 1.0)}
    for blocks in (8, 16, 32):
        q = n // blocks
        if q >= 32:
            weights = tuple(normal(blocks, q, q, fan_in=q) for _ in range(2))
            found[f"monarch, {blocks} blocks"] = (monarch_matmul, weights, 2 / blocks)
    count = n // BLOCK
    # Of 1/8: a flat butterfly of half or more of it, a rank for what is left.
    factors = max(1, min(count.bit_length() - 1, count // 8 - 1))
    mask = flat_butterfly(count, count, count, factors)
    rank = max(0, round((1 / 8 - mask.density) * n / 2))
    live = normal(mask.count, BLOCK, BLOCK, fan_in=BLOCK * (factors + 1))
    low = (normal(n, rank, fan_in=n), normal(rank, n, fan_in=rank)) if rank else ()

    def pixelfly(x, blocks, u=None, v=None):
        return block_sparse_matmul(x, blocks, mask=mask, u=u, v=v)

    fraction = mask.density + 2 * rank / n
    found[f"pixelfly, {factors} factors, rank {rank}"] = (pixelfly, (live, *low), fraction)
    return found


def programs(fn, weights):
    """The compiled forward pass and the compiled gradients, of x and dy."""
    forward = jax.jit(fn)

    @jax.jit
    def backward(x, dy, *weights):
        y, pull = jax.vjp(fn, x, *weights)
        return y, pull(dy)

    return (lambda x, dy: forward(x, *weights)), (lambda x, dy: backward(x, dy, *weights))


def check(fn, weights, x) -> float:
    """The largest error of y against x times the materialized matrix, over the largest value."""
    matrix = np.asarray(jax.jit(fn)(jnp.eye(x.shape[1]), *weights), np.float64)
    expected = np.asarray(x[:64], np.float64) @ matrix
    return float(np.abs(fn(x[:64], *weights) - expected).max() / np.abs(expected).max())


def measure(n: int, rows: int, turns: int) -> list[dict]:
    """A record a layer and direction."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for _ in range(2))
    found = layers(n, rng)
    runs = {name: programs(fn, weights) for name, (fn, weights, _) in found.items()}
    records = []
    for index, direction in enumerate(("forward", "forward and backward")):
        calls = {name: functools.partial(both[index], x, dy) for name, both in runs.items()}
        times = by_turns(calls, turns)
        for name, (fn, weights, fraction) in found.items():
            records.append(
                {
                    "n": n,
                    "rows": rows,
                    "layer": name,
                    "direction": direction,
                    "fraction": fraction,
                    "milliseconds": float(np.median(times[name]) * 1e3),
                    "times_dense": quartiles(times["dense"] / times[name]),
                    "error": check(fn, weights, x),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", default="1024,2048,4096")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    sizes = [int(n) for n in arguments.n.split(",")]
    for n in sizes:
        if n % 1024 or n & (n - 1):
            parser.error(f"--n {n}: sizes are powers of two from 1024")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} {platform.machine()} cores")
    records = []
    for n in sizes:
        for entry in measure(n, arguments.rows, arguments.turns):
            low, median, high = entry["times_dense"]
            print(f"n {n:<5} {entry['layer']:<30} {entry['direction']:<21}"
                  f" {entry['milliseconds']:8.1f} ms  {median:5.2f} times as fast as dense"
                  f" ({low:.2f} to {high:.2f})", flush=True)  # fmt: skip
            records.append(entry)
    if arguments.json:
        command = (
            f"python -m benchmarks.structured_cpu --n {arguments.n} --rows {arguments.rows}"
            f" --turns {arguments.turns}"
        )
        record(arguments.json, command, records=records)


if __name__ == "__main__":
    main()
