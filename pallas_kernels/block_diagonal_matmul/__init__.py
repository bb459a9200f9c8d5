"""Products with block-diagonal matrices, permutations of features folded in."""

from pallas_kernels.block_diagonal_matmul.api import block_diagonal_matmul
from pallas_kernels.block_diagonal_matmul.permutation import Permutation, Stride

__all__ = ["Permutation", "Stride", "block_diagonal_matmul"]
