"""Attention of many sequences to keys that groups of them share, and to their own."""

from pallas_kernels.shared_prefix_attention.api import Level, shared_prefix_attention

__all__ = ["Level", "shared_prefix_attention"]
