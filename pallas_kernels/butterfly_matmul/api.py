"""butterfly_matmul: the public function, its derivative, its dispatch and its layout."""

import functools

import jax

from pallas_kernels import dispatch, mesh
from pallas_kernels.butterfly_matmul import blockwise, gpu, tpu
from pallas_kernels.butterfly_matmul.checks import check
from pallas_kernels.butterfly_matmul.reference import reference


def butterfly_matmul(
    x: jax.Array,
    twiddle: jax.Array,
    *,
    increasing: bool = True,
    precision: jax.lax.PrecisionLike = None,
    sharding: jax.sharding.NamedSharding | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The product of x with log2(n) butterfly factors.

    A factor of stride s works on pairs of features, or of blocks of b features, at distance s:

        y[(2 d + i) s + t] = sum over j of twiddle[stage, d s + t, i, j] x[(2 d + j) s + t]

    for t < s; in the block form the entries are matrices [b, b] and x has blocks, as columns.
    Strides are 1, 2, ... n / 2, or the other way round. This is the layout of the authors' code
    (github.com/HazyResearch/butterfly, torch_butterfly/multiply.py, and, for blocks,
    github.com/HazyResearch/fly, src/models/layers/block_butterfly_multiply.py), one stack and one
    block of factors of it; several are several calls. A fast Fourier transform is one, of complex
    factors, after a bit reversal (arXiv 1903.05895, 2112.00029 for blocks).

    Reverse-mode derivatives in x and twiddle. Sums are in float32 (float64 for float64). Factors of
    neighbouring strides are multiplied with each other first, in float32, and then rounded to x's
    dtype: fewer and larger products of matrices. By XLA they make blocks of up to 32 features.

    On a TPU, one kernel each way reads x and writes y once. Scalar factors become the two factors
    of a Monarch matrix, for n from 256 to 16,384. Block factors need b a power of two and n b a
    multiple of 128; stages within 128 lanes are merged into one matrix. Both need float32 or
    bfloat16, at least 128 rows on a device, and weights that fit on the chip. On a Hopper GPU,
    scalar factors become a Monarch matrix too, for n from 256 to 32,768; kernels for block factors,
    b 128 or 256, must be requested by name, until they have been measured. Other calls run in XLA,
    with one warning.

    Args:
      x: [..., n b], no axis of 0, n a power of two; float32, bfloat16, float16, float64, complex64
        or complex128.
      twiddle: [log2(n), n / 2, 2, 2] or [log2(n), n / 2, 2, 2, b, b] in x's dtype: stage, pair, row
        (output) and column (input) of the pair, row and column of the block.
      increasing: whether strides increase from the first factor applied to the last.
      precision: of the products, as for `jax.numpy.einsum`.
      sharding: how x is laid out on a mesh, over leading axes alone, `NamedSharding(mesh, P(...,
        None))`; each device then works on its rows with all the factors. Needed where the TPU
        kernel runs on a mesh whose axes are of type Auto.
      implementation: None, by the platform for which the program is lowered; or "reference" (a
        factor at a time), "blockwise" (XLA operations), "tpu", "gpu".

    Returns:
      y [..., n b] in x's dtype.

    Raises:
      ValueError: an argument that does not fit, named with the accepted forms; a kernel asked for
        by name that cannot do this or, when lowered, is for another platform.
    """
    check(x, twiddle, increasing, implementation)
    if twiddle.ndim == 4:
        twiddle = twiddle[..., None, None]
    if implementation == "reference":
        return reference(x, twiddle, increasing, precision)
    found = mesh.rows_layout("butterfly_matmul", x, sharding)
    compute = functools.partial(_local, implementation, (increasing, precision))
    return mesh.over_rows(compute, found, x, twiddle)


def _local(implementation, how, x, twiddle):
    return _matmul(implementation, how, x.reshape(-1, x.shape[-1]), twiddle).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation, how, x, twiddle):
    return _run("forward", implementation, how, x, twiddle)


def _forward(implementation, how, *arrays):
    return _run("forward", implementation, how, *arrays), arrays


def _backward(implementation, how, arrays, dy):
    found = _run("backward", implementation, how, *arrays, dy)
    return tuple(d.astype(a.dtype) for d, a in zip(found, arrays, strict=True))


_matmul.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(direction, implementation, how, *arrays):
    """`forward` of x and twiddle, or `backward` of those and dy, of an implementation."""
    call = lambda module, *arrays, **more: getattr(module, direction)(*arrays, *how, **more)  # noqa: E731
    on_cpu = functools.partial(call, blockwise, platform="cpu")
    elsewhere = functools.partial(call, blockwise, platform="accelerator")
    kernels = {}
    modules = [("tpu", "tpu", tpu)]
    if implementation == "gpu" or arrays[1].shape[-1] == 1:
        modules.append(("cuda", "gpu", gpu))
    for platform, name, module in modules:
        reason = module.unsupported(*arrays[:2], how[0], direction == "backward")
        if dispatch.manual(arrays):
            reason = "inside shard_map a kernel needs check_vma=False"
        kernel = functools.partial(call, module)
        if module is tpu and arrays[1].shape[-1] == 1:  # a Monarch product's kernels
            kernel = dispatch.by_example(kernel)
        kernels[platform] = dispatch.Kernel(name, kernel, reason)
    return dispatch.choose("butterfly_matmul", implementation, arrays, on_cpu, elsewhere, kernels)
