"""Blocks of one size are pruned, and what is left is quantized to 8 bits.

For "An Efficient Sparse Inference Software Accelerator for Transformer-based Language Models on
CPUs", Shen et al. 2023, arXiv 2306.16601; the arithmetic is in `efficient.linears.sparse_int8`.

- `block_prune` masks the blocks of the smallest weights of dense layers, and training goes on under
  the mask. Applied again at a higher sparsity it prunes further, so that phases prune gradually.
- `sparse_int8` turns pruned layers into live 8-bit blocks, for inference.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from efficient.errors import UserError, check_finite
from efficient.init import ONES
from efficient.linears.dense import Dense
from efficient.linears.matmul import dense
from efficient.linears.sparse_int8 import SparseInt8, entries_of, live_blocks, pack
from efficient.model import Arrays, modules, replace
from efficient.papers import Claim, Paper
from efficient.registry import register
from efficient.scope import Context, buffer
from efficient.surgery.common import carry, former_path, matching


class PrunedLinear(nnx.Module):
    """A dense layer of which each column of blocks keeps `live` blocks."""

    def __init__(self, base: Dense, block: tuple[int, int], live: int):
        rows, columns = base.kernel.shape
        self.base, self.block, self.live = base, block, live
        self.mask = buffer((rows // block[0], columns // block[1]), ONES, jnp.bool_)

    def __call__(self, x: Float[Array, "*B I"], context: Context) -> Float[Array, "*B O"]:
        del context
        bias = None if self.base.bias is None else self.base.bias[...]
        return dense(x, self.materialize(), bias)

    def flops(self) -> int:
        """Floating-point operations a token; under a mask zeros are multiplied too."""
        return self.base.flops()

    def materialize(self) -> Float[Array, "I O"]:
        """The matrix of y = x W + b with the pruned blocks at 0."""
        kernel = self.base.kernel[...]
        return kernel * entries_of(self.mask[...], self.block).astype(kernel.dtype)


@register("surgery", "block_prune")
class BlockPrune:
    """Masks the blocks of a dense layer whose entries' sizes sum to least.

    Each column of blocks loses as many, whatever it holds, so that all are alike.

    Args:
      at: which dense layers, a pattern of whole paths.
      sparsity: the share of blocks that goes, of all; rounded so that a column keeps one at least.
      block: inputs and outputs of a block.
    """

    def __init__(self, *, at: str, sparsity: float = 0.8, block: list[int] | None = None):
        if not 0 <= sparsity < 1:
            raise UserError(f"block_prune: sparsity={sparsity} must be from 0 to below 1")
        self.at, self.sparsity = at, sparsity
        self.block = tuple(block or (4, 16))
        if len(self.block) != 2 or min(self.block) < 1:
            raise UserError(f"block_prune: block={block} must be two numbers, [inputs, outputs]")

    def apply(self, model: nnx.Module) -> None:
        for path, layer in matching(model, self.at, lambda m: isinstance(m, Dense | PrunedLinear)):
            if path.endswith("/base"):  # the inside of one that is wrapped already
                continue
            base = layer.base if isinstance(layer, PrunedLinear) else layer
            _check_divides(path, base.kernel.shape, self.block)
            rows = base.kernel.shape[0] // self.block[0]
            live = max(1, round((1 - self.sparsity) * rows))
            if layer is not base and (layer.block != self.block or layer.live < live):
                raise UserError(
                    f"block_prune: {path} has {layer.live} of {rows} blocks {list(layer.block)}"
                    f" left; go on with block={list(layer.block)} and a higher sparsity"
                )
            replace(model, path, PrunedLinear(base, self.block, live))

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        new = carry(values, model, key)
        for path, layer in modules(model):
            if isinstance(layer, PrunedLinear):
                kernel = new[f"{path}/base/kernel"]
                where = former_path(f"{path}/base/kernel", values)
                check_finite(f"block_prune: {where}", kernel)
                old = values.get(f"{path}/mask")
                if old is not None:  # what is pruned stays so
                    kernel = kernel * entries_of(old, layer.block)
                new[f"{path}/mask"] = live_blocks(kernel, layer.block, layer.live)
        return new


@register("surgery", "sparse_int8")
class ToSparseInt8:
    """Quantizes pruned layers to live blocks of 8 bits, a scale for each output channel.

    Args:
      at: which layers pruned by `block_prune`; by default all.
    """

    def __init__(self, *, at: str = ".*"):
        self.at = at

    def apply(self, model: nnx.Module) -> None:
        for path, layer in matching(model, self.at, lambda m: isinstance(m, PrunedLinear)):
            use_bias = layer.base.bias is not None
            new = SparseInt8(*layer.base.kernel.shape, use_bias, layer.block, layer.live)
            replace(model, path, new)

    def convert(self, values: Arrays, model: nnx.Module, key: Array) -> Arrays:
        moved = dict(values)
        for path, layer in modules(model):
            kernel = values.get(f"{path}/base/kernel")
            if not isinstance(layer, SparseInt8) or kernel is None:
                continue
            check_finite(f"sparse_int8: {path}/base/kernel", kernel)
            packed = pack(kernel, values[f"{path}/mask"], layer.block)
            names = (f"{path}/{name}" for name in ("blocks", "places", "scale"))
            moved |= zip(names, packed, strict=True)
            if layer.bias is not None:
                moved[f"{path}/bias"] = values[f"{path}/base/bias"]
        return carry(moved, model, key)


def _check_divides(path: str, shape: tuple[int, int], block: tuple[int, int]) -> None:
    for size, part, what in zip(shape, block, ("inputs", "outputs"), strict=True):
        if size % part:
            fits = [n for n in range(1, size + 1) if size % n == 0]
            best = min(fits, key=lambda n: abs(n - part))
            raise UserError(
                f"block_prune: blocks of {part} {what} do not divide the {size} of {path}; the"
                f" nearest that do have {best}"
            )


TEST = "tests/papers/test_sparse_cpu_inference.py"
PAPER = Paper(
    slug="sparse_cpu_inference",
    status="equations",
    claims=(
        Claim(
            "Weights are pruned in blocks of one size, the smallest first.",
            f"{TEST}::test_pruned_blocks_are_the_smallest",
            True,
        ),
        Claim(
            "Weights have 8 bits and a scale for each output channel.",
            f"{TEST}::test_quantization_of_output_channels",
            True,
        ),
        Claim(
            "The product of 8-bit live blocks and dense 8-bit activations is exact.",
            f"{TEST}::test_integer_sums_are_exact",
            True,
        ),
        Claim(
            "Dequantizing, bias and activation are fused to it.",
            f"{TEST}::test_epilogue_against_numpy",
            True,
            "one loop over columns of blocks computes them; what XLA makes of it was not inspected."
            " A layer gives it its bias, a feed-forward block its activation too, outside training:"
            " test_the_feed_forward_block_fuses_bias_and_activation",
        ),
        Claim(
            "Bytes and products are in proportion to the live blocks.",
            f"{TEST}::test_bytes_and_flops_are_those_of_live_blocks",
            True,
        ),
        Claim(
            "Up to 5 times faster than oneDNN's dense product, 1.5 times faster than DeepSparse.",
            note="the paper's own kernel; beside XLA's dense product in float32 this form"
            " is 2.6 times as fast at 90% sparsity, median of 32 shapes"
            " (benchmarks/results/sparse_cpu_inference.json)",
        ),
    ),
    source="github.com/intel/intel-extension-for-transformers: kernel_desc/kernel_vnni.md,"
    " 3D_inference.md, postop_injector.md, docs/pruning.md; the paper's abstract",
    departures=(
        "Every column of blocks keeps as many blocks as the others; the authors prune a layer as a"
        " whole.",
        "Activations are quantized symmetrically, by token, at run time; the authors' kernel takes"
        " unsigned bytes with a scale that calibration has set.",
        "Any block size; the authors' is 4 outputs by 1 input, which their instructions ask for.",
        "The product is XLA's, of gathered features; the authors generate a kernel.",
    ),
)
