"""block_diagonal_matmul: the public function, its derivative, its dispatch and its layout."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import dispatch, mesh
from pallas_kernels.block_diagonal_matmul import blockwise, gpu, tpu
from pallas_kernels.block_diagonal_matmul.checks import check
from pallas_kernels.block_diagonal_matmul.permutation import Permutation, Stride
from pallas_kernels.block_diagonal_matmul.reference import reference


def block_diagonal_matmul(
    x: jax.Array,
    blocks: jax.Array,
    *,
    bias: jax.Array | None = None,
    permute_inputs: Stride | Permutation | None = None,
    permute_outputs: Stride | Permutation | None = None,
    activation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    sharding: jax.sharding.NamedSharding | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """activation(P_out(P_in(x) B) + bias) for the block-diagonal matrix B of K blocks.

        z = P_in(x);    w[k] = z[k] blocks[k], block k of K: contiguous features;    y = P_out(w)

    Reverse-mode derivatives in x, blocks and bias. Sums are in float32 (float64 for float64).

    On a TPU, one kernel each way reads x (and dy) and writes y (or dx) once. It needs float32 or
    bfloat16, at least 128 rows on a device, p and q multiples of 128, blocks that fit on the chip,
    and permutations of these kinds, which cost no pass of their own. Within a block, features may
    stand in any order: the weights are permuted to match, which is exact.

        blocks stay where they are, or move as wholes
        whole tiles of 128 features move between blocks
        features of L blocks interleave, L a power of two up to 128 that divides K: in particular
        permute_inputs=Stride(K) and permute_outputs=Stride(q), the permutations of Monarch

    XLA copies permuted weights before the kernel, and their gradient after it. Other calls run in
    XLA, with one warning. On a Hopper GPU, kernels must be requested by name, until one has been
    measured: p and q are multiples of 128 up to 512 or so, and permutations are passes over memory.

    Args:
      x: [..., K p], no axis of 0; float32, bfloat16, float16 or float64.
      blocks: [K, p, q] in x's dtype.
      bias: [K q] in x's dtype, added in the outputs' final order.
      permute_inputs, permute_outputs: P_in of K p features and P_out of K q; None: none.
      activation: "gelu" (its tanh form), "relu", "silu" or None. In the backward pass its argument
        is computed again, on chip.
      precision: of the products, as for `jax.numpy.einsum`.
      sharding: how x is laid out on a mesh, over leading axes alone, `NamedSharding(mesh, P(...,
        None))`; each device then works on its rows with all the weights. Needed where the TPU
        kernel runs on a mesh whose axes are of type Auto.
      implementation: None, by the platform for which the program is lowered; or "reference",
        "blockwise" (XLA operations; what CPUs and GPUs get), "tpu", "gpu".

    Returns:
      y [..., K q] in x's dtype.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform.
    """
    check(x, blocks, bias, permute_inputs, permute_outputs, activation, implementation)
    how = _How(permute_inputs, permute_outputs, activation, precision)
    if implementation == "reference":
        return reference(x, blocks, bias, *how)
    found = mesh.rows_layout("block_diagonal_matmul", x, sharding)
    return mesh.over_rows(functools.partial(_local, implementation, how), found, x, blocks, bias)


class _How(NamedTuple):
    """The static arguments."""

    inputs: Stride | Permutation | None
    outputs: Stride | Permutation | None
    activation: str | None
    precision: jax.lax.PrecisionLike


def _local(implementation, how, x, blocks, bias):
    y = _matmul(implementation, how, x.reshape(-1, x.shape[-1]), blocks, bias)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation, how, x, blocks, bias):
    return _run("forward", implementation, how, x, blocks, bias)


def _forward(implementation, how, *arrays):
    return _run("forward", implementation, how, *arrays), arrays


def _backward(implementation, how, arrays, dy):
    found = _run("backward", implementation, how, *arrays, dy)
    pairs = zip(found, arrays, strict=True)
    return tuple(None if a is None else d.astype(a.dtype) for d, a in pairs)


_matmul.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(direction, implementation, how, *arrays):
    """`forward` of x, blocks, bias, or `backward` of those and dy, of an implementation."""
    x, blocks = arrays[:2]
    call = lambda module, *arrays, **more: getattr(module, direction)(*arrays, *how, **more)  # noqa: E731
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    modules = [("tpu", "tpu", tpu)]
    if implementation == "gpu":
        modules.append(("cuda", "gpu", gpu))
    kernels = {}
    for platform, name, module in modules:
        reason = module.unsupported(x, blocks, *how[:3], direction == "backward")
        if dispatch.manual(arrays):
            reason = "inside shard_map a kernel needs check_vma=False"
        kernels[platform] = dispatch.Kernel(name, functools.partial(call, module), reason)
    return dispatch.choose(
        "block_diagonal_matmul", implementation, arrays, on_cpu, elsewhere, kernels
    )
