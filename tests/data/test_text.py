"""Corpora, packings, tokenizers and the bigram baseline."""

import itertools
import math
import sys

import numpy as np
import pytest

from efficient.data import make_source
from efficient.data.packing import pack
from efficient.data.text import bigram_bits_per_byte
from efficient.data.tokenizers import ByteTokenizer, HFTokenizer
from efficient.errors import UserError


def _folder(path, files=40):
    """Files of different lengths, each repeating its own letter pair."""
    rng = np.random.default_rng(0)
    (path / "sub").mkdir()
    contents = {}
    for i in range(files):
        name = f"sub/{i}.txt" if i % 2 else f"{i}.txt"
        contents[name] = bytes(rng.integers(97, 123, size=20 + 7 * i).astype(np.uint8))
        (path / name).write_bytes(contents[name])
    return contents


def _stream(source):
    examples = [source[i] for i in range(len(source))]
    tokens = np.concatenate([e["tokens"] for e in examples])
    return bytes([*tokens, examples[-1]["targets"][-1]])


def test_stream_windows_cover_the_files_of_the_split_once(tmp_path):
    contents = _folder(tmp_path)
    streams = {}
    for split in ("train", "eval"):
        source = make_source("text", split, path=str(tmp_path), length=16)
        for i in range(len(source)):
            np.testing.assert_array_equal(source[i]["tokens"][1:], source[i]["targets"][:-1])
            if i:
                assert source[i - 1]["targets"][-1] == source[i]["tokens"][0]
        streams[split] = _stream(source)
        assert source.facts["num_bytes"] - len(streams[split]) < 16
    whole_files = {
        split: [name for name, text in contents.items() if text in stream]
        for split, stream in streams.items()
    }
    assert not set(whole_files["train"]) & set(whole_files["eval"])
    # A tail shorter than a window may cut the last file of each split.
    assert len(whole_files["train"]) + len(whole_files["eval"]) >= len(contents) - 2
    assert 1 <= len(whole_files["eval"]) <= 8


def test_adding_a_file_moves_no_other(tmp_path):
    contents = _folder(tmp_path)
    before = _stream(make_source("text", "eval", path=str(tmp_path), length=1))
    (tmp_path / "zzz.txt").write_bytes(b"0123456789")
    after = _stream(make_source("text", "eval", path=str(tmp_path), length=1))
    held_out = [text for text in contents.values() if text in before]
    assert held_out
    assert all(text in after for text in held_out)


def test_a_single_file_is_split_by_position(tmp_path):
    file = tmp_path / "one.txt"
    file.write_bytes(b"".join(b"line %04d\n" % i for i in range(1000)))
    train = _stream(make_source("text", "train", path=str(file), length=1))
    held_out = _stream(make_source("text", "eval", path=str(file), length=1))
    assert train + held_out == file.read_bytes()
    assert held_out.startswith(b"line ")
    assert 0.04 < len(held_out) / len(train) < 0.07


def test_two_files_give_both_splits(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 10)
    sizes = [len(make_source("text", s, path=str(tmp_path), length=4)) for s in ("train", "eval")]
    assert sizes == [12, 12]


@pytest.mark.parametrize("length", [1, 7, 32])
def test_documents_are_packed_without_loss_or_leak(length):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 256, size=n) for n in (5, 90, 1, 0, 33, 2, 64, 17, 8, 8, 31)]
    source = pack("documents", documents, length, {"vocab_size": 256}, "the data")
    found = []
    for i in range(len(source)):
        row = source[i]
        real = row["segment_ids"] > 0
        np.testing.assert_array_equal(real, row["weights"] == 1)
        assert not row["tokens"][~real].any()
        assert not row["targets"][~real].any()
        assert not row["positions"][~real].any()
        assert not real[np.argmin(real) :].any() or real.all()
        ids = row["segment_ids"][real]
        np.testing.assert_array_equal(np.unique(ids), np.arange(1, ids.max() + 1))
        for segment in range(1, ids.max() + 1):
            inside = row["segment_ids"] == segment
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            tokens, targets = row["tokens"][inside], row["targets"][inside]
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            found.append((*tokens, targets[-1]))
    expected = [
        tuple(document[start : start + length + 1])
        for document in documents
        for start in range(0, len(document) - 1, length)
    ]
    assert sorted(found) == sorted(expected)


def test_documents_waste_little():
    rng = np.random.default_rng(2)
    documents = [np.zeros(n, int) for n in rng.integers(2, 200, size=500)]
    source = pack("documents", documents, 128, {"vocab_size": 256}, "the data")
    filled = np.mean([source[i]["weights"] for i in range(len(source))])
    assert filled > 0.97


def test_stdlib_splits_share_no_file_and_are_python():
    train = make_source("stdlib", "train", length=128)
    held_out = make_source("stdlib", "eval", length=128)
    assert train.facts["num_bytes"] > 4e6
    assert 0.01 < held_out.facts["num_bytes"] / train.facts["num_bytes"] < 0.1
    text = _stream(held_out)
    assert text.count(b"def ") > 100
    seen = _stream(train)
    pieces = [text[i : i + 500] for i in range(0, len(text) - 500, 10_000)]
    # A few classes stand in two modules of the library.
    assert sum(piece in seen for piece in pieces) <= len(pieces) // 10
    again = make_source("stdlib", "train", length=64, packing="documents")
    assert again.facts["digest"] == train.facts["digest"] != held_out.facts["digest"]


def test_bigram_baseline_equals_a_count_by_hand(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abababac" * 9)
    (tmp_path / "b.txt").write_bytes(b"abcbacab" * 3)
    train, held_out = (
        make_source("text", s, path=str(tmp_path), length=5) for s in ("train", "eval")
    )
    seen, scored = _stream(train), _stream(held_out)
    pairs = list(itertools.pairwise(seen))
    nats = 0.0
    for a, b in itertools.pairwise(scored):
        from_a = sum(first == a for first, _ in pairs)
        nats -= math.log((pairs.count((a, b)) + 0.5) / (from_a + 128))
    bits = nats / (len(scored) - 1) / math.log(2)
    assert bigram_bits_per_byte(train, held_out, add=0.5) == pytest.approx(bits, rel=1e-9)


def test_bigram_baseline_of_uniform_and_of_certain_text():
    rng = np.random.default_rng(0)
    facts = {"vocab_size": 256, "tokenizer": "bytes"}
    noise = pack("stream", [rng.integers(0, 256, 200_000)], 100, facts, "noise")
    cycle = pack("documents", [np.arange(20_000) % 256], 100, facts, "cycle")
    assert bigram_bits_per_byte(noise, noise) == pytest.approx(8, abs=0.4)
    assert bigram_bits_per_byte(cycle, cycle, add=1e-6) < 1e-3
    assert bigram_bits_per_byte(noise, cycle) == pytest.approx(8, abs=1)


@pytest.fixture
def tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the dog and the bird"] * 50, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_tokenizers_round_trip(tokenizer_json):
    text = "the cat, the \u00fcbercat \U0001f431\n\tand the dog"
    for tokenizer in (ByteTokenizer(), HFTokenizer(tokenizer_json)):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
        assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert tokenizer.eos == 0
    assert ByteTokenizer().encode(b"\x00\xff").tolist() == [0, 255]


def test_text_with_a_tokenizer_file(tmp_path, tokenizer_json):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"the cat and dog number {i}" for i in range(30)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    source = make_source(
        "text", "train", path=str(folder), length=8, tokenizer=tokenizer_json, packing="stream"
    )
    tokenizer = HFTokenizer(tokenizer_json)
    tokens = np.concatenate([source[i]["tokens"] for i in range(len(source))])
    documents = tokenizer.decode(tokens).split("<|endoftext|>")[:-1]
    assert len(documents) > 20
    assert set(documents) <= set(texts)
    facts = source.facts
    assert facts["vocab_size"] == tokenizer.vocab_size
    assert facts["bytes_per_token"] == facts["num_bytes"] / facts["num_tokens"] > 1
    with pytest.raises(UserError, match="tokenizer='bytes'"):
        bigram_bits_per_byte(source, source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "/no/such/place", "length": 8}, "no file or folder at data.path"),
        ({"path": "empty", "length": 8}, "matches data.glob='**/*.txt'"),
        ({"path": "a.txt", "length": 999}, "fewer than length + 1 = 1000"),
        ({"path": "a.txt", "length": 0}, "must be at least 1"),
        ({"path": "a.txt", "length": 4, "packing": "docs"}, "'stream' or 'documents'"),
        ({"path": "a.txt", "length": 4, "tokenizer": "/no/tok.json"}, "no tokenizer at"),
        ({"path": "a.txt", "length": 4, "tokenizer": "a.txt"}, "is not a Hugging Face"),
    ],
)
def test_bad_text_is_one_clear_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    with pytest.raises(UserError) as error:
        make_source("text", "train", **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "data"),
    [
        ("tokenizers", {"name": "stdlib", "length": 8, "tokenizer": "tokenizer.json"}),
        ("tensorflow_datasets", {"name": "tfds", "dataset": "mnist"}),
    ],
)
def test_what_only_an_extra_installs_is_named_where_it_is_absent(monkeypatch, package, data):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: pip install -e .\.\[data"):
        make_source(split="train", **data)


def test_empty_documents_are_an_error():
    with pytest.raises(UserError, match="no document of 2 tokens"):
        pack("documents", [np.zeros(1, int)], 4, {"vocab_size": 256}, "the data")
