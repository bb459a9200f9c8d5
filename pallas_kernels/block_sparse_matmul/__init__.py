"""x W where W has blocks by a static mask, beside a low-rank term."""

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.mask import BlockMask

__all__ = ["BlockMask", "block_sparse_matmul"]
