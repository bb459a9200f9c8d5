"""Shapes of `block_diagonal_matmul` that tests, laboratory and benchmarks share."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.block_diagonal_matmul.api import block_diagonal_matmul
from pallas_kernels.block_diagonal_matmul.permutation import Stride
from pallas_kernels.lab import Case, Program
from pallas_kernels.lab.case import TPUS


def case(name: str, K: int, p: int, q: int, M: int = 8192, targets=TPUS, **how) -> Case:
    """bfloat16, by the platform's kernel. With w = K p q weights the forward pass takes

    FLOPs 2 M w, bytes 2 (M K (p + q) + w), and the backward pass twice the FLOPs,
    bytes 2 (M K (2 p + q) + w) + 4 w, since gradients of weights leave in float32. On a GPU, where
    the backward pass is two kernels, each reads what it needs.
    """
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, blocks, dy = of((M, K * p)), of((K, p, q)), of((M, K * q))
    weights = K * p * q

    def forward(x, blocks):
        return block_diagonal_matmul(x, blocks, **how)

    def backward(x, blocks, dy):
        return jax.vjp(forward, x, blocks)[1](dy)

    def cleared(*args):
        """The loops that clear the sums run once a group of blocks: far below once a step."""
        del args
        return {"_bwd": [0.0]}

    once = 2.0 * (M * K * (p + q) + weights)
    moved = {
        "_fwd": once,
        "_bwd": once + 2.0 * M * K * p + 4.0 * weights,
        "_y": once,
        "_dx": once,
        "_dblocks": once + 2.0 * weights,
    }
    return Case(
        name=name,
        kernels={"forward": forward, "backward": Program(backward, inner_runs=cleared)},
        args={"forward": (x, blocks), "backward": (x, blocks, dy)},
        flops={part: 2.0 * M * weights * (1 + (part == "_bwd")) for part in moved},
        hbm_bytes=moved,
        targets=targets,
    )


def square(n: int, K: int, **how) -> Case:
    """n x n."""
    suffix = "".join(f" {key[8:]} {value!r}" for key, value in how.items())
    return case(f"{n} by {K}{suffix}", K, n // K, n // K, **how)


CASES = [
    *(square(n, K) for n in (1024, 2048, 4096, 8192) for K in (4, 8, 16, 32) if n // K >= 128),
    square(4096, 16, permute_inputs=Stride(16)),
    square(4096, 16, permute_outputs=Stride(256)),
    square(4096, 16, permute_inputs=Stride(16), permute_outputs=Stride(256)),
    square(8192, 32, permute_inputs=Stride(32), permute_outputs=Stride(256)),
    case("1024 to 4096 by 8", 8, 128, 512),
    case("4096 to 1024 by 8", 8, 512, 128),
    # Hopper's, by name, since none has run.
    case("4096 by 16 on Hopper", 16, 256, 256, targets=("h200",), implementation="gpu"),
    case("1024 to 4096 by 8 on Hopper", 8, 128, 512, targets=("h200",), implementation="gpu"),
]
