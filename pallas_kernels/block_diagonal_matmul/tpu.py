"""`block_diagonal_matmul` on a TPU: a visit of a tile of rows and some blocks does everything.

Grid: groups of neighbouring blocks, whose weights stay on chip while all rows pass. Permutations
that move features between blocks need whole rows, hence all blocks in one group: tiles of 128 lanes
are read and stored where they belong; interleaved blocks are separated, and joined, in registers by
`pallas_kernels.interleave` with the weights ordered to match.

The backward kernel reads x and dy once for dx and the gradients of weights and bias; these are
added up on chip in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_diagonal_matmul import tpu_plan
from pallas_kernels.block_diagonal_matmul.layout import place_of
from pallas_kernels.block_diagonal_matmul.tpu_plan import WIDTH, Plan
from pallas_kernels.block_diagonal_matmul.tpu_sides import Side
from pallas_kernels.epilogue import finish
from pallas_kernels.tpu_dot import dot


def unsupported(x, blocks, inputs, outputs, activation, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"dtype {x.dtype.name}, not float32 or bfloat16"
    found = _plan(x, blocks, inputs, outputs, activation, backward)
    return found if isinstance(found, str) else None


def forward(x, blocks, bias, inputs, outputs, activation, precision, interpret=False):
    """y [M, K q] of x [M, K p]."""
    plan = _plan(x, blocks, inputs, outputs, activation, False)
    arrays = {"x": x, "w": _ordered(blocks, plan)}
    if bias is not None:
        arrays["bias"] = _bias_by_block(bias, outputs, plan)
    how = {"plan": plan, "activation": activation, "precision": precision}
    body = functools.partial(_forward_kernel, **how)
    shapes = {"y": jax.ShapeDtypeStruct((plan.M, plan.K * plan.q), x.dtype)}
    return _call(body, arrays, shapes, plan, interpret, "block_diagonal_fwd")["y"]


def backward(x, blocks, bias, dy, inputs, outputs, activation, precision, interpret=False):
    """dx in x's dtype, gradients of blocks and bias (None without one) in float32."""
    plan = _plan(x, blocks, inputs, outputs, activation, True)
    M, missing = plan.M, -plan.M % plan.rows  # rows that are none would enter the sums
    if missing:
        x, dy = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, dy))
        plan = plan._replace(M=M + missing)
    arrays = {"x": x, "w": _ordered(blocks, plan), "dy": dy}
    shapes = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "dw": jax.ShapeDtypeStruct((plan.shares, *blocks.shape), jnp.float32),
    }
    if bias is not None:
        arrays["bias"] = _bias_by_block(bias, outputs, plan)
        shapes["dbias"] = jax.ShapeDtypeStruct((plan.shares, plan.K, 1, plan.q), jnp.float32)
    how = {"plan": plan, "activation": activation, "precision": precision}
    body = functools.partial(_backward_kernel, **how)
    found = _call(body, arrays, shapes, plan, interpret, "block_diagonal_bwd")
    dbias = None
    if bias is not None:
        dbias = found["dbias"].sum((0, 2)).reshape(-1)[_lane_of(outputs, plan)]
    return found["dx"][:M], _restored(found["dw"].sum(0), plan), dbias


def _plan(x, blocks, inputs, outputs, activation, backward):
    how = x.dtype.itemsize, backward, activation is not None
    return tpu_plan.plan(x.shape[0], blocks, inputs, outputs, *how)


def _forward_kernel(refs, *, plan: Plan, activation, precision):
    w, bias = refs["w"], refs.get("bias")
    for rows in plan.chunks:
        x, y = _side(refs, "x", "x", rows, plan), _side(refs, "y", "y", rows, plan)
        x.separate()
        for k in range(plan.each):
            xk = x.read(k)
            for columns in _columns(plan.q):
                product = dot(xk, w[k, :, columns], precision)
                if bias is not None:
                    product += bias[k, :, columns].astype(product.dtype)
                y.write(k, columns.start, finish(product, None, activation))
        y.join()


def _backward_kernel(refs, *, plan: Plan, activation, precision):
    w, dw, bias, dbias = (refs.get(name) for name in ("w", "dw", "bias", "dbias"))

    @pl.when(pl.program_id(2) == 0)
    def _():
        for sums in (dw, dbias):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    for rows in plan.chunks:
        x, dy = _side(refs, "x", "x", rows, plan), _side(refs, "dy", "y", rows, plan)
        dx = _side(refs, "dx", "x", rows, plan)  # its words take the place of x's
        x.separate()
        dy.separate()
        for k in range(plan.each):
            xk, dyk = x.read(k), dy.read(k)
            if activation is not None:
                product = dot(xk, w[k], precision)
                if bias is not None:
                    product += bias[k].astype(product.dtype)
                _, pull = jax.vjp(lambda y: finish(y, None, activation), product)
                dyk = pull(dyk.astype(product.dtype))[0].astype(xk.dtype)
            if dbias is not None:
                dbias[0, k] += jnp.sum(dyk.astype(jnp.float32), 0, keepdims=True)
            for columns in _columns(plan.q):
                dw[0, k, :, columns] += dot(xk, dyk[:, columns], precision, 0, 0)
            for columns in _columns(plan.p):
                dx.write(k, columns.start, dot(dyk, w[k, columns, :], precision, 1, 1))
        dx.join()


def _columns(width: int) -> list[slice]:
    return [slice(i, min(i + WIDTH, width)) for i in range(0, width, WIDTH)]


def _side(refs, name, kind, rows, plan: Plan):
    layout, width = (plan.inputs, plan.p) if kind == "x" else (plan.outputs, plan.q)
    return Side(refs[name], refs.get(f"{kind}_words"), layout, width, *rows)


def _call(body, arrays, shapes, plan: Plan, interpret, name):
    """Results by name of a kernel that is given its references by name."""
    words = jnp.int32 if plan.packed > 1 else jnp.float32
    scratch = {}
    for key, side, width in (("x_words", plan.inputs, plan.p), ("y_words", plan.outputs, plan.q)):
        if side.tiles is None:
            scratch[key] = pltpu.VMEM((plan.words, plan.K * width), words)
    specs = _specs(plan)

    def kernel(*refs):
        body(dict(zip((*arrays, *shapes, *scratch), refs, strict=True)))

    last = "arbitrary" if plan.backward else "parallel"
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays.values(), *shapes.values()))
    found = pl.pallas_call(
        kernel,
        grid=(plan.groups, plan.shares, plan.steps // plan.shares),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in shapes],
        out_shape=list(shapes.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", last),
            vmem_limit_bytes=plan.chip.limit,
        ),
        cost_estimate=pl.CostEstimate(flops=plan.flops, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(shapes, found, strict=True))


def _specs(plan: Plan):
    """The windows, by name."""
    each, steps = plan.each, plan.steps // plan.shares
    rows = lambda width: pl.BlockSpec(  # noqa: E731
        (plan.rows, each * width), lambda g, share, i: (share * steps + i, g)
    )
    mode = {} if plan.buffers == 2 else {"pipeline_mode": pl.Buffered(1)}
    of_blocks = lambda *shape: pl.BlockSpec((each, *shape), lambda g, share, i: (g, 0, 0), **mode)  # noqa: E731
    sums = lambda *shape: pl.BlockSpec(  # noqa: E731
        (1, each, *shape), lambda g, share, i: (share, g, 0, 0), **mode
    )
    p, q = plan.p, plan.q
    return {
        "x": rows(p), "dx": rows(p), "y": rows(q), "dy": rows(q),
        "w": of_blocks(p, q), "bias": of_blocks(1, q), "dw": sums(p, q), "dbias": sums(1, q),
    }  # fmt: skip


def _ordered(blocks, plan: Plan):
    """The weights with rows and columns in the order in which the kernel has the features."""
    if plan.inputs.order is not None:
        blocks = _take_rows(blocks, plan.inputs.order)
    if plan.outputs.order is not None:
        blocks = _take_rows(blocks.swapaxes(1, 2), plan.outputs.order).swapaxes(1, 2)
    return blocks


def _restored(blocks, plan: Plan):
    """The inverse of `_ordered`."""
    if plan.inputs.order is not None:
        blocks = _take_rows(blocks, np.argsort(plan.inputs.order, 1))
    if plan.outputs.order is not None:
        order = np.argsort(plan.outputs.order, 1)
        blocks = _take_rows(blocks.swapaxes(1, 2), order).swapaxes(1, 2)
    return blocks


def _take_rows(blocks, order):
    """Row r of block k of the result is row order[k, r] of it."""
    K, p, q = blocks.shape
    rows = (order + np.arange(K)[:, None] * p).reshape(-1)
    return jnp.take(blocks.reshape(K * p, q), rows, axis=0, unique_indices=True).reshape(K, p, q)


def _bias_by_block(bias, outputs, plan: Plan):
    """[K, 1, q], as the kernel has the outputs."""
    return bias[np.argsort(_lane_of(outputs, plan))].reshape(plan.K, 1, plan.q)


def _lane_of(outputs, plan: Plan):
    """For each true output, its number among the kernel's lanes, [K q]."""
    place, order = place_of(outputs, plan.K * plan.q, True), plan.outputs.order
    if order is None:
        return place
    block, feature = place // plan.q, place % plan.q
    return block * plan.q + np.argsort(order, 1)[block, feature]
