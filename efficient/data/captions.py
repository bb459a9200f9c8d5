"""Images with captions: three handwritten digits side by side, and words that name them.

Of the 1,000 triples of digits a fifth, fixed, is held out, and so is a fifth of the pictures of
each digit. So an evaluation shows new pictures of combinations that were never named in training.
"""

import numpy as np

from efficient.data.generated import require
from efficient.data.pipeline import SPLITS, Example, source, spec_of
from efficient.data.vision import digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of {} then {} then {}",
    "from left to right {} {} {}",
    "this picture shows the {} {} {}",
)
WORDS = sorted({*DIGITS, *(w for t in TEMPLATES for w in t.split() if w != "{}")})
LENGTH = 8  # words of the longest template; the others are filled up in front
FILL = len(WORDS)


def tokens_of(triple: int, template: int) -> np.ndarray:
    """int32 [8]: the words of a template that names the digits of `triple`, 0 to 999."""
    names = [DIGITS[int(d)] for d in f"{triple:03d}"]
    words = [WORDS.index(word) for word in TEMPLATES[template].format(*names).split()]
    return np.array([FILL] * (LENGTH - len(words)) + words, np.int32)


def triples_of(split: str) -> np.ndarray:
    """The triples of a split, 800 or 200 of the numbers 0 to 999."""
    order = np.random.default_rng(0).permutation(1000)
    return order[800:] if split == "eval" else order[:800]


class Captions:
    """See `captions`."""

    def __init__(self, split: str, size: int, seed: int):
        pictures = digits(split)
        images = np.stack([pictures[i]["image"] for i in range(len(pictures))])
        labels = np.array([pictures[i]["label"] for i in range(len(pictures))])
        self._pictures = [images[labels == digit] for digit in range(10)]
        self._triples, self._size = triples_of(split), size
        self._seed = (seed, SPLITS.index(split))
        self.facts = {
            "num_classes": 1000,
            "image_size": (8, 24),
            "channels": 1,
            "vocab_size": len(WORDS) + 1,
            "length": LENGTH,
        }
        self.spec = spec_of(self[0])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((*self._seed, index))
        triple = int(rng.choice(self._triples))
        parts = [self._pictures[int(d)] for d in f"{triple:03d}"]
        image = np.concatenate([p[rng.integers(len(p))] for p in parts], axis=1)
        tokens = tokens_of(triple, int(rng.integers(len(TEMPLATES))))
        return {"image": image, "tokens": tokens, "label": np.array(triple, np.int32)}


@source("captions")
def captions(
    split: str, *, train_size: int = 50_000, eval_size: int = 1_000, seed: int = 0
) -> Captions:
    """Three of scikit-learn's digits beside each other, with a caption.

    Examples: image float32 [8, 24, 1] in [0, 1]; tokens int32 [8]; label int32 [], the three digits
    as a number.
    """
    size = train_size if split == "train" else eval_size
    require(size > 0, f"data.{split}_size={size} must be 1 or more")
    require(seed >= 0, f"data.seed={seed} must be 0 or more")
    return Captions(split, size, seed)
