"""Shapes of `butterfly_matmul` that tests, laboratory and benchmarks share."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.butterfly_matmul import gpu
from pallas_kernels.butterfly_matmul.api import butterfly_matmul
from pallas_kernels.lab import Case


def case(n: int, b: int = 1, increasing: bool = True, M: int = 8192) -> Case:
    """bfloat16, n blocks of b. With N = n b features and w entries of the kernel's matrices, 256 N
    of factors of numbers, and else 128 N of the stages within 128 lanes and 2 N max(b, 128) of each
    other stage,

    FLOPs 2 M w forward and 4 M w backward, beside what the backward pass makes again; bytes
    4 M N + 2 w forward, 6 M N + 6 w backward, gradients of weights as float32.
    """
    N, stages = n * b, n.bit_length() - 1
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x = of((M, N))
    twiddle = of((stages, n // 2, 2, 2, b, b) if b > 1 else (stages, n // 2, 2, 2))
    lanes = max(0, (128 // b).bit_length() - 1)
    weights = 256 * N
    if b > 1:
        weights = (128 * N if lanes else 0) + 2 * N * max(b, 128) * (stages - lanes)

    def forward(x, twiddle):
        return butterfly_matmul(x, twiddle, increasing=increasing)

    def backward(x, twiddle, dy):
        return jax.vjp(forward, x, twiddle)[1](dy)

    name = f"{n}" + (f" blocks of {b}" if b > 1 else "") + ("" if increasing else " decreasing")
    return Case(
        name=name,
        kernels={"forward": forward, "backward": backward},
        args={"forward": (x, twiddle), "backward": (x, twiddle, x)},
        flops={"_fwd": 2.0 * M * weights, "_bwd": 4.0 * M * weights},
        hbm_bytes={
            "_fwd": 4.0 * M * N + 2 * weights,
            "_bwd": 6.0 * M * N + 6 * weights,
        },
    )


def on_hopper(n: int, b: int = 1, M: int = 8192) -> Case:
    """bfloat16; every kernel is a product of M N w multiplications, or its gradient of weights: of
    numbers w is the width of Monarch's blocks, of blocks 2 b.
    """
    N, stages = n * b, n.bit_length() - 1
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x = of((M, N))
    twiddle = of((stages, n // 2, 2, 2, *((b, b) if b > 1 else ())))
    product = functools.partial(butterfly_matmul, implementation="gpu")
    width = 2 * b if b > 1 else gpu.width(x)
    once = 4.0 * M * N + 2.0 * N * width

    def backward(x, twiddle, dy):
        return jax.vjp(product, x, twiddle)[1](dy)

    return Case(
        name=f"{n}" + (f" blocks of {b}" if b > 1 else "") + " on Hopper",
        kernels={"forward": product, "backward": backward},
        args={"forward": (x, twiddle), "backward": (x, twiddle, x)},
        flops={"_": 2.0 * M * N * width},
        hbm_bytes={"_": once}
        | dict.fromkeys(("dleft", "dright", "dtwiddle"), once + 2.0 * N * width),
        targets=("h200",),
    )


CASES = [
    case(1024),
    case(1024, increasing=False),
    case(2048),
    case(4096),
    case(4096, increasing=False),
    case(8192),
    case(128, 32),
    case(8, 128),
    case(32, 128),
    case(32, 128, increasing=False),
    case(16, 256),
    on_hopper(4096),
    on_hopper(32, 128),
]
