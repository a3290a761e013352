"""Small tokenizers for tests, made through the same files that published models come with."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from models.tokenizer import Tokenizer, load_tokenizer

BOS, EOS = 256, 257
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '<bos>assistant\\n' }}{% endif %}"
)

CORPUS = """The quick brown fox jumps over the lazy dog. It's a fine day, isn't it? We'll see.
def add(first, second):
    return first + second  # the sum of the two numbers, 12 and 345
Ein Löwe sprach: «Über allen Gipfeln ist Ruh». Ça va très bien, merci. 日本語の文章です。
The weather today is fine and the numbers are 1, 22, 333 and 4444. for i in range(100): print(i)
"""
PIECES = [
    *("Hello", " world", "it's", "WE'LL", " don't", "isn't'", "naïve café", "日本語の文章"),
    *("😀👩\u200d👧", "e\u0301", "\n", "\n\n", "  ", " ", "\t", " \n ", "\r\n", "1", "12", " 3456"),
    *("   def f(x):\n        return x+1", "3.14159", "a1b2", "¼½", "!!!", "...", "==", " /*", "//"),
    *("{}[]", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im", "<", "\u2581", "Ġ", "\u00a0"),
    *("\u200b", "\x00", "مرحبا", "สวัสดี", "ÀÉÎ", "CamelCase"),
]


def varied_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts that tokenizers disagree on, and `count` random strings of their pieces."""
    draw = random.Random(seed)
    texts = [*PIECES, "", CORPUS, *CORPUS.splitlines()]
    return texts + ["".join(draw.choices(PIECES, k=draw.randint(2, 9))) for _ in range(count)]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]


def added_token(token_id: int, content: str, *, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def byte_level(**settings: Any) -> dict[str, Any]:
    defaults = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel", **defaults, **settings}


def put_first(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, text],
        "pair": [text],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def byte_tokenizer_json() -> dict[str, Any]:
    """tokenizer.json of a vocabulary of the 256 bytes, <bos> and <eos>; <bos> comes first."""
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    return {
        "version": "1.0",
        "added_tokens": [added_token(BOS, "<bos>"), added_token(EOS, "<eos>")],
        "pre_tokenizer": byte_level(),
        "post_processor": put_first("<bos>", BOS),
        "decoder": byte_level(),
        "model": {"type": "BPE", "vocab": {**vocab, "<bos>": BOS, "<eos>": EOS}, "merges": []},
    }


def write_byte_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with a chat template, into `directory`."""
    (directory / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    config = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def byte_tokenizer(vocab_size: int = 258) -> Tokenizer:
    """Tokens 0 to 255 are the bytes, 256 is <bos>, 257 is <eos>; ids up to `vocab_size` are empty.

    Encoding puts <bos> first. `vocab_size` is at least 258.
    """
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name))
        (Path(name) / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        return load_tokenizer(Path(name))


def ends_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """How the tokens that begin and end a text are written, "" where there is none."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    bos, eos = ("" if i is None else tokenizer.decode([i], skip_special_tokens=False) for i in ids)
    return bos, eos
