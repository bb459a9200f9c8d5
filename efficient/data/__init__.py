"""Sources, tokenizers and generated tasks, read through Grain with exact resume."""

from efficient.data import captions, listops, pathfinder, poisson, synthetic, text, vision
from efficient.data.pipeline import (
    Batches,
    Source,
    batches,
    eval_batches,
    make_source,
    source,
    source_names,
)

__all__ = [
    "Batches",
    "Source",
    "batches",
    "captions",
    "eval_batches",
    "listops",
    "make_source",
    "pathfinder",
    "poisson",
    "source",
    "source_names",
    "synthetic",
    "text",
    "vision",
]
