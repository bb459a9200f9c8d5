"""Structured products on a GPU: our Hopper kernels checked, then timed beside cuBLAS.

    python -m benchmarks.structured [--op monarch,butterfly,...] [--only NAME,...] [--json PATH]

First every kernel's result and gradients are compared with the reference in float32 on the same
device: the error may be twice that of the XLA form in bfloat16, plus the last bits of float32.
Then, shape by shape, the kernels, a dense product by cuBLAS, and the XLA form take turns in one
process, so that what else happens to the machine meets all of them; a figure is the median over
rounds. The XLA form of a Monarch product is two batched products by cuBLAS with copies that
permute, that of a block-diagonal one a batched product, of a block-sparse one batched products of
gathered blocks, of butterfly factors a product of five of them at a time. Times are of calls queued
behind each other, which hides the dispatch where a call is longer than it; "kernels" is the sum of
what CUPTI counts for each kernel of a call. Backward is forward and backward less forward.

The roofline is the greater of FLOPs over the H200's peak and bytes over its bandwidth, for a kernel
that moves every array once; backward, twice the FLOPs, weights and their gradients once, dy and x
read and dx written.

Without a GPU it says so and exits with 0; with a failing check it exits with 1, after the timings.
Needs jax with CUDA.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu
from pallas_kernels.block_diagonal_matmul import Stride, block_diagonal_matmul
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mask import flat_butterfly
from pallas_kernels.butterfly_matmul import butterfly_matmul
from pallas_kernels.lab.chips import chip
from pallas_kernels.monarch_matmul import monarch_matmul

M = 8192
OPS = ("monarch", "block_sparse", "block_diagonal", "butterfly")
PEERS = ("gpu", "dense", "blockwise")

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product of x [M, inputs] with weights.

    product: (implementation, x, *weights) -> y [M, outputs].
    weights: sizes of the arrays, drawn to keep y of unit variance.
    """

    name: str
    inputs: int
    outputs: int
    weights: tuple[Sizes, ...]
    product: Callable

    def roofline(self, rows: int, backward: bool) -> float:
        """Seconds on an H200."""
        held = sum(map(math.prod, self.weights))
        h200, times = chip("h200"), 2 if backward else 1
        arrays = 2 * self.inputs + self.outputs if backward else self.inputs + self.outputs
        return max(
            times * 2 * rows * held / h200.peak_flops,
            2 * (rows * arrays + times * held) / h200.hbm_bandwidth,
        )

    def draw(self, rows: int, seed: int = 0) -> tuple[Any, ...]:
        """x, dy and the weights in bfloat16, on the default device."""
        keys = iter(jax.random.split(jax.random.key(seed), 2 + len(self.weights)))
        x, dy = (
            jax.random.normal(next(keys), (rows, n), jnp.bfloat16)
            for n in (self.inputs, self.outputs)
        )
        scaled = (
            jax.random.normal(next(keys), s, jnp.bfloat16) * s[-2] ** -0.5 for s in self.weights
        )
        return x, dy, *(w.astype(jnp.bfloat16) for w in scaled)


def monarch(K: int, p: int, q: int, L: int, r: int, s: int) -> Shape:
    def product(implementation, x, right, left):
        return monarch_matmul(x, right, left, implementation=implementation)

    name = f"monarch_{K * p}_{L * s}_by_{K}"
    return Shape(name, K * p, L * s, ((K, p, q), (L, r, s)), product)


def block_sparse(inputs: int, outputs: int, factors: int, rank: int = 0, block: int = 128) -> Shape:
    rows, columns = inputs // block, outputs // block
    mask = flat_butterfly(rows, columns, min(rows, columns, 32), factors)

    def product(implementation, x, blocks, u=None, v=None):
        return block_sparse_matmul(x, blocks, u=u, v=v, mask=mask, implementation=implementation)

    low = ((inputs, rank), (rank, outputs)) if rank else ()
    name = f"block_sparse_{inputs}_{outputs}_density_{mask.density:.3g}" + f"_r{rank}" * bool(rank)
    return Shape(name, inputs, outputs, ((mask.count, block, block), *low), product)


def block_diagonal(K: int, p: int, q: int, permuted: bool = False) -> Shape:
    how = {"permute_inputs": Stride(K), "permute_outputs": Stride(q)} if permuted else {}

    def product(implementation, x, blocks):
        return block_diagonal_matmul(x, blocks, **how, implementation=implementation)

    name = f"block_diagonal_{K * p}_{K * q}_by_{K}" + "_permuted" * permuted
    return Shape(name, K * p, K * q, ((K, p, q),), product)


def butterfly(n: int, increasing: bool = True) -> Shape:
    """Factors of numbers; the roofline's FLOPs are those of sums of pairs."""

    def product(implementation, x, twiddle):
        return butterfly_matmul(x, twiddle, increasing=increasing, implementation=implementation)

    name = f"butterfly_{n}" + "_decreasing" * (not increasing)
    return Shape(name, n, n, ((n.bit_length() - 1, n // 2, 2, 2),), product)


def shapes(ops: tuple[str, ...]) -> list[Shape]:
    square = ((1024, 4), (1024, 8), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    found = {
        "monarch": [
            *(monarch(b, n // b, n // b, b, n // b, n // b) for n, b in square),
            monarch(8, 128, 128, 8, 128, 512),  # up and down of GPT-2 medium
            monarch(8, 512, 128, 8, 128, 128),
        ],
        "block_sparse": [
            block_sparse(1024, 1024, 1),
            block_sparse(2048, 2048, 1),
            block_sparse(4096, 4096, 3),
            block_sparse(4096, 4096, 3, 128),
            block_sparse(8192, 8192, 3),
            block_sparse(8192, 8192, 3, 128),
        ],
        "block_diagonal": [
            *(block_diagonal(b, n // b, n // b) for n, b in square),
            block_diagonal(16, 256, 256, permuted=True),
            block_diagonal(8, 128, 512),
            block_diagonal(8, 512, 128),
        ],
        "butterfly": [
            *(butterfly(n) for n in (1024, 2048, 4096, 8192)),
            butterfly(4096, increasing=False),
        ],
    }
    return [shape for op in ops for shape in found[op]]


def check_shapes(ops: tuple[str, ...]) -> list[Shape]:
    """Small ones: pieces of every width, and every term."""
    found = {
        "monarch": [
            monarch(2, 128, 128, 2, 128, 128),
            monarch(4, 128, 128, 4, 128, 128),
            monarch(8, 128, 128, 8, 128, 128),
            monarch(16, 128, 128, 16, 128, 128),
            monarch(4, 256, 256, 8, 128, 256),
        ],
        "block_sparse": [
            block_sparse(512, 512, 1),
            block_sparse(1024, 512, 1, 64),
            block_sparse(512, 1024, 1, 128, 256),
        ],
        "block_diagonal": [
            block_diagonal(2, 128, 128),
            block_diagonal(4, 256, 512),
            block_diagonal(2, 512, 128, permuted=True),
        ],
        "butterfly": [butterfly(512), butterfly(4096), butterfly(1024, increasing=False)],
    }
    return [shape for op in ops for shape in found[op]]


def pair(product: Callable) -> tuple[Callable, Callable]:
    """forward(x, *weights) and step(x, dy, *weights) -> y and all gradients."""

    def step(x, dy, *weights):
        y, pull = jax.vjp(product, x, *weights)
        return y, *pull(dy)

    return jax.jit(product), jax.jit(step)


def check(shape: Shape, rows: int) -> dict[str, Any]:
    arrays = shape.draw(rows, seed=1)
    of = lambda name: pair(functools.partial(shape.product, name))[1]  # noqa: E731
    with jax.default_matmul_precision("highest"):
        right = of("reference")(*(a.astype(jnp.float32) for a in arrays))
    near = of("blockwise")(*arrays)
    return gpu.check(f"{shape.name}, {rows} rows", right, near, lambda: of("gpu")(*arrays))


def timed(shape: Shape, peers: Sequence[str]) -> tuple[dict[str, gpu.Timed | str], dict]:
    """By implementation: calls, or a string where one cannot run; and seconds of the kernels."""
    found: dict[str, gpu.Timed | str] = {}
    kernels: dict[str, tuple[float | None, ...]] = {}
    for name in peers:
        try:
            x, dy, *weights = shape.draw(M)
            product = functools.partial(shape.product, name)
            if name == "dense":
                key = jax.random.key(2)
                dense = jax.random.normal(key, (shape.inputs, shape.outputs), jnp.bfloat16)
                weights, product = [dense * shape.inputs**-0.5], jnp.matmul
            forward, step = pair(product)
            calls = (
                functools.partial(forward, x, *weights),
                functools.partial(step, x, dy, *weights),
            )
            for call in calls:
                jax.block_until_ready(call())
            kernels[name] = tuple(
                gpu.kernel_seconds(program, *given)
                for program, given in ((forward, (x, *weights)), (step, (x, dy, *weights)))
            )
            found[name] = gpu.Timed(calls)
        except Exception as error:  # a peer that cannot do a shape is a row that says why
            found[name] = gpu.reason(error)
    return found, kernels


def measure(
    shape: Shape, rounds: int, budget: float, peers: Sequence[str] = PEERS
) -> list[dict[str, Any]]:
    """A row for each implementation."""
    found, kernels = timed(shape, peers)
    ready = {name: x for name, x in found.items() if not isinstance(x, str)}
    rows = [{"case": shape.name, "by": k, "reason": x} for k, x in found.items() if k not in ready]
    for name, (forward, step) in gpu.medians(ready, rounds, budget).items():
        rows.append({
            "case": shape.name, "by": name, "forward_s": forward, "step_s": step,
            "forward_kernels_s": kernels[name][0], "step_kernels_s": kernels[name][1],
            "roofline": shape.roofline(M, False) / forward,
            "backward_roofline": shape.roofline(M, True) / (step - forward)
            if step > forward else None,
        })  # fmt: skip
    return rows


def line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['case']:40}{row['by']:12}{row['reason']}"
    us = lambda s: "-" if s is None else format(s * 1e6, ".0f")  # noqa: E731
    forward, step = row["forward_kernels_s"], row["step_kernels_s"]
    back, ratio = None if step is None else step - forward, row["backward_roofline"]
    return (
        f"{row['case']:40}{row['by']:10}"
        f"{us(row['forward_s']):>9}{us(forward):>9}{row['roofline']:>9.2f}"
        f"{us(row['step_s'] - row['forward_s']):>9}{us(back):>9}"
        f"{'-' if ratio is None else format(ratio, '.2f'):>9}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Structured products on a GPU beside cuBLAS.")
    parser.add_argument("--op", default=",".join(OPS), help=f"of {', '.join(OPS)}, with commas")
    parser.add_argument("--only", default="", help="names of shapes, separated by commas")
    parser.add_argument("--by", default=",".join(PEERS), help="of gpu, dense, blockwise")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", help="where to write all figures")
    args = parser.parse_args(argv)
    ops = tuple(args.op.split(","))
    if set(ops) - set(OPS):
        print(f"no op {args.op}; of: {', '.join(OPS)}", file=sys.stderr)
        return 2
    peers = tuple(args.by.split(","))
    if set(peers) - set(PEERS):
        print(f"no implementation {args.by}; of: {', '.join(PEERS)}", file=sys.stderr)
        return 2
    chosen = gpu.chosen(shapes(ops), args.only)
    if chosen is None:
        return 2
    device = gpu.device()
    if device is None:
        return 0
    checks = []
    for shape in check_shapes(ops):
        checks.append(check(shape, 200))  # no whole number of tiles
        gpu.say(checks[-1], "y, dx and weights")
    each = f"{'kernels':>9}{'roofline':>9}"
    print(f"{'case (microseconds)':40}{'by':10}{'forward':>9}{each}{'backward':>9}{each}")
    rows = []
    for shape in chosen:
        for row in measure(shape, args.rounds, 0.02, peers):
            rows.append(row)
            print(line(row), flush=True)
        gpu.write(args.json, device, checks=checks, rows=rows)
    return 0 if all(c["passed"] for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
