"""What tokenizer_config.json says beside a tokenizer.json: as transformers 5 reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import check_words, refusal
from tokenizers_for_tests import (
    EOS,
    added_token,
    byte_level,
    byte_tokenizer_json,
    ends_of,
    put_first,
)
from transformers import AutoTokenizer

from models.tokenizer import Tokenizer, load_tokenizer

PLAIN = 258


def spec_with(**parts: Any) -> dict[str, Any]:
    """The byte tokenizer with one more added token, <plain>, that is not special."""
    spec = byte_tokenizer_json()
    spec["added_tokens"].append(added_token(PLAIN, "<plain>", special=False))
    return {**spec, **parts}


def write(directory: Path, spec: dict[str, Any], config: dict[str, Any]) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def entry(content: str, special: bool, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, "special": special, **plain, **flags}


TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n", "a<tool> b", " <tool>", "<tool>", "x<strip>  y",
    "<plain>", "a<plain>  b", "<eos><|im_end|>", "no tokens at all",
]  # fmt: skip


def check_as_in_transformers(directory: Path, texts: list[str]) -> Tokenizer:
    ours, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == reference.encode(text, add_special_tokens=add), text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            ), text
    return ours


def test_tokens_that_only_the_configuration_knows(tmp_path: Path) -> None:
    added = {
        "261": entry("<tool>", False, lstrip=True),
        "259": entry("<|im_start|>", True),
        "260": entry("<|im_end|>", True),
        "262": entry("<strip>", True, rstrip=True),
        "257": entry("<eos>", True),
        "263": {"content": "<short>"},
    }
    write(tmp_path, spec_with(), {"eos_token": "<|im_end|>", "added_tokens_decoder": added})
    tokenizer = check_as_in_transformers(tmp_path, [*TEXTS, "a<short>b"])
    assert tokenizer.encode("<|im_start|>x<|im_end|>", add_special_tokens=False) == [259, 120, 260]
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (260, 264)
    assert tokenizer.special_ids == {256, 257, 259, 260, 262}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"normalized": True}], ids=str)
def test_tokens_that_both_files_know(tmp_path: Path, special: bool, flags: dict[str, bool]) -> None:
    added = {
        "257": entry("<eos>", special, **flags),
        "258": entry("<plain>", special, **flags),
    }
    write(tmp_path, spec_with(), {"added_tokens_decoder": added})
    check_as_in_transformers(tmp_path, TEXTS)


def test_a_token_of_the_vocabulary_becomes_a_whole_one(tmp_path: Path) -> None:
    spec = byte_tokenizer_json()
    spec["model"]["vocab"]["<|im_end|>"] = 258
    write(tmp_path, spec, {"added_tokens_decoder": {"258": entry("<|im_end|>", True)}})
    assert check_as_in_transformers(tmp_path, TEXTS).special_ids == {256, 257, 258}


def test_a_token_without_a_text_is_passed_over(tmp_path: Path) -> None:
    added = {"259": entry("<|im_end|>", True), "9999": entry("", True), "7": entry("", True)}
    write(tmp_path, spec_with(), {"added_tokens_decoder": added})
    tokenizer = check_as_in_transformers(tmp_path, TEXTS)
    assert (tokenizer.vocab_size, tokenizer.special_ids) == (260, {256, 257, 259})


@pytest.mark.parametrize("token_id", ["258", "260", "9"])
def test_an_id_that_the_files_do_not_agree_on(tmp_path: Path, token_id: str) -> None:
    added = {token_id: entry("<|im_end|>", True)}
    write(tmp_path, spec_with(), {"added_tokens_decoder": added})
    message = refusal(load_tokenizer, tmp_path)
    check_words(message, "tokenizer.json", "'<|im_end|>'", f"id {token_id} in", "259 here")


@pytest.mark.parametrize(
    "entries",
    [
        {"x": {"content": "y"}},
        {"-1": {"content": "y"}},
        {"1": {}},
        {"1": "y"},
        {"1": {"content": ["y"]}},
        {"1": {"content": "\ud800"}},
        {"1": {"content": "y" * 9000, "special": "no\n" * 9000}},
        {"1": {"content": "y", "lstrip": [1]}},
        [3],
        "text",
        5,
    ],
    ids=lambda entries: str(entries)[:40].encode("ascii", "replace").decode(),
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_malformed_entries(tmp_path: Path, entries: Any, name: str) -> None:
    write(tmp_path, spec_with(), {"added_tokens_decoder": entries})
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").rename(tmp_path / name)
    check_words(refusal(load_tokenizer, tmp_path), "added_tokens_decoder must map ids to tokens")


@pytest.mark.parametrize("value", [["<eos>"], [["<eos>"]], {"content": ["<eos>"]}, 7, {"a": 1e9}])
@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_token_that_is_no_text(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, spec_with(), {name: value})
    if isinstance(value, dict) and "content" not in value:
        assert load_tokenizer(tmp_path).eos_token_id is None
    else:
        check_words(refusal(load_tokenizer, tmp_path), f"{name} is ", "no token of the vocabulary")


ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["<eos>", EOS],
    "cls": ["<bos>", 256],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize(
    "first", [None, put_first("<bos>", 256), put_first("<eos>", EOS), byte_level(), ROBERTA],
    ids=["none", "bos", "eos", "byte-level", "roberta"],
)  # fmt: skip
@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("bos", [None, "<bos>", "<eos>"])
def test_who_adds_bos(
    tmp_path: Path, first: dict[str, Any] | None, add: bool | None, bos: str | None
) -> None:
    """The post-processor of tokenizer.json does, whatever add_bos_token says."""
    config = {"bos_token": bos, "add_bos_token": add}
    named = {key: value for key, value in config.items() if value is not None}
    write(tmp_path, spec_with(post_processor=first), named)
    ours, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.encode("a")
    # A prompt is there to be continued, so nothing is put behind it.
    assert ours.encode("a") == expected[: expected.index(97) + 1]
    if bos is not None:
        assert ends_of(ours)[0] == reference.bos_token == bos


@pytest.mark.parametrize("value", ["false", 0, [True]], ids=str)
def test_add_bos_token_must_be_a_truth_value(tmp_path: Path, value: Any) -> None:
    write(tmp_path, spec_with(), {"add_bos_token": value})
    (tmp_path / "tokenizer.json").unlink()
    from test_models_tokenizer_spm import trained_spm

    (tmp_path / "tokenizer.model").write_bytes(trained_spm())
    check_words(refusal(load_tokenizer, tmp_path), "add_bos_token is", "expected true or false")
