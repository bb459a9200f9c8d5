"""Products with Monarch matrices: two block-diagonal factors and a stride permutation, one pass."""

from pallas_kernels.monarch_matmul.api import monarch_matmul

__all__ = ["monarch_matmul"]
