"""How TPU kernels of `monarch_matmul` are called: rows pass in windows, weights stay on chip."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.monarch_matmul import tpu_weights
from pallas_kernels.monarch_matmul.tpu_plan import Plan


def call(
    body: Callable[..., Iterator],
    name: str,
    arrays: Mapping[str, jax.Array],
    result: tuple[str, int],
    words: Mapping[str, int],
    plan: Plan,
    interpret,
    leaving: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Results by name of body(references by name, plan), run on every part of the rows.

    Args:
      body: a generator, which yields between phases for `_run`. It has "right", "left" and, in
        a backward pass, "dright" and "dleft" on chip, in the order of `tpu_weights`.
      arrays: "right", "left", perhaps "bias" [L, s], and others by rows, [M, width], or by words,
        [M / packed, width].
      result: name and width of what leaves by rows.
      words: name and width of arrays of 32-bit words, of a tile of rows.
      leaving: those of them that are no scratch but leave, [M / packed, width].

    Returns:
      The result in right's dtype, the words that leave, and of a backward pass dright
      [cores, K, p, q] and dleft [cores, L, r, s], in float32 where they are to be summed.
    """
    arrays, right, left = dict(arrays), arrays["right"], arrays["left"]
    word = jnp.int32 if plan.packed > 1 else jnp.float32
    shapes = {result[0]: jax.ShapeDtypeStruct((plan.M, result[1]), right.dtype)}
    for key in leaving:
        shapes[key] = jax.ShapeDtypeStruct((plan.M // plan.packed, words[key]), word)

    of_step = lambda core, step: (core * (plan.steps // plan.cores) + step, 0)  # noqa: E731
    height = lambda a: plan.rows * a.shape[0] // plan.M  # noqa: E731
    windows = (arrays.keys() | shapes.keys()) - {"right", "left", "bias"}
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    specs = {
        key: pl.BlockSpec((height(a), a.shape[1]), of_step) if key in windows else hbm
        for key, a in (arrays | shapes).items()
    }
    if "bias" in arrays:
        arrays["bias"] = arrays["bias"][:, None, :]
        specs["bias"] = pl.BlockSpec((plan.L, 1, plan.s), lambda core, step: (0, 0, 0))
    state = tpu_weights.scratch(plan, right.dtype)
    held = {key: width for key, width in words.items() if key not in leaving}
    state |= {key: pltpu.VMEM((plan.words, width), word) for key, width in held.items()}
    if plan.backward:
        for key, weights in (("dright", right), ("dleft", left)):
            dtype = jnp.float32 if plan.cores > 1 else weights.dtype
            shapes[key] = jax.ShapeDtypeStruct((plan.cores, *weights.shape), dtype)
            state[key] = pltpu.VMEM(weights.shape, jnp.float32)
            specs[key] = hbm

    def kernel(*refs):
        *refs, state = refs
        refs = dict(zip((*arrays, *shapes), refs, strict=True))
        first, last = (pl.program_id(1) == i for i in (0, plan.steps // plan.cores - 1))
        pl.when(first)(lambda: tpu_weights.load(refs["right"], refs["left"], state, plan))
        on_chip = refs | state
        by_rows = {key: on_chip[key] for key in (*windows, *held)}
        parts = [
            on_chip | {key: _part(ref, start, plan) for key, ref in by_rows.items()}
            for start in range(0, plan.rows, plan.chunk)
        ]
        _run([body(part, plan._replace(rows=plan.chunk)) for part in parts], plan)
        if plan.backward:
            pl.when(last)(lambda: tpu_weights.store(state, refs["dright"], refs["dleft"], plan))

    found = pl.pallas_call(
        kernel,
        grid=(plan.cores, plan.steps // plan.cores),
        in_specs=[specs[key] for key in arrays],
        out_specs=[specs[key] for key in shapes],
        out_shape=list(shapes.values()),
        scratch_shapes=[state],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.chip.limit
        ),
        cost_estimate=_cost(plan),
        interpret=interpret,
        name=f"{name}_kept" if plan.kept else name,
    )(*arrays.values())
    return dict(zip(shapes, found, strict=True))


def _part(ref, start: int, plan: Plan):
    """`plan.chunk` rows from this one on of a tile of rows, or of its words."""
    packed = plan.rows // ref.shape[0]
    return ref.at[pl.ds(start // packed, plan.chunk // packed)]


def _run(parts: Sequence[Iterator], plan: Plan) -> None:
    """Phase after phase, each part one behind the part before, or part after part.

    Interleaved, a phase of products stands beside one of exchanges, for the compiler does not look
    far for what may run together. Microseconds, part after part and interleaved (static schedule,
    libtpu 0.0.52): backward v5e 1024 by 4 110 and 105, 4096 by 16 453 and 433, v5p 4096 by 32 131
    and 129, v6e 4096 by 8 214 and 220; forward v6e 4096 by 8 98 and 95. Forward with 32 blocks an
    exchange fills half of the registers: v5p 8192 by 32 164 and 177. Mixed operation by operation
    the schedules are the same (v5p 4096 by 32, v6e 4096 by 8).
    """
    if not plan.backward and plan.L >= 32:
        parts = [itertools.chain.from_iterable(parts)]
    turn, live = 0, list(enumerate(parts))
    while live:
        live = [(i, part) for i, part in live if turn < i or next(part, "ended") != "ended"]
        turn += 1


def _cost(plan: Plan) -> pl.CostEstimate:
    """For XLA's scheduler."""
    times = 2 if plan.backward else 1
    arrays = plan.M * (plan.inputs + plan.outputs + plan.kept * plan.inner)
    return pl.CostEstimate(
        flops=times * plan.flops,
        transcendentals=0,
        bytes_accessed=times * plan.itemsize * (arrays + plan.cores * plan.weights),
    )
