"""block_sparse_matmul on TPU: weights stay on the chip, tiles of rows pass them by.

Forward. A tile [t, I] of x, all live blocks, U and V are in VMEM; the kernel is straight code over
the columns of blocks, which the mask gives when the program is traced: for each, the blocks of x
that it reads, side by side, by its live blocks, one above the other, so that a column's sum never
leaves the matrix unit's registers. Slices at multiples of 128 lanes cost nothing. x U is made first
and kept. Two neighbouring columns are one product in the rows that both read, since a v6e's
matrix unit is two blocks of 128 wide (`tpu_plan.groups`). Every array crosses HBM once.

dx is the same kernel for the transposed mask: blocks are contracted over their last axis, and V^T
and U^T take the places of U and V.

Weights' gradients. A row of blocks at a time, x_i^T by the blocks of dy that meet it, added in
float32 to all gradients, which stay in VMEM from the first tile of rows to the last: on each core
of the chip those of its share of the rows.

Predicted fraction of the roofline by the static schedule (libtpu 0.0.52, bfloat16, M 8192, density
1/8, blocks of 128, n 4096 and 8192, without and with a rank of 128):

                    v5e     v5p             v6e
    forward, dx     1.00    1.00            0.82 to 1.00
    dw              1.00    0.99 to 1.00    0.79 to 1.00
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_matmul import tpu_plan
from pallas_kernels.block_sparse_matmul.settings import Settings, combine, padded
from pallas_kernels.epilogue import finish
from pallas_kernels.tpu_chip import chip
from pallas_kernels.tpu_dot import dot


def forward(x, blocks, u, v, gamma, bias, settings: Settings, *, save: bool, interpret=False):
    """(y, before, z) as `blockwise.forward`."""
    outputs = 2 if save and settings.activation else 1
    tile = tpu_plan.tile(x, blocks, u, settings, outputs)
    y, before, z = _multiply(
        x, blocks, u, v, gamma, bias, settings, settings.mask.columns, tile, save, interpret
    )
    return y, before, z if z is None else z[:, : u.shape[1]]


def backward(x, dy, z, blocks, u, v, gamma, has_bias, settings: Settings, *, interpret=False):
    """(dx, d_blocks, du, dv, d_bias) as `blockwise.backward`."""
    tile = tpu_plan.tile(x, blocks, u, settings, 1)
    across = None if u is None else (v.T, u.T)
    plain = settings._replace(activation=None)
    dx, _, dz = _multiply(
        dy, blocks, *(across or (None, None)), gamma, None, plain, settings.mask.rows, tile, True,
        interpret, transposed=True,
    )  # fmt: skip
    tile = tpu_plan.gradient_tile(x, blocks, u, settings)
    d_blocks, du, dv, d_bias = _gradients(
        x, dy, z, dz, blocks.shape, settings, has_bias, tile, interpret
    )
    if u is not None:
        du, dv = du[:, : u.shape[1]], dv[: u.shape[1]]
    return dx, d_blocks, du, dv, None if d_bias is None else d_bias[0]


def _multiply(
    x, blocks, u, v, gamma, bias, settings, columns, tile, save, interpret, transposed=False
):
    """(y, before, z): x [M, I] by the columns, each of live (row, number).

    With `transposed` the rows of B^T are the columns, and blocks are transposed in the product.
    """
    M, (nnz, bi, bo) = x.shape[0], blocks.shape
    bi, bo = (bo, bi) if transposed else (bi, bo)
    width, rank = len(columns) * bo, tpu_plan.padded_rank(u)
    x = padded(x, 0, tile)
    inputs = {"x": (x, _rows(tile, x.shape[1])), "blocks": (blocks, _whole(blocks.shape))}
    if rank:
        u, v = padded(u, 1, tpu_plan.LANES), padded(v, 0, tpu_plan.LANES)
        inputs |= {"u": (u, _whole(u.shape)), "v": (v, _whole(v.shape))}
    if gamma is not None:
        gamma = gamma.astype(jnp.float32).reshape(1, 1)
        inputs["gamma"] = gamma, pl.BlockSpec(memory_space=pltpu.SMEM)
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(1, width)
        inputs["bias"] = bias, _whole(bias.shape)
    shapes = {"y": width}
    if save and settings.activation:
        shapes["before"] = width
    if save and rank:
        shapes["z"] = rank
    body = functools.partial(
        _multiply_kernel,
        plan=tpu_plan.groups(columns, bi, bo),
        block=(bi, bo),
        transposed=transposed,
        settings=settings,
    )
    moved = x.dtype.itemsize * (x.size + x.shape[0] * sum(shapes.values()))
    found = _call(
        body,
        inputs,
        {n: jax.ShapeDtypeStruct((x.shape[0], w), x.dtype) for n, w in shapes.items()},
        {n: _rows(tile, w) for n, w in shapes.items()},
        scratch={"low": pltpu.VMEM((tile, rank), x.dtype)} if rank and "z" not in shapes else {},
        grid={"parallel": x.shape[0] // tile},
        flops=2 * x.shape[0] * (nnz * bi * bo + rank * (x.shape[1] + width)),
        moved=moved,
        interpret=interpret,
        name="block_sparse_matmul" + "_dx" * transposed,
    )
    return tuple(found[n][:M] if n in found else None for n in ("y", "before", "z"))


def _multiply_kernel(refs, *, plan, block, transposed, settings: Settings):
    x, blocks = refs["x"], refs["blocks"]
    bi, bo = block
    product = functools.partial(dot, precision=settings.precision)
    stacked, contracted = (1, 1) if transposed else (0, 0)
    gamma = refs["gamma"][0, 0] if "gamma" in refs else None
    kept = refs.get("z", refs.get("low"))
    if kept is not None:
        kept[...] = product(x[...], refs["u"][...]).astype(kept.dtype)

    def read(live):
        return _beside([x[:, row * bi : (row + 1) * bi] for row, _ in live], 1)

    def weights(live):
        return _beside([blocks[number] for _, number in live], stacked)

    for group in plan:
        sums = [product(read(r), weights(r), of_b=contracted) if r else None for r in group.rest]
        total = _columns(sums, (x.shape[0], bo))
        if group.both[0]:
            wide = _beside([weights(live) for live in group.both], 1 - stacked)
            shared = product(read(group.both[0]), wide, of_b=contracted)
            total = shared if total is None else total + shared
        place = slice(group.first * bo, (group.first + len(sums)) * bo)
        low = None if kept is None else product(kept[...], refs["v"][:, place])
        if total is None and low is None:
            total = jnp.zeros((x.shape[0], bo * len(sums)), jnp.float32)
        elif total is None:
            total = low if gamma is None else (1 - gamma) * low
        else:
            total = total * gamma if low is None and gamma is not None else total
            total = combine(total, low, gamma)
        if "bias" in refs:
            total = total + refs["bias"][:, place]
        if "before" in refs:
            refs["before"][:, place] = total.astype(x.dtype)
        refs["y"][:, place] = finish(total, None, settings.activation).astype(x.dtype)


def _columns(sums, shape):
    """Neighbouring columns as one array, zeros for None; None where all are."""
    if all(s is None for s in sums):
        return None
    return _beside([jnp.zeros(shape, jnp.float32) if s is None else s for s in sums], 1)


def _gradients(x, dy, z, dz, shape, settings: Settings, has_bias, tile, interpret):
    """(d_blocks, du, dv, d_bias [1, O]) in float32; z = x U, dz = dy V^T, or None."""
    (nnz, bi, bo), wide_in, wide_out = shape, x.shape[1], dy.shape[1]
    x, dy = padded(x, 0, tile), padded(dy, 0, tile)
    shares = chip().shares(x.shape[0] // tile)
    steps = x.shape[0] // tile // shares

    def rows(width):
        return pl.BlockSpec((tile, width), lambda share, i: (share * steps + i, 0))

    inputs = {"x": (x, rows(wide_in)), "dy": (dy, rows(wide_out))}
    shapes = {"d_blocks": shape}
    if z is not None:
        z, dz = (padded(padded(a, 0, tile), 1, tpu_plan.LANES) for a in (z, dz))
        rank = z.shape[1]
        inputs |= {"z": (z, rows(rank)), "dz": (dz, rows(rank))}
        shapes |= {"du": (wide_in, rank), "dv": (rank, wide_out)}
    if has_bias:
        shapes["d_bias"] = (1, wide_out)
    found = _call(
        functools.partial(_gradients_kernel, settings=settings, block=(bi, bo)),
        inputs,
        {n: jax.ShapeDtypeStruct((shares, *s), jnp.float32) for n, s in shapes.items()},
        {n: _of_share(s) for n, s in shapes.items()},
        scratch={},
        grid={"parallel": shares, "arbitrary": steps},
        flops=2 * x.shape[0] * nnz * bi * bo,
        moved=x.dtype.itemsize * (x.size + dy.size) + 4 * shares * nnz * bi * bo,
        interpret=interpret,
        name="block_sparse_matmul_dw",
    )
    names = ("d_blocks", "du", "dv", "d_bias")
    return tuple(found[n].sum(0) if n in found else None for n in names)


def _gradients_kernel(refs, *, settings: Settings, block):
    x, dy = refs["x"], refs["dy"]
    bi, bo = block
    of_rows = functools.partial(dot, precision=settings.precision, of_a=0, of_b=0)
    names = ("d_blocks", "du", "dv", "d_bias")
    sums = {name: refs[name].at[0] for name in names if name in refs}

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in sums.values():
            _clear(ref)

    for row, live in enumerate(settings.mask.rows):
        if live:
            met = _beside([dy[:, c * bo : (c + 1) * bo] for c, _ in live], 1)
            part = of_rows(x[:, row * bi : (row + 1) * bi], met)
            for i, (_, number) in enumerate(live):
                sums["d_blocks"][number] += part[:, i * bo : (i + 1) * bo]
    if "du" in sums:
        sums["du"][...] += of_rows(x[...], refs["dz"][...])
        sums["dv"][...] += of_rows(refs["z"][...], dy[...])
    if "d_bias" in sums:
        sums["d_bias"][...] += jnp.sum(dy[...].astype(jnp.float32), 0, keepdims=True)


def _clear(ref):
    """Zeros, in a loop of which each turn is one block or eight rows: once is no matter of time."""
    step = 1 if ref.ndim == 3 else min(8, ref.shape[0])

    @pl.loop(0, ref.shape[0] // step)
    def _(i):
        rows = i if ref.ndim == 3 else pl.ds(pl.multiple_of(i * step, step), step)
        ref[rows] = jnp.zeros_like(ref[rows])


def _call(
    body, inputs, shapes, specs, *, scratch, grid, flops, moved, interpret, name
):  # fmt: skip
    """Results by name of a kernel that is given all its references by name; grid by semantics."""

    def kernel(*refs):
        body(dict(zip((*inputs, *shapes, *scratch), refs, strict=True)))

    found = pl.pallas_call(
        kernel,
        grid=tuple(grid.values()),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=list(specs.values()),
        out_shape=list(shapes.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(grid), vmem_limit_bytes=chip().limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), transcendentals=0, bytes_accessed=int(moved)
        ),
        interpret=interpret,
        name=name,
    )(*(array for array, _ in inputs.values()))
    return dict(zip(shapes, found, strict=True))


def _rows(tile, width):
    return pl.BlockSpec((tile, width), lambda i: (i, 0))


def _of_share(shape):
    index = lambda share, i: (share, *(0,) * len(shape))  # noqa: E731
    return pl.BlockSpec((1, *shape), index, pipeline_mode=pl.Buffered(1))  # it changes by core


def _whole(shape):
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def _beside(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
