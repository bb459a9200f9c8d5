"""Kernels for TPU and GPU in Pallas, one folder an op, and the laboratory that proves them.

An op is imported from its folder, whose name it has:

    from pallas_kernels.attention import attention
    from pallas_kernels.block_diagonal_matmul import block_diagonal_matmul
    from pallas_kernels.block_sparse_matmul import BlockMask, block_sparse_matmul
    from pallas_kernels.butterfly_matmul import butterfly_matmul
    from pallas_kernels.decode_attention import decode_attention
    from pallas_kernels.monarch_matmul import monarch_matmul
    from pallas_kernels.shared_prefix_attention import Level, shared_prefix_attention
"""
