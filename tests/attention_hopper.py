"""Masks and shapes for which the Hopper kernels of attention are compiled, and how.

Apart from the tests because the interpreter that has jax[cuda13] has no pytest.
"""

import functools
import json

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu, patterns
from pallas_kernels.attention.masks import (
    BlockPattern,
    Causal,
    Full,
    Heads,
    Prefix,
    Sinks,
    Stride,
    Window,
)
from pallas_kernels.attention.settings import Settings
from pallas_kernels.lab.gpu import compile_gpu

LAMBDA = Causal() & (Window(100) | Sinks(4))
HEADS = Heads([LAMBDA, Causal(), Full(), Window(70, 30)])
PATTERN = BlockPattern([[1, 0], [0, 0]], 128)
BY_HEAD = BlockPattern([[[1, 0], [1, 1]], [[0, 1], [1, 0]]], 128)
# More partial kinds than the kernels have branches for.
S2_FINE = patterns.s2_attention(8, stride=8, block=32, local_blocks=2, dense_heads=1)
WINDOWS = Causal() & Heads([Window(70 + 100 * n) | Sinks(n + 1) for n in range(16)])
MANY = Heads([(Window(10 + 3 * n) | Stride(2 << n % 3, n, 8)) & Causal(n) | Sinks(n + 1)
              for n in range(8)])  # fmt: skip

COMPILED = {
    "full": {},
    "causal_gqa": {"mask": Causal(), "N": 8, "K": 2},
    "float16": {"dtype": "float16"},
    "head_64": {"H": 64, "mask": Causal()},
    "head_80_ragged": {"H": 80, "T": 300, "S": 1100, "mask": Causal(800)},
    "head_192": {"H": 192, "mask": Causal()},
    "head_256": {"H": 256, "mask": Causal()},
    "lambda": {"mask": LAMBDA},
    "prefix": {"mask": Causal() | Prefix(70)},
    "heads": {"mask": HEADS},
    "pattern": {"mask": PATTERN, "T": 256},
    "pattern_heads": {"mask": BY_HEAD & Causal(), "T": 256, "N": 2},
    "s2": {"mask": patterns.s2_attention(16, stride=8), "N": 16, "K": 4},
    "s2_fine_ragged": {"mask": S2_FINE, "N": 8, "K": 2, "T": 1000},
    "windows": {"mask": WINDOWS, "N": 16},
    "no_power_of_two": {"mask": Causal() & (Window(100) | Stride(3, 0, 96))},
    "softcap": {"mask": Causal(), "softcap": 30.0},
    "segments": {"mask": Causal(), "segments": True, "B": 2},
}


def _attention(q, k, v, ids, dout, settings):
    out, lse = gpu.forward(q, k, v, None, None, ids, None, settings)
    grads = gpu.backward(q, k, v, None, None, ids, None, out, lse, dout, 0 * lse, settings)
    return out, lse, grads[:3]


def compile_case(name):
    """Prints ptxas' report of each kernel; run by the interpreter that has jax[cuda13]."""
    given = {"B": 1, "T": 2048, "N": 4, "H": 128, "dtype": "bfloat16", **COMPILED[name]}
    B, T, N, H = (given[x] for x in "BTNH")
    S, K = given.get("S", T), given.get("K", N)
    q, k = (jax.ShapeDtypeStruct((B, *n, H), given["dtype"]) for n in ((T, N), (S, K)))
    ids = tuple(jax.ShapeDtypeStruct((B, n), jnp.int32) for n in (T, S))
    ids = ids if given.get("segments") else None
    settings = Settings(given.get("mask", Full()), H**-0.5, given.get("softcap"))
    assert gpu.unsupported(q, k, k, None, None, ids, None, settings) is None
    report = compile_gpu(functools.partial(_attention, settings=settings), (q, k, k, ids, q))
    assert report.ok, report.reason
    for kernel in report.kernels:
        print(json.dumps([kernel.name, kernel.spill_stores, kernel.shared_bytes]))
