"""block_sparse_matmul: the public function, its derivative, its dispatch and its layout."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels import dispatch, mesh
from pallas_kernels.block_sparse_matmul import blockwise, gpu, tpu, tpu_plan
from pallas_kernels.block_sparse_matmul.checks import check, precision_of
from pallas_kernels.block_sparse_matmul.mask import BlockMask
from pallas_kernels.block_sparse_matmul.reference import reference
from pallas_kernels.block_sparse_matmul.settings import Settings, accumulator, activation_gradient


def block_sparse_matmul(
    x: jax.Array,
    blocks: jax.Array,
    *,
    mask: BlockMask,
    u: jax.Array | None = None,
    v: jax.Array | None = None,
    gamma: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    sharding: NamedSharding | None = None,
    precision: jax.lax.Precision | str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """act(gamma x B + (1 - gamma) (x U) V + bias) for a matrix B of which few blocks are live.

    Work, and bytes of weights, are in proportion to the live blocks, forward and backward, but that
    small blocks on a CPU are multiplied as a dense matrix (see `blockwise`). On a TPU one kernel
    gives the result, x U never leaves the chip (but for the backward pass, which is given it), and
    one each the gradients of x and of the weights.

    Args:
      x: [..., I], no axis of 0; float32, bfloat16, float16 or float64.
      blocks: [nnz, bi, bo] in x's dtype, the live blocks of B [I, O] in row-major order. A column
        of B without a live block is zero.
      mask: which blocks of B are live, [I / bi, O / bo].
      u, v: [I, r] and [r, O] in x's dtype; or neither. x U is rounded to x's dtype.
      gamma: array [], floating; None: the plain sum x B + (x U) V.
      bias: floating [O].
      activation: None, "gelu" (by tanh), "relu" or "silu".
      sharding: of x on a mesh, over leading axes alone, `NamedSharding(mesh, P(..., None))`; each
        device then works on its rows with all the weights. Needed where the TPU kernel runs on a
        mesh of Auto axes; on one of Explicit axes it is read off x.
      precision: of float32 products: None, "default", "high", "highest" or a jax.lax.Precision.
        Sums are in float32 whatever it is.
      implementation: None, by the platform for which the program is lowered; or "reference" (a
        dense matrix), "blockwise" (XLA operations), "tpu", "gpu" (kernels for Hopper GPUs).

    Returns:
      [..., O] in x's dtype.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform.
    """
    check(x, blocks, mask, u, v, gamma, bias, activation, implementation)
    settings = Settings(mask, activation, precision_of(precision))
    wide = accumulator(x.dtype)
    gamma, bias = (None if a is None else a.astype(wide) for a in (gamma, bias))
    weights = (blocks, u, v, gamma, bias)
    found = mesh.rows_layout("block_sparse_matmul", x, sharding)
    return mesh.over_rows(functools.partial(_local, implementation, settings), found, x, *weights)


def _local(implementation, settings, x, *weights):
    flat = x.reshape(-1, x.shape[-1])
    if implementation == "reference":
        y = jax.jit(reference, static_argnums=6)(flat, *weights, settings)
    else:
        y = _matmul(implementation, settings, flat, *weights)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation, settings, x, blocks, u, v, gamma, bias):
    arrays = (x, blocks, u, v, gamma, bias)
    return _forward(implementation, settings, False, *arrays)[0]


def _matmul_forward(implementation, settings, *arrays):
    y, before, z = _forward(implementation, settings, True, *arrays)
    return y, (arrays, before, z)


def _matmul_backward(implementation, settings, residuals, dy):
    (x, blocks, u, v, gamma, bias), before, z = residuals
    dy = activation_gradient(settings.activation, before, dy)
    arrays = (x, dy, z, blocks, u, v, gamma)
    dx, d_blocks, du, dv, d_bias = _backward(implementation, settings, bias is not None, *arrays)
    d_gamma = None
    if gamma is not None:
        d_gamma = jnp.vdot(d_blocks, blocks.astype(d_blocks.dtype))
        d_gamma = d_gamma - jnp.vdot(dv, v.astype(dv.dtype))
        d_blocks, du, dv = gamma * d_blocks, (1 - gamma) * du, (1 - gamma) * dv
    cast = lambda d, like: None if like is None else d.astype(like.dtype)  # noqa: E731
    weights = zip((d_blocks, du, dv, d_gamma, d_bias), (blocks, u, v, gamma, bias), strict=True)
    return dx, *(cast(d, like) for d, like in weights)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(implementation, settings, save, *arrays):
    x, blocks, u = arrays[:3]
    reasons = {
        "tpu": tpu_plan.unsupported_forward(x, blocks, u, settings, save),
        "gpu": gpu.unsupported(x, blocks),
    }
    call = lambda module, *given, **how: module.forward(*given, settings, save=save, **how)  # noqa: E731
    return _choose(implementation, arrays, call, reasons)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(implementation, settings, has_bias, *arrays):
    x, _, _, blocks, u = arrays[:5]
    reasons = {
        "tpu": tpu_plan.unsupported_backward(x, blocks, u, settings),
        "gpu": gpu.unsupported(x, blocks),
    }
    call = lambda module, *given, **how: module.backward(*given, has_bias, settings, **how)  # noqa: E731
    return _choose(implementation, arrays, call, reasons)


def _choose(implementation, arrays, call, reasons):
    if dispatch.manual(arrays):
        reasons = dict.fromkeys(reasons, "inside shard_map a kernel needs check_vma=False")
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    kernels = {
        platform: dispatch.Kernel(name, functools.partial(call, module), reasons[name])
        for platform, name, module in (("tpu", "tpu", tpu), ("cuda", "gpu", gpu))
    }
    return dispatch.choose(
        "block_sparse_matmul", implementation, arrays, on_cpu, elsewhere, kernels
    )
