"""Attention by blocks: masks, implementations for CPU, TPU and GPU, and exact merging."""

from pallas_kernels.attention import masks, patterns
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.masks import (
    BlockPattern,
    Causal,
    Full,
    Heads,
    Mask,
    Prefix,
    Sinks,
    Stride,
    Window,
)
from pallas_kernels.attention.merge import merge

__all__ = [
    "BlockPattern",
    "Causal",
    "Full",
    "Heads",
    "Mask",
    "Prefix",
    "Sinks",
    "Stride",
    "Window",
    "attention",
    "masks",
    "merge",
    "patterns",
]
