"""Monarch products: the public function, its derivative, its dispatch and its layout on a mesh."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, mesh
from pallas_kernels.epilogue import finish
from pallas_kernels.monarch_matmul import blockwise, gpu, tpu
from pallas_kernels.monarch_matmul.checks import check
from pallas_kernels.monarch_matmul.reference import reference
from pallas_kernels.monarch_matmul.split import Split, misfit, split_matmul


def monarch_matmul(
    x: jax.Array,
    right: jax.Array,
    left: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    sharding: jax.sharding.NamedSharding | None = None,
    outputs: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """activation(x W + bias) for the Monarch matrix W of two block-diagonal factors.

        z[k] = x[k] right[k]                    block k of K: contiguous features of x
        y[f * L + l] = (z' left[l])[f]          z'[i] = z[i * L + l], z read flat

    As M = P L P^T R of arXiv 2204.00595 for row vectors, where K = L and all blocks are square;
    the factors may have different numbers of blocks, of any shape with K q = L r.
    Reverse-mode derivatives in x, right, left and bias. z is rounded to x's dtype, sums are in
    float32 (float64 for float64), gradients of the factors summed before they are rounded, but over
    devices where features are split (`split`).

    On a TPU, one kernel each way reads x and writes y once and keeps z on chip. It needs float32 or
    bfloat16, at least 128 rows on a device, p, q, r and s multiples of 128, L a power of two up to
    128, and weights that fit on the chip. Other calls run as two batched products in XLA, with one
    warning. For large blocks the forward pass also saves z (M K q numbers, named "monarch_z" for
    `jax.checkpoint` policies), which spares the backward pass one of its five products; that pass
    may then be three kernels. On a Hopper GPU the forward pass is two kernels, with z in memory
    between them, and an XLA pass that puts y in order; `gpu.unsupported` says which shapes they
    take.

    Args:
      x: [..., K p], no axis of 0; float32, bfloat16, float16 or float64.
      right: [K, p, q] in x's dtype.
      left: [L, r, s] in x's dtype, L r = K q.
      bias: [L s] in x's dtype.
      activation: "gelu" (its tanh form), "relu", "silu" or None. Its derivative needs the product
        once more in the backward pass.
      precision: of the products, as for `jax.numpy.einsum`.
      sharding: how x is laid out on a mesh, `NamedSharding(mesh, P(..., None))`; each device then
        works on its rows with all the weights. Needed where the TPU kernel runs on a mesh whose
        axes are of type Auto. Where the last entry names mesh axes, they split the features of x,
        the blocks of right and the rows of left, and the parts of y are summed.
      outputs: mesh axes that split the features of y, the blocks of right and the columns of left,
        where x's features are whole; needs `sharding`. See `split`.
      implementation: None, by the platform for which the program is lowered; or "reference",
        "blockwise" (XLA operations), "tpu", "gpu".

    Returns:
      y [..., L s] in x's dtype.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform.
    """
    check(x, right, left, bias, activation, implementation)
    if implementation == "reference":
        return reference(x, right, left, bias, activation, precision)
    split = _split(x, right, left, sharding, outputs)
    if split is not None:
        run = _Run(implementation, precision)
        y = split_matmul(split, run, x, right, left)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        return finish(y.astype(wide), bias, activation).astype(x.dtype)
    found = mesh.rows_layout("monarch_matmul", x, sharding)
    compute = functools.partial(_matmul, implementation, activation, precision)
    return mesh.over_rows(compute, found, x, right, left, bias)


class _Run(NamedTuple):
    """The whole product on the arrays of one device, by `_run`."""

    implementation: str | None
    precision: jax.lax.PrecisionLike

    def __call__(self, direction, *arrays):
        return _run(direction, self.implementation, None, self.precision, *arrays)


def _split(x, right, left, sharding, outputs) -> Split | None:
    """How features are split; None where they are whole.

    Raises:
      ValueError: both are split, `outputs` without a sharding, axes that the mesh has not or that
        split rows, or sizes that do not divide.
    """
    inputs, named = None, isinstance(sharding, NamedSharding)
    if named and len(sharding.spec) == x.ndim:
        inputs = sharding.spec[-1]
    if inputs is None and outputs is None:
        return None
    if not named or (inputs is not None and outputs is not None):
        raise ValueError(
            "monarch_matmul: outputs must be None where sharding splits the features of x or is no "
            f"NamedSharding; got {outputs!r} and {sharding}"
        )
    rows = P(*sharding.spec[:-1]) if inputs is not None else sharding.spec
    _, lead, _ = mesh.rows_layout("monarch_matmul", x, NamedSharding(sharding.mesh, rows))
    found = Split(sharding.mesh, lead, inputs, outputs)
    reason = misfit(found, right, left)
    if reason:
        raise ValueError(f"monarch_matmul: {reason}")
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(implementation, activation, precision, x, right, left, bias):
    return _run("forward", implementation, activation, precision, x, right, left, bias)


def _forward(implementation, activation, precision, x, right, left, bias):
    arrays, z = (x, right, left, bias), None
    run = functools.partial(_run, "forward", implementation, activation, precision)
    if implementation in (None, "tpu") and not dispatch.manual(arrays) and tpu.keeps(*arrays[:3]):
        y, z = run(*arrays, keep=True)
        z = checkpoint_name(z, "monarch_z")
    else:
        y = run(*arrays)
    return y, (*arrays, z)


def _backward(implementation, activation, precision, residuals, dy):
    x, right, left, bias, z = residuals
    if activation is not None:
        y = _run("forward", implementation, None, precision, x, right, left, bias)
        wide = jnp.promote_types(y.dtype, jnp.float32)
        _, pull = jax.vjp(lambda y: finish(y, None, activation), y.astype(wide))
        dy = pull(dy.astype(wide))[0].astype(y.dtype)
    run = functools.partial(_run, "backward", implementation, None, precision)
    dx, dright, dleft = run(x, right, left, dy, z)
    dbias = None
    if bias is not None:
        wide = jnp.promote_types(dy.dtype, jnp.float32)
        dbias = dy.astype(wide).sum(range(dy.ndim - 1)).astype(bias.dtype)
    return dx, dright.astype(right.dtype), dleft.astype(left.dtype), dbias


_matmul.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames="keep")
def _run(
    direction, implementation, activation, precision, x, right, left, last, z=None, keep=False
):
    """`forward` (last is the bias) or `backward` (last is dy) of an implementation.

    keep: y and z, which a later `backward` is given. Only TPU kernels make it and need it.
    """
    arrays = (x, right, left, last) + (() if z is None else (z,))
    options = {"precision": precision}
    if direction == "forward":
        options["activation"] = activation
    call = functools.partial(_call, direction, options, keep)
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    kernels = {}
    for platform, name, module in (("tpu", "tpu", tpu), ("cuda", "gpu", gpu)):
        reason = None
        if module is gpu or not (keep or z is not None):
            reason = module.unsupported(x, right, left, direction == "backward")
        if dispatch.manual(arrays):
            reason = "inside shard_map a kernel needs check_vma=False"
        kernel = functools.partial(call, module)
        if module is tpu:  # its weights stay in HBM, which no batched kernel can have
            kernel = dispatch.by_example(kernel, rows=direction == "forward" and not keep)
        kernels[platform] = dispatch.Kernel(name, kernel, reason)
    return dispatch.choose("monarch_matmul", implementation, arrays, on_cpu, elsewhere, kernels)


def _call(direction, options, keep, module, x, right, left, last, z=None, **more):
    options = options | more
    if module is tpu:
        options |= {"keep": keep} if direction == "forward" else {"z": z}
    found = getattr(module, direction)(x, right, left, last, **options)
    if keep and module is not tpu:
        return found, jnp.zeros(*tpu.kept(x, right))
    return found
