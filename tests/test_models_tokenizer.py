"""Byte-level tokenizer.json: ids equal to Hugging Face, bytes that add up to the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tokenizers_for_tests import (
    BOS,
    CORPUS,
    EOS,
    byte_tokenizer,
    byte_tokenizer_json,
    ends_of,
    varied_texts,
    write_byte_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from models.config import MAX_VOCAB_SIZE
from models.tokenizer import load_tokenizer

BYTES = byte_tokenizer()


def trained_bpe() -> dict[str, Any]:
    """A byte-level BPE trained on CORPUS, as tokenizer.json, with a BOS and a plain added token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>", "<|im_start|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS.splitlines(), trainer)
    backend.add_tokens(["<think é>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec


def write(directory: Path, spec: Any, config: dict[str, Any] | None = None) -> Path:
    (directory / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_byte_level_equals_hugging_face(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    tokenizer = load_tokenizer(write(tmp_path, trained_bpe(), config))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert ends_of(tokenizer) == ("<s>", "</s>")
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == len(reference)
    for text in [*varied_texts(200), "<think é>x", "a<s>b</s>"]:
        for add in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=add)
            assert ids == reference.encode(text, add_special_tokens=add), repr(text)
        if "é>" not in text:  # Hugging Face passes added tokens through its byte alphabet
            for skip in (True, False):
                assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                ), repr(text)
    assert tokenizer.decode(tokenizer.encode("<think é>x")) == "<think é>x"


def test_bos_comes_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, trained_bpe(), {"bos_token": "<s>"}))
    ids = tokenizer.encode("Hello")
    assert ids[0] == 0 and ids.count(0) == 1
    assert tokenizer.encode("<s>Hello") == ids
    assert tokenizer.encode("Hello", add_special_tokens=False) == ids[1:]
    assert tokenizer.encode("") == [0]


def test_byte_tokenizer_and_padded_vocabulary(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(vocab_size=300)
    assert tokenizer.encode("hé<eos>") == [BOS, *"hé".encode(), EOS]
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tokenizer.token_bytes(BOS) == tokenizer.token_bytes(299) == b""
    assert tokenizer.decode([104, 299, EOS, 105], skip_special_tokens=False) == "h<eos>i"
    assert (tokenizer.vocab_size, byte_tokenizer().vocab_size) == (300, 258)
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in 0 to 299"):
            tokenizer.token_bytes(wrong)
        with pytest.raises(ValueError, match=f"token id {wrong}"):
            tokenizer.decode([104, wrong])
    write_byte_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode("a") == [BOS, 97]


@settings(max_examples=50)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    tokenizer = BYTES
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unpaired_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="unpaired surrogate at character 1"):
        byte_tokenizer().encode("a\ud800")


def changed(**parts: Any) -> dict[str, Any]:
    return {**byte_tokenizer_json(), **parts}


MALFORMED = {
    "cut": "{",
    "no object": "[]",
    "empty": "",
    "no model": changed(model=None),
    "no vocab": changed(model={"type": "BPE", "merges": []}),
    "empty vocab": changed(added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []}),
    "merge of unknown tokens": changed(
        model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}
    ),
    "absurd id": changed(model={"type": "BPE", "vocab": {"a": MAX_VOCAB_SIZE}, "merges": []}),
    "no decoder": changed(decoder=None),
    "WordPiece": changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "odd strip": changed(
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "Strip", "content": "x", "start": 1, "stop": 0},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tokenizer_json(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(write(tmp_path, MALFORMED[name]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"tokenizer_config\.json: is not valid JSON"),
        ("[1]", r"tokenizer_config\.json: holds a JSON list, expected an object"),
        ('{"eos_token": "<missing>"}', "eos_token is '<missing>', which is no token"),
        ('{"bos_token": 3}', "bos_token is 3"),
    ],
)
def test_malformed_config(tmp_path: Path, config: str, message: str) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="needs its metadata"):
        load_tokenizer(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="no tokenizer found"):
        load_tokenizer(tmp_path / "missing")
