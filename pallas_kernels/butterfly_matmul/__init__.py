"""Products of butterfly factors: log2(n) sparse matrices, each of pairs at one stride."""

from pallas_kernels.butterfly_matmul.api import butterfly_matmul

__all__ = ["butterfly_matmul"]
