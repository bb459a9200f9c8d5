"""Shapes of `monarch_matmul` that tests, laboratory and benchmarks share."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.lab import Case, Program
from pallas_kernels.lab.case import TPUS
from pallas_kernels.monarch_matmul import tpu, tpu_plan
from pallas_kernels.monarch_matmul.api import monarch_matmul


def forward(x, right, left):
    """y of the platform's kernel."""
    return monarch_matmul(x, right, left)


def backward(x, right, left, dy):
    """dx, dright, dleft of the platform's kernel."""
    return jax.vjp(forward, x, right, left)[1](dy)


def _weights_once(x, right, left, *_):
    """The loop that orders the weights runs once a core; of products in loops nothing is said."""
    sizes = tpu.rows(x), right, left, x.dtype.itemsize
    plans = {"fwd": tpu_plan.plan(*sizes, False), "bwd": tpu_plan.plan(*sizes, True)}
    if tpu.keeps(x, right, left):
        backward = tpu_plan.kept_backward(*sizes)
        plans["fwd_kept"] = tpu_plan.plan(*sizes, False, kept=True)
        plans["bwd_kept" if backward.backward else "dx_kept"] = backward
    turns = {name: plan.inner // tpu_plan.LANES // plan.turn for name, plan in plans.items()}
    return {
        name: (turns[name] * plan.cores / plan.steps,)
        for name, plan in plans.items()
        if plan.straight
    }


def case(name: str, M: int, K: int, p: int, q: int, L: int, r: int, s: int) -> Case:
    """bfloat16. A product with both factors takes 2 M (K p q + L r s), the backward pass two.

    Where a TPU keeps z the backward program has that forward pass too, and its own part in one
    kernel or in three. On a GPU these are kernels for z and y, and for z, dz, dx and each factor's
    gradient.
    """
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = of((M, K * p)), of((K, p, q)), of((L, r, s))
    first, second, x, z, y = K * p * q, L * r * s, M * K * p, M * K * q, M * L * s
    products = {"forward": first + second, "backward": 2 * (first + second)}
    products |= {"_z": first, "_y": second, "_dz": second, "_dx": first}
    products |= {"_dright": first, "_dleft": second}
    moved = {
        "forward": x + y + first + second,
        "backward": 2 * x + y + 2 * (first + second),
        "_z": x + z + first,
        "_y": z + y + second,
        "_dz": z + y + second,
        "_dx": x + z + first,
        "_dright": x + z + 2 * first,
        "_dleft": z + y + 2 * second,
    }
    for sizes in (products, moved):
        sizes |= {"fwd": sizes["forward"], "bwd": sizes["backward"]}
    products |= {"dx_kept": first + second, "sum_right": first, "sum_left": second}
    moved |= {
        "fwd_kept": moved["fwd"] + z,
        "bwd_kept": moved["bwd"] + z,
        "dx_kept": x + z + 2 * y + first + second,
        "sum_right": x + z + first,
        "sum_left": z + y + second,
    }
    return Case(
        name=name,
        kernels={
            "forward": Program(forward, inner_runs=_weights_once),
            "backward": Program(backward, inner_runs=_weights_once),
        },
        args={"forward": args, "backward": (*args, of((M, L * s)))},
        flops={name: 2.0 * M * size for name, size in products.items()},
        hbm_bytes={name: 2.0 * size for name, size in moved.items()},
        targets=(*TPUS, "h200"),
    )


def square(n: int, blocks: int, M: int = 8192) -> Case:
    """An n x n matrix."""
    q = n // blocks
    return case(f"{n} by {blocks}", M, blocks, q, q, blocks, q, q)


CASES = [
    square(1024, 4),
    square(1024, 8),
    square(2048, 4),
    square(2048, 8),
    square(2048, 16),
    square(4096, 4),
    square(4096, 8),
    square(4096, 16),
    square(4096, 32),
    square(8192, 8),
    square(8192, 16),
    square(8192, 32),
    case("1024 to 4096 by 8", 8192, 8, 128, 128, 8, 128, 512),
    case("4096 to 1024 by 8", 8192, 8, 512, 128, 8, 128, 128),
]
