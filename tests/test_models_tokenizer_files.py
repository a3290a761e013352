"""Tokenizer files from strangers: where they may lie, and what they may cost."""

from __future__ import annotations

import base64
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from refusals import check_words, refusal
from test_models_tokenizer_spm import trained_spm
from tokenizers_for_tests import byte_tokenizer_json, write_byte_tokenizer

from models.tokenizer import load_tokenizer

NAMES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"]


def folder(path: Path) -> Path:
    """A model's folder with every file that a tokenizer is read from."""
    path.mkdir(parents=True)
    write_byte_tokenizer(path)
    for name in NAMES[2:]:
        (path / name).write_text("{}")
    (path / "tokenizer.model").write_bytes(trained_spm())
    return path


def without_json(path: Path, name: str) -> None:
    """So that tokenizer.model is what is read."""
    if name == "tokenizer.model":
        (path / "tokenizer.json").unlink()
        (path / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("name", [*NAMES, "tokenizer.model"])
def test_files_must_lie_inside_the_model(tmp_path: Path, name: str) -> None:
    model = folder(tmp_path / "model")
    without_json(model, name)
    load_tokenizer(model)
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    check_words(refusal(load_tokenizer, model), name, "is a link to", "outside")
    # In the hub's cache the files of a snapshot are links to the repository's blobs.
    snapshot = folder(tmp_path / "models--a--b" / "snapshots" / "1")
    without_json(snapshot, name)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    (snapshot / name).rename(blobs / "x")
    (snapshot / name).symlink_to("../../blobs/x")
    load_tokenizer(snapshot)


@pytest.mark.parametrize("name", [*NAMES, "tokenizer.model"])
def test_files_must_be_regular_and_of_bounded_length(tmp_path: Path, name: str) -> None:
    model = folder(tmp_path / "model")
    without_json(model, name)
    (model / name).unlink()
    with (model / name).open("wb") as file:
        file.truncate(1 << 40)
    check_words(refusal(load_tokenizer, model), name, "bytes, expected at most")
    (model / name).unlink()
    os.mkfifo(model / name)
    refusal(load_tokenizer, model)
    (model / name).unlink()
    (model / name).mkdir()
    check_words(refusal(load_tokenizer, model), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000, '{"a":' * 50_000]
)
def test_json_that_is_none(tmp_path: Path, name: str, text: str) -> None:
    model = folder(tmp_path / "model")
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    check_words(refusal(load_tokenizer, model), name)


@pytest.mark.parametrize("key", ["eos_token", "added_tokens_decoder"])
def test_messages_quote_little_of_a_file(tmp_path: Path, key: str) -> None:
    model = folder(tmp_path / "model")
    for value in ("a\nb\x1b[2J" * 9000, [["x\n" * 9000]], {"content": "\u202e" * 9000}):
        (model / "tokenizer_config.json").write_text(json.dumps({key: value}))
        check_words(refusal(load_tokenizer, model), f"{key} ")


# What the library does not survive, or answers with an exception of its own.


def load(directory: Path, **parts: Any) -> Any:
    directory.mkdir(exist_ok=True)
    spec = {**byte_tokenizer_json(), **parts}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(directory)


def charsmap(trie_bytes: int, trie: bytes = b"", texts: bytes = b"") -> dict[str, Any]:
    data = struct.pack("<I", trie_bytes) + trie + texts
    text = base64.b64encode(data).decode()
    return {"type": "Precompiled", "precompiled_charsmap": text}


@pytest.mark.parametrize(
    "normalizer",
    [
        charsmap(0xFFFFFFFC),  # the library would reserve 8 GiB, and end the process
        charsmap(8, b"\0" * 4),
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": ""},
        {"type": "Precompiled", "precompiled_charsmap": "no base64!"},
        {"type": "Precompiled", "precompiled_charsmap": [1, 2]},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, charsmap(0xFFFFFFFC)]},
        {"precompiled_charsmap": charsmap(0xFFFFFFFC)["precompiled_charsmap"]},
    ],
    ids=["huge", "cut", "short", "empty", "no base64", "list", "nested", "no type"],
)
def test_a_broken_character_map(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    check_words(refusal(load, tmp_path, normalizer=normalizer), "precompiled_charsmap")


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def steps(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(normalizers)}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("a", "b" * 300),
        replace("", "b" * 300),
        replace("a*", "b" * 300, "Regex"),
        steps(*[replace("a", "aaaaaaaaaa")] * 30),
        steps(*[steps(replace("a", "aaaaaaaaaa"))] * 30),
        steps(*[{"type": "ByteLevel"}] * 40),
        {"type": "Prepend", "prepend": "a" * 300},
        charsmap(4, b"\0" * 4, b"a\0" + b"b" * 300 + b"\0"),
    ],
    ids=["long", "empty", "regex", "chain", "nested", "bytes", "prepend", "map"],
)
def test_a_normalizer_that_multiplies_the_text(tmp_path: Path, normalizer: dict[str, Any]) -> None:
    message = refusal(load, tmp_path, normalizer=normalizer)
    check_words(message, "tokenizer.json", "more than 256 times as long")


def test_normalizers_of_published_tokenizers_pass(tmp_path: Path) -> None:
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    spaces = replace(" ", "\u2581")
    longest = charsmap(4, b"\0" * 4, b"\xef\xb7\xba" * 11 + b"\0")  # as in nmt_nfkc
    runs = replace(" {2,}", "\u2581", "Regex")
    for normalizer in (
        steps(prefix, spaces),
        steps(longest, {"type": "Strip", "strip_left": True, "strip_right": True}, runs),
        steps({"type": "NFKD"}, {"type": "Lowercase"}, prefix, spaces),
    ):
        assert load(tmp_path, normalizer=normalizer).vocab_size == 258


def regex_split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


WORDS = {"vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
FAILING = {
    "exploding pattern": {"pre_tokenizer": regex_split("(x+x+)+y")},
    "exploding replacement": {"normalizer": replace("(x+x+)+y", "z", "Regex")},
    "a map's trie points beyond its end": {"normalizer": charsmap(4, b"\xff\xff\xff\x7f")},
    "WordPiece without its unknown token": {
        "model": {
            "type": "WordPiece",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            **WORDS,
        }
    },
    "WordLevel without its unknown token": {"model": {"type": "WordLevel", **WORDS}},
    "Unigram without an unknown token": {
        "model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}
    },
    "BPE without its unknown token": {"model": {"type": "BPE", "merges": [], **WORDS}},
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_while_encoding(tmp_path: Path, name: str) -> None:
    tokenizer = load(tmp_path, **FAILING[name])
    message = refusal(tokenizer.encode, "x" * 60)
    check_words(message, "tokenizer.json", "cannot encode the text")
    # It may be used again: nothing hangs on the failure.
    refusal(tokenizer.encode, "x" * 60)


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": regex_split("(")},
        {"normalizer": steps(*[{"type": "NFC"}] * 3, {"type": "no such"})},
        {"model": {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", -1.0]]}},
        {"model": {"type": "BPE", "vocab": {"x\n" * 9000: "y"}, "merges": []}},
        {"decoder": {"type": "Metaspace", "replacement": "xyz\n" * 9000}},
        {"decoder": {"type": "CTC", "pad_token": "a\n" * 9000, "cleanup": True,
                     "word_delimiter_token": "|"}},
    ],
    ids=["regex", "normalizer", "unigram", "vocab", "replacement", "decoder"],
)  # fmt: skip
def test_what_the_library_refuses(tmp_path: Path, parts: dict[str, Any]) -> None:
    check_words(refusal(load, tmp_path, **parts), "tokenizer.json")


def test_a_normalizer_as_deep_as_json_allows(tmp_path: Path) -> None:
    text = json.dumps(byte_tokenizer_json())[:-1]
    for depth in (100, 300, 450, 3000):
        nested = '{"type":"Sequence","normalizers":[' * depth + "]}" * depth
        (tmp_path / "tokenizer.json").write_text(f'{text},"normalizer":{nested}}}')
        check_words(refusal(load_tokenizer, tmp_path), "tokenizer.json")


def test_interrupting_is_no_failure_of_the_library(tmp_path: Path) -> None:
    from models.tokenizer_codec import LibraryErrors

    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), LibraryErrors("x"):
            raise error
    for raised in (MemoryError, RecursionError, Exception, TypeError):
        with pytest.raises(ValueError, match=r"^x: "), LibraryErrors("x"):
            raise raised
