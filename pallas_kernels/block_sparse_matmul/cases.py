"""Shapes of block_sparse_matmul that tests, laboratory and benchmarks share."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul import gpu, tpu
from pallas_kernels.block_sparse_matmul.mask import flat_butterfly
from pallas_kernels.block_sparse_matmul.settings import Settings
from pallas_kernels.lab import Case, Program
from pallas_kernels.lab.case import TPUS


def case(
    name: str,
    M: int,
    inputs: int,
    outputs: int,
    size: int,
    factors: int,
    r: int = 0,
    block: int = 128,
) -> Case:
    """bfloat16, no bias. With n^2 d the entries of live blocks, forward and dx take

    FLOPs 2 M n^2 d + 2 M r (I + O), bytes 2 (M (I + O) + n^2 d + r (I + O)), and
    the gradients of weights as many FLOPs, and bytes in which weights count twice: they are
    float32. On a GPU these are a kernel each for blocks, U and V, and x U and dy V^T are XLA's.
    """
    mask = flat_butterfly(inputs // block, outputs // block, size, factors)
    settings = Settings(mask)
    live = mask.count * block * block

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    blocks, x, dy = of(mask.count, block, block), of(M, inputs), of(M, outputs)
    low = (of(inputs, r), of(r, outputs)) if r else (None, None)
    gamma = jax.ShapeDtypeStruct((), jnp.float32) if r else None
    z = of(M, r) if r else None

    def on(module):
        def forward(x, blocks, u, v, gamma):
            return module.forward(x, blocks, u, v, gamma, None, settings, save=False)[0]

        def backward(x, dy, z, blocks, u, v, gamma):
            return module.backward(x, dy, z, blocks, u, v, gamma, False, settings)[:4]

        return forward, backward

    def either(on_tpu, on_gpu):
        return lambda *args: jax.lax.platform_dependent(*args, cuda=on_gpu, default=on_tpu)

    forward, backward = map(either, on(tpu), on(gpu))

    def cleared(*args):
        """The loops that clear the sums run in the first step alone: far below once a step."""
        del args
        return {"_dw": [0.0]}

    flops = 2.0 * M * (live + r * (inputs + outputs))
    moved = 2.0 * (M * (inputs + outputs) + live + r * (inputs + outputs))
    return Case(
        name=name,
        kernels={"forward": forward, "backward": Program(backward, inner_runs=cleared)},
        args={"forward": (x, blocks, *low, gamma), "backward": (x, dy, z, blocks, *low, gamma)},
        flops={
            "forward": flops, "_dx": flops, "_dw": flops,
            "_forward": 2.0 * M * (live + r * outputs), "sparse_dx": 2.0 * M * (live + r * inputs),
            "_dblocks": 2.0 * M * live, "_du": 2.0 * M * r * inputs, "_dv": 2.0 * M * r * outputs,
        },
        hbm_bytes={
            "forward": moved,
            "_dx": moved + 2 * M * r,
            "_dw": moved + 2 * (live + r * (inputs + outputs)) + 4 * M * r,
            "_forward": 2.0 * (M * (inputs + outputs + r) + live + r * outputs),
            "sparse_dx": 2.0 * (M * (inputs + outputs + r) + live + r * inputs),
            "_dblocks": 2.0 * M * (inputs + outputs) + 4 * live,
            "_du": 2.0 * M * (inputs + r) + 4 * r * inputs,
            "_dv": 2.0 * M * (r + outputs) + 4 * r * outputs,
        },
        targets=(*TPUS, "h200"),
    )  # fmt: skip


# name, inputs, outputs, butterfly size, factors, rank: density is (factors + 1) / size.
CASES = [
    case("n1024", 8192, 1024, 1024, 8, 1),  # no butterfly of 8 has density 1 / 8: this has 1 / 4
    case("n2048", 8192, 2048, 2048, 16, 1),
    case("n4096", 8192, 4096, 4096, 32, 3),
    case("n4096_r128", 8192, 4096, 4096, 32, 3, 128),
    case("n8192", 8192, 8192, 8192, 32, 3),
    case("n8192_r128", 8192, 8192, 8192, 32, 3, 128),
    case("up_1024_4096_r128", 8192, 1024, 4096, 8, 1, 128),
    case("down_4096_1024_r128", 8192, 4096, 1024, 8, 1, 128),
    case("n4096_block_256", 8192, 4096, 4096, 16, 1, 0, 256),
]
