"""Block-sparse 8-bit inference on a CPU beside dense products, side by side in one process.

    python -m benchmarks.sparse_cpu_inference [--quick] [--json PATH]

One layer, GELU and bias included, for M tokens, I inputs and O outputs:

    sparse      `efficient.linears.sparse_int8`: live blocks, 8-bit weights and activations
    float32     XLA's dense product of float32
    int8        the same 8-bit weights and activations, dense: XLA's int8 x int8 -> int32 product
    int8_as_f32 dense 8-bit weights that are converted to float32 within the program

First sparse is compared with the dense 8-bit product of the same numbers: integer sums must be
equal. Then all take turns in one process, and each figure is a median over rounds of the ratio to
float32 within the round, so that what else the machine does meets both. A star says that the
compiled program hands its products to YNNPACK, on which the integer forms depend. Regions where
sparse is the slower are printed like the others. Run it on a machine that does nothing else.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.records import record
from efficient.linears.sparse_int8 import (
    ACTIVATIONS,
    integer_columns,
    live_blocks,
    pack,
    quantized,
    sparse_int8_matmul,
    unpack,
)

SPARSITIES = (0.7, 0.8, 0.9)
BLOCKS = ((1, 64), (4, 64), (16, 128), (64, 128))


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of I inputs and O outputs for M tokens, pruned."""

    M: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    block: tuple[int, int]
    sparsity: float

    def __str__(self) -> str:
        block = "x".join(map(str, self.block))
        return f"M {self.M:4d}  {self.I:4d} -> {self.O:4d}  block {block:7s} {self.sparsity:.0%}"


def cases(quick: bool) -> list[Case]:
    """BERT's shapes (base and large), a short and a long batch of tokens."""
    if quick:
        return [Case(128, 768, 3072, (16, 128), 0.8)]
    shapes = [(768, 768), (768, 3072), (3072, 768), (1024, 4096)]
    return [
        Case(m, i, o, block, sparsity)
        for m in (32, 384)
        for i, o in shapes
        for block in BLOCKS
        for sparsity in SPARSITIES
    ]


def dense_int8(x, levels, scale, bias):
    """The 8-bit layer by XLA's own integer product."""
    of_x, of_token = quantized(x, axis=-1)
    total = jax.lax.dot_general(
        of_x, levels, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    return ACTIVATIONS["gelu"](total.astype(jnp.float32) * of_token * scale + bias)


def dense_as_f32(x, levels, scale, bias):
    """The 8-bit layer by a float32 product of weights that are converted as they are read."""
    of_x, of_token = quantized(x, axis=-1)
    total = of_x.astype(jnp.float32) @ levels.astype(jnp.float32)
    return ACTIVATIONS["gelu"](total * of_token * scale + bias)


def dense_f32(x, kernel, bias):
    """The layer as it was."""
    return ACTIVATIONS["gelu"](x @ kernel + bias)


def prepare(case: Case) -> tuple[dict[str, Callable[[], jax.Array]], set[str], bool]:
    """Compiled calls without arguments, which use YNNPACK, whether integer sums are equal."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(case.M, case.I)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(case.I, case.O)) / case.I**0.5, jnp.float32)
    bias = jnp.asarray(rng.normal(size=case.O), jnp.float32)
    rows = case.I // case.block[0]
    mask = live_blocks(kernel, case.block, max(1, round((1 - case.sparsity) * rows)))
    blocks, places, scale = pack(kernel, mask, case.block)
    levels = unpack(blocks, places, rows)
    found = integer_columns(quantized(x, -1)[0], blocks, places, lambda c, total: total)
    wanted = np.asarray(quantized(x, -1)[0], np.int64) @ np.asarray(levels, np.int64)
    equal = np.array_equal(np.asarray(found).reshape(case.O, -1).T, wanted)

    def sparse(x, blocks, places, scale, bias):
        return sparse_int8_matmul(x, blocks, places, scale, bias, "gelu")

    programs = {
        "sparse": (sparse, (x, blocks, places, scale, bias)),
        "float32": (dense_f32, (x, kernel, bias)),
        "int8": (dense_int8, (x, levels, scale, bias)),
        "int8_as_f32": (dense_as_f32, (x, levels, scale, bias)),
    }
    calls, by_library = {}, set()
    for name, (program, arguments) in programs.items():
        compiled = jax.jit(program).lower(*arguments).compile()
        calls[name] = lambda run=compiled, given=arguments: run(*given)
        by_library |= {name} if "__ynn_fusion" in compiled.as_text() else set()
    return calls, by_library, equal


def seconds(call: Callable[[], jax.Array], count: int) -> float:
    """Of one call, the mean of `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        call().block_until_ready()
    return (time.perf_counter() - start) / count


def measure(case: Case, rounds: int, budget: float) -> dict:
    """A row: medians in milliseconds, and of float32's time over each other's in the same round."""
    calls, by_library, equal = prepare(case)
    counts = {n: max(1, round(budget / max(seconds(c, 2), 1e-6))) for n, c in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 else list(calls)[::-1]
        for name in order:
            times[name].append(seconds(calls[name], counts[name]))
    row = dataclasses.asdict(case) | {"sums_equal": equal, "rounds": rounds}
    for name, found in times.items():
        row[f"{name}_ms"] = round(1e3 * statistics.median(found), 4)
        ratios = [f / own for f, own in zip(times["float32"], found, strict=True)]
        row[f"{name}_over_float32"] = round(statistics.median(ratios), 3)
        row[f"{name}_ynnpack"] = name in by_library
    return row


def processor() -> str:
    """The model of the CPU for which the figures hold."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line for line in file if line.startswith("model name"))
            model = next(lines, model).partition(":")[2].strip() or model
    return model


def main(argv: list[str] | None = None) -> int:
    """Prints a line a case; 1 where integer sums differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_cpu_inference")
    parser.add_argument("--quick", action="store_true", help="one case")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="where to write all rows")
    options = parser.parse_args(argv)
    print("float32's time over that of:    sparse    int8  int8_as_f32    (ms of float32)")
    rows = []
    for case in cases(options.quick):
        row = measure(case, options.rounds, budget=0.05)
        rows.append(row)
        wrong = "" if row["sums_equal"] else "  SUMS DIFFER"
        figures = "  ".join(
            f"{row[f'{n}_over_float32']:7.2f}{'*' if row[f'{n}_ynnpack'] else ' '}"
            for n in ("sparse", "int8", "int8_as_f32")
        )
        print(f"{case}  {figures}  ({row['float32_ms']:.3f}){wrong}", flush=True)
    if options.json:
        command = "python -m benchmarks.sparse_cpu_inference" + options.quick * " --quick"
        record(options.json, command, cpu=processor(), rows=rows)
    return 0 if all(row["sums_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
