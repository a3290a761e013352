"""SentencePiece models, as a file and inside GGUF metadata: ids equal to the library's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers_for_tests import CORPUS, added_token, ends_of, varied_texts
from transformers import PreTrainedTokenizerFast

from models.tokenizer import load_tokenizer


def trained_spm(**options: Any) -> bytes:
    """A SentencePiece model like Llama's: BPE, byte fallback, text left as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{
            "vocab_size": 420,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 0.99,
            "user_defined_symbols": ["<tool>"],
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def spm() -> bytes:
    return trained_spm()


def gguf_of(processor: Any, **changes: object) -> dict[str, object]:
    ids = range(processor.get_piece_size())
    kinds = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in ids]
    types[processor.piece_to_id("<tool>")] = 4
    metadata = {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": np.array([processor.get_score(i) for i in ids], dtype=np.float32),
        "token_type": np.array(types, dtype=np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def spm_texts() -> list[str]:
    return [text for text in varied_texts(300) if "\x00" not in text]


def plain(text: str) -> str:
    """SentencePiece cannot tell its own mark for a space from a space."""
    return text.replace("\u2581", " ")


def test_model_file_and_gguf_equal_sentencepiece(tmp_path: Path, spm: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm)
    (tmp_path / "tokenizer.model").write_bytes(spm)
    from_file = load_tokenizer(tmp_path)
    from_gguf = load_tokenizer(tmp_path / "m.gguf", gguf_of(processor))
    for tokenizer in (from_file, from_gguf):
        assert tokenizer.vocab_size == processor.get_piece_size()
        assert tokenizer.special_ids == {0, 1, 2}
        assert (ends_of(tokenizer)[0], tokenizer.bos_token_id) == ("<s>", 1)
        for text in [*spm_texts(), "a<tool>b", " <tool>"]:
            expected = processor.encode(text)
            assert tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)
            assert tokenizer.encode(text) == [1, *expected]
            assert tokenizer.decode(expected) == processor.decode(expected) == plain(text)
    assert from_gguf.eos_token_id == 2


def test_sentencepiece_without_dummy_space(tmp_path: Path) -> None:
    model = trained_spm(add_dummy_prefix=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    (tmp_path / "tokenizer.model").write_bytes(model)
    metadata = gguf_of(processor, add_space_prefix=False, add_bos_token=False)
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "m", metadata)):
        for text in [" a", "a", *spm_texts()[:50]]:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == processor.encode(text)
            assert tokenizer.decode(ids) == plain(text)
    assert load_tokenizer(tmp_path / "m", metadata).encode("") == []


def test_unigram_model_file(tmp_path: Path) -> None:
    model = trained_spm(model_type="unigram", vocab_size=350)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(tmp_path)
    for text in spm_texts()[:100]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == plain(text)


def test_special_tokens_in_sentencepiece_text(tmp_path: Path, spm: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm)
    size = processor.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(spm)
    added = {
        str(size + 1): {"content": "<|im_start|>", "special": True},
        str(size): {"content": "<t>"},
    }
    config = {"bos_token": "<s>", "eos_token": "<|im_start|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<s>Hello</s><|im_start|>you<t>")
    hello, you = processor.encode("Hello"), processor.encode("you")
    assert ids == [1, *hello, 2, size + 1, *you, size]
    assert tokenizer.decode(ids) == "Hello you<t>"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<s> Hello</s>")
    assert tokenizer.eos_token_id == size + 1
    assert tokenizer.vocab_size == size + 2


def llama2_json(processor: Any) -> dict[str, Any]:
    """tokenizer.json as Llama 2 has it: the same merges, ranked by the scores of their results."""
    size = processor.get_piece_size()
    vocab = {processor.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, token_id in vocab.items():
        if token_id < 3 + 256 or piece == "<tool>":
            continue
        for at in range(1, len(piece)):
            if piece[:at] in vocab and piece[at:] in vocab:
                merges.append((-processor.get_score(token_id), piece[:at], piece[at:]))
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    bos = {"id": "<s>", "type_id": 0}
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, processor.id_to_piece(i)) for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prefix, spaces]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in sorted(merges)],
        },
    }


def test_tokenizer_json_equals_tokenizer_model(tmp_path: Path, spm: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm)
    (tmp_path / "tokenizer.model").write_bytes(spm)
    from_model = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama2_json(processor)))
    from_json = load_tokenizer(tmp_path)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [t for t in spm_texts() if t] + ["<s>Hi</s>you"]:
        ids = from_json.encode(text)
        assert ids == from_model.encode(text), repr(text)
        if not text.startswith("<s>"):
            assert ids == reference.encode(text)
        expected = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert from_json.decode(ids) == from_model.decode(ids) == expected
    assert from_json.is_leading_space_dropped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "scores has 1 entries for 420 tokens"),
        ({"scores": None}, "scores must be an array of numbers, got nothing"),
        ({"scores": [float("nan")] * 420}, "scores must be finite"),
        ({"token_type": [9] * 420}, "token_type must be 1 to 6"),
        ({"token_type": [1] * 420}, "not a readable SentencePiece model"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_malformed_sentencepiece_metadata(
    spm: bytes, changes: dict[str, object], message: str
) -> None:
    metadata = gguf_of(sentencepiece.SentencePieceProcessor(model_proto=spm), **changes)
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        load_tokenizer(Path("m.gguf"), metadata)


@pytest.mark.parametrize("data", [b"", b"junk", b"\x0a\x05"], ids=["empty", "junk", "cut"])
def test_malformed_tokenizer_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a readable SentencePiece"):
        load_tokenizer(tmp_path)


def test_an_added_token_with_an_absurd_id(tmp_path: Path, spm: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {"99999999": {"content": "y"}}}))
    with pytest.raises(ValueError, match="token ids must be 0 to"):
        load_tokenizer(tmp_path)
