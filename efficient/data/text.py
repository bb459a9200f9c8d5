"""Text: Python's own standard library, or any file or folder; and the bigram baseline.

Held-out text is whole files (about 5% of them, chosen by a hash of the relative path, so that
adding a file moves no other), or the end of the text where there is a single file.
"""

import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np

from efficient.data.packing import pack
from efficient.data.pipeline import Source, source
from efficient.data.tokenizers import make_tokenizer
from efficient.errors import UserError

_HELD_OUT = 0.05

# Packages that every distribution of CPython ships, and whose files it leaves as they are:
# left out are those that Debian and others split off, patch or generate (tkinter, idlelib,
# turtledemo, lib2to3, ensurepip, venv, distutils, test), and the tables in `encodings` and
# `pydoc_data`, which are hardly text.
_STDLIB_PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http"),
    *("importlib", "json", "logging", "multiprocessing", "pathlib", "re", "sqlite3", "string"),
    *("tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo"),
)
_STDLIB_SKIPPED = (
    *("site.py", "sysconfig.py", "sitecustomize.py", "usercustomize.py", "turtle.py"),
    "_distutils_system_mod.py",
)
# Below ctypes, Debian strips macholib; tests are not always installed.
_STDLIB_SKIPPED_FOLDERS = {"test", "tests", "macholib", "__pycache__"}


@source("stdlib")
def stdlib(split: str, *, length: int, tokenizer: str = "bytes", packing: str = "stream") -> Source:
    """The running Python's standard library (about 7 MB): a corpus that is always at hand.

    The same for every installation of the same Python version, apart from patches that a
    distribution makes; `facts["digest"]` tells two corpora apart.

    Args:
      split: 'train' or 'eval'.
      length: tokens of an example, T.
      tokenizer: 'bytes', or the path of a Hugging Face tokenizer.json.
      packing: 'stream' or 'documents', see `efficient.data.packing`.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = _held_out_by_file(root, _stdlib_files(root), split)
    return _make(documents, split, length, tokenizer, packing, "the standard library")


@source("text")
def text(
    split: str,
    *,
    path: str,
    length: int,
    glob: str = "**/*.txt",
    tokenizer: str = "bytes",
    packing: str = "stream",
) -> Source:
    """A file, or the files in a folder.

    Args:
      split: 'train' or 'eval'.
      path: a file, or a folder.
      length: tokens of an example, T.
      glob: which files below a folder.
      tokenizer: 'bytes', or the path of a Hugging Face tokenizer.json.
      packing: 'stream' or 'documents', see `efficient.data.packing`.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return _make([_held_out_end(root, split)], split, length, tokenizer, packing, path)
    if not root.is_dir():
        raise UserError(f"no file or folder at data.path={path}")
    files = sorted(p.relative_to(root).as_posix() for p in root.glob(glob) if p.is_file())
    if not files:
        raise UserError(f"no file in the folder {path} matches data.glob={glob!r}")
    if len(files) == 1:
        documents = [_held_out_end(root / files[0], split)]
    else:
        documents = _held_out_by_file(root, files, split)
    return _make(documents, split, length, tokenizer, packing, path)


def _make(
    documents: list[bytes], split: str, length: int, tokenizer: str, packing: str, what: str
) -> Source:
    encoder = make_tokenizer(tokenizer)
    ending = np.array([] if encoder.eos is None else [encoder.eos], np.int32)
    ids = [np.concatenate([encoder.encode(document), ending]) for document in documents]
    num_bytes, num_tokens = sum(map(len, documents)), sum(map(len, ids))
    facts = {
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.name,
        "bytes_per_token": num_bytes / max(num_tokens, 1),
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "digest": hashlib.sha256(b"".join(documents)).hexdigest()[:16],
    }
    return pack(packing, ids, length, facts, f"the {split} split of {what}")


def _stdlib_files(root: Path) -> list[str]:
    """Relative paths of the corpus, sorted."""
    modules = [
        path.name
        for path in root.glob("*.py")
        if path.name not in _STDLIB_SKIPPED and not path.name.startswith("_sysconfigdata")
    ]
    in_packages = [
        path.relative_to(root)
        for package in _STDLIB_PACKAGES
        for path in (root / package).rglob("*.py")
    ]
    kept = [p.as_posix() for p in in_packages if not _STDLIB_SKIPPED_FOLDERS & set(p.parts)]
    return sorted(modules + kept)


def _held_out_by_file(root: Path, files: list[str], split: str) -> list[bytes]:
    """Contents of the files of `split`; of two files or more, each split gets at least one."""
    rank = {f: int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big") for f in files}
    held_out = {f for f in files if rank[f] < _HELD_OUT * 2**64}
    held_out = held_out or {min(files, key=rank.get)}
    if len(held_out) == len(files):
        held_out.remove(max(files, key=rank.get))
    return [(root / f).read_bytes() for f in files if (f in held_out) == (split == "eval")]


def _held_out_end(file: Path, split: str) -> bytes:
    """The file up to the last line end before 95% of it, or the rest."""
    content = file.read_bytes()
    cut = int(len(content) * (1 - _HELD_OUT))
    cut = content.rfind(b"\n", 0, cut) + 1 or cut
    return content[cut:] if split == "eval" else content[:cut]


_COUNTED = 4096  # examples at a time; a count goes over 65,536 sums, however few the tokens


def bigram_bits_per_byte(train: Source, held_out: Source, add: float = 0.1) -> float:
    """Bits per byte of an add-k smoothed bigram model: the baseline beside which to show a model.

    The model p(b | a) = (n(a, b) + k) / (n(a) + 256 k) counts the (token, target) pairs of
    `train`; it is scored on exactly the pairs of `held_out`, those that an evaluation of the
    whole source covers.

    Args:
      train: a source of bytes.
      held_out: a source of bytes.
      add: k > 0.
    """
    for of in (train, held_out):
        if of.facts.get("tokenizer") != "bytes":
            raise UserError("the bigram baseline is of bytes: set data.tokenizer='bytes'")
    counts = _pair_counts(train)
    probability = (counts + add) / (counts.sum(1, keepdims=True) + 256 * add)
    scored = _pair_counts(held_out)
    return float(-(scored * np.log(probability)).sum() / (scored.sum() * math.log(2)))


def _pair_counts(source: Source) -> np.ndarray:
    """How often byte b follows byte a, float64 [256, 256]."""
    counts = np.zeros(256 * 256)
    for start in range(0, len(source), _COUNTED):
        examples = [source[i] for i in range(start, min(start + _COUNTED, len(source)))]
        pairs = np.concatenate([e["tokens"] * 256 + e["targets"] for e in examples])
        weights = None
        if "weights" in examples[0]:
            weights = np.concatenate([e["weights"] for e in examples])
        counts += np.bincount(pairs, weights, minlength=256 * 256)
    return counts.reshape(256, 256)
