"""Attention of a few new tokens to a cache of keys and values, ragged, paged or contiguous."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
