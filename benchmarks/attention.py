"""Attention on a GPU: our Hopper kernels checked, then timed beside cuDNN, torch and XLA.

    python -m benchmarks.attention [--quick] [--only causal_4k_h128,...] [--json PATH]

First every kernel's result and gradients are compared with float32 attention on the same device:
the error may be twice that of bfloat16 attention by XLA, plus the last bits of float32. And five
calls on the same arrays have to give the same bits: no gradient is added up by atomics. Then, shape
by shape, all implementations take turns in one process, so that what else happens to the machine
meets all of them; a figure is the median over rounds. Times are of calls queued behind each other,
so the dispatch is hidden. Backward is forward and backward less forward. FLOPs: 4 B N T S H
forward, 2.5 times that backward, half of both under a causal mask.

Without a GPU it says so and exits with 0; with a failing check it exits with 1, after the timings.
Needs jax with CUDA; torch is a peer where it is installed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory beside

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu
from pallas_kernels.attention import Causal, Full, attention
from pallas_kernels.lab.chips import chip

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention of B sequences of T tokens, N query heads on K key heads of size H."""

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    causal: bool

    @property
    def flops(self) -> float:
        """Of forward."""
        return 4 * self.B * self.N * self.T**2 * self.H / (2 if self.causal else 1)

    @property
    def roofline_seconds(self) -> float:
        """Of forward on an H200, by FLOPs and bytes."""
        moved = 2 * self.B * self.T * self.H * (2 * self.N + 2 * self.K)
        h200 = chip("h200")
        return max(self.flops / h200.peak_flops, moved / h200.hbm_bandwidth)


def shapes(quick: bool) -> list[Shape]:
    """16,384 tokens and a width of 2048 throughout, as FlashAttention's benchmarks have."""
    found = []
    for H in (64, 128, 256):
        for T in (4096,) if quick else (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                name = f"{'causal' if causal else 'full'}_{T}_h{H}"
                found.append(Shape(name, 16384 // T, T, 2048 // H, 2048 // H, H, causal))
    found.append(Shape("gqa_causal_4096_h128", 4, 4096, 32, 8, 128, True))
    return found


def draw(shape: Shape, seed: int = 0) -> Arrays:
    """q, k, v, dout in bfloat16, on the default device."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = [(shape.B, shape.T, n, shape.H) for n in (shape.N, shape.K, shape.K, shape.N)]
    return tuple(
        jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)
    )


# ---- implementations: name -> (forward(q, k, v), step(q, k, v, dout) -> out and gradients)


def jax_pair(attend: Callable) -> tuple[Callable, Callable]:
    def step(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    return jax.jit(attend), jax.jit(step)


def of_jax(shape: Shape, implementation: str) -> tuple[Callable, Callable]:
    """Those of jax.nn.dot_product_attention for "cudnn" and "xla", else ours of that name."""
    if implementation in ("cudnn", "xla"):
        return jax_pair(
            functools.partial(
                jax.nn.dot_product_attention,
                is_causal=shape.causal,
                implementation=implementation,
            )
        )
    mask = Causal() if shape.causal else Full()
    return jax_pair(functools.partial(attention, mask=mask, implementation=implementation))


def of_torch(shape: Shape) -> tuple[Callable, Callable, Callable]:
    """forward, step and the conversion of arrays for torch's scaled_dot_product_attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward(q, k, v):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], True):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, enable_gqa=shape.N != shape.K
            )

    def step(q, k, v, dout):
        out = forward(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    def convert(arrays: Arrays) -> Arrays:
        host = [np.asarray(x, np.float32).swapaxes(1, 2) for x in arrays]
        found = [torch.tensor(x, dtype=torch.bfloat16, device="cuda") for x in host]
        return tuple(x.requires_grad_(i < 3) for i, x in enumerate(found))

    return forward, step, convert


# ---- checks


def check(shape: Shape, implementation: str) -> dict[str, Any]:
    """Our errors, those of bfloat16 attention by XLA, what is allowed, and the verdict."""
    arrays = draw(shape, seed=1)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    with jax.default_matmul_precision("highest"):
        right = of_jax(shape, "reference")[1](*wide)
    near = of_jax(shape, "xla")[1](*arrays)
    return gpu.check(shape.name, right, near, lambda: of_jax(shape, implementation)[1](*arrays))


def check_repeats(shape: Shape, implementation: str, calls: int = 5) -> dict[str, Any]:
    """Whether result and gradients are the same bits in every call on the same arrays."""
    arrays = draw(shape, seed=2)
    try:
        step = of_jax(shape, implementation)[1]
        found = [[np.asarray(x).tobytes() for x in step(*arrays)] for _ in range(calls)]
    except Exception as error:  # the other shapes are still worth a check
        return {"case": shape.name, "differ": [], "passed": False, "reason": gpu.reason(error)}
    names = ("out", "dq", "dk", "dv")
    differ = [name for name, *each in zip(names, *found, strict=True) if len(set(each)) > 1]
    return {"case": shape.name, "calls": calls, "differ": differ, "passed": not differ}


def say_repeats(verdict: dict[str, Any]):
    found = verdict.get("reason") or ", ".join(verdict["differ"]) or "none"
    passed = "passed" if verdict["passed"] else "FAILED"
    print(f"repeat {verdict['case']:31}{passed}  arrays whose bits differ: {found}", flush=True)


def check_shapes() -> list[Shape]:
    return [
        Shape(f"{'causal' if causal else 'full'}_{T}_h{H}_k{K}", 1, T, 4, K, H, causal)
        for H in (64, 128, 256)
        for T, K in ((1024, 4), (777, 2))
        for causal in (False, True)
    ]


# ---- times


def timers(shape: Shape, implementations: list[str]) -> dict[str, gpu.Timed | str]:
    """By name, forward and step; a string where one cannot run."""
    arrays, found = draw(shape), {}
    for name in implementations:
        try:
            if name == "torch":
                import torch

                forward, step, convert = of_torch(shape)
                given, wait = convert(arrays), lambda _: torch.cuda.synchronize()
            else:
                (forward, step), given, wait = of_jax(shape, name), arrays, jax.block_until_ready
            calls = functools.partial(forward, *given[:3]), functools.partial(step, *given)
            for call in calls:
                wait(call())
            found[name] = gpu.Timed(calls, wait)
        except Exception as error:  # a peer that cannot do a shape is a row that says why
            found[name] = gpu.reason(error)
    return found


def measure(shape: Shape, implementations: list[str], rounds: int, budget: float) -> list[dict]:
    """A row for each implementation; each call is repeated for about `budget` seconds a round."""
    found = timers(shape, implementations)
    ready = {name: x for name, x in found.items() if not isinstance(x, str)}
    rows = [{"case": shape.name, "by": k, "reason": x} for k, x in found.items() if k not in ready]
    for name, (forward, step) in gpu.medians(ready, rounds, budget).items():
        backward = step - forward
        rows.append({
            "case": shape.name, "by": name, "forward_s": forward, "step_s": step,
            "forward_tflops": shape.flops / forward / 1e12,
            "backward_tflops": 2.5 * shape.flops / backward / 1e12 if backward > 0 else None,
            "roofline": shape.roofline_seconds / forward,
        })  # fmt: skip
    return rows


def line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['case']:24}{row['by']:12}{row['reason']}"
    backward = row["backward_tflops"]
    return (
        f"{row['case']:24}{row['by']:12}{row['forward_s'] * 1e6:10.0f} us"
        f"{row['forward_tflops']:8.0f}{'-' if backward is None else format(backward, '.0f'):>10}"
        f"{row['roofline']:10.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Attention on a GPU beside its peers.")
    parser.add_argument("--quick", action="store_true", help="T 4096 only")
    parser.add_argument("--only", default="", help="names of shapes, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default="", help="where to write all figures")
    args = parser.parse_args(argv)
    chosen = gpu.chosen(shapes(args.quick), args.only)
    if chosen is None:
        return 2
    device = gpu.device()
    if device is None:
        return 0
    implementations = ["gpu", "cudnn", "xla"]
    if importlib.util.find_spec("torch") is not None:
        implementations.insert(2, "torch")
    checks, repeats = [], []
    for shape in check_shapes():
        checks.append(check(shape, "gpu"))
        gpu.say(checks[-1], "out, dq, dk, dv")
        repeats.append(check_repeats(shape, "gpu"))
        say_repeats(repeats[-1])
    print(f"{'case':24}{'by':12}{'forward':>13}{'TFLOP/s':>8}{'backward':>10}{'roofline':>10}")
    rows = []
    for shape in chosen:
        for row in measure(shape, implementations, args.rounds, budget=0.02):
            rows.append(row)
            print(line(row), flush=True)
    gpu.write(args.json, device, checks=checks, repeats=repeats, rows=rows)
    return 0 if all(c["passed"] for c in checks + repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
