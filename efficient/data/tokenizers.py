"""Tokenizers: raw bytes, or a Hugging Face `tokenizer.json`."""

from pathlib import Path
from typing import Protocol

import numpy as np

from efficient.errors import UserError, optional

# The end-of-document tokens of common vocabularies, the most specific first.
_EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Text to int32 ids and back. `eos` ends a document, or is None."""

    name: str
    vocab_size: int
    eos: int | None

    def encode(self, text: str | bytes) -> np.ndarray: ...

    def decode(self, ids) -> str: ...


class ByteTokenizer:
    """The bytes themselves: 256 ids, none of them special."""

    name = "bytes"
    vocab_size = 256
    eos = None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes (of the UTF-8 form, for a str) as int32 [T]."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        """Text of `ids`; a byte sequence that is not UTF-8 becomes U+FFFD."""
        return np.asarray(ids, np.uint8).tobytes().decode(errors="replace")


class HFTokenizer:
    """A tokenizer stored as JSON by the `tokenizers` library.

    Attributes:
      name: the path.
      vocab_size: largest id + 1, which exceeds the number of tokens where ids have holes.
      eos: id of the end-of-document token where the vocabulary holds a usual one, else None.

    Raises:
      UserError: there is no such file, or it is no tokenizer.
    """

    def __init__(self, path: str):
        tokenizers = optional("tokenizers", "data")
        if not Path(path).is_file():
            raise UserError(
                f"no tokenizer at {path}: give the path of a Hugging Face tokenizer.json"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exceptions.
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos = next((vocabulary[token] for token in _EOS_TOKENS if token in vocabulary), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids as int32 [T], without special tokens; bytes are read as UTF-8."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids) -> str:
        """Text of `ids`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def make_tokenizer(name: str) -> Tokenizer:
    """'bytes', or the path of a Hugging Face `tokenizer.json`."""
    return ByteTokenizer() if name == "bytes" else HFTokenizer(name)
