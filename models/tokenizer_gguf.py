"""The tokenizer inside a GGUF file, from the file's `tokenizer.ggml.*` metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from models.messages import quoted
from models.tokenizer_codec import AddedToken, Codec, LibraryErrors
from models.tokenizer_json import codec_of
from models.tokenizer_spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    codec_from_spm,
    serialise_bpe,
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """What `tokenizer.ggml.pre` stands for, as the families' own tokenizer.json say it."""

    split: str | None = None  # None: GPT-2's pattern, which the backend has built in
    is_digit_split: bool = False
    is_nfc: bool = False
    # A stretch that is itself a token stays whole, whatever the merges would make of it.
    is_merge_ignored: bool = False
    is_bos_added: bool = False  # unless the file says otherwise


_GPT2_LIKE = _PreTokenizer()
_LLAMA3_LIKE = _PreTokenizer(_LLAMA3, is_merge_ignored=True, is_bos_added=True)
_QWEN2_LIKE = _PreTokenizer(_QWEN2, is_nfc=True)
PRE_TOKENIZERS = {
    "default": _GPT2_LIKE,
    "gpt-2": _GPT2_LIKE,
    "smollm": _PreTokenizer(is_digit_split=True),
    "llama-bpe": _LLAMA3_LIKE,
    "llama3": _LLAMA3_LIKE,
    "llama-v3": _LLAMA3_LIKE,
    "qwen2": _QWEN2_LIKE,
    "deepseek-r1-qwen": _QWEN2_LIKE,
    "tekken": _PreTokenizer(_TEKKEN, is_merge_ignored=True, is_bos_added=True),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says about its tokenizer."""

    codec: Codec
    bos_token_id: int | None
    eos_token_id: int | None
    is_bos_added: bool


def read_gguf_tokenizer(metadata: Mapping[str, object], source: str) -> GgufTokenizer:
    """The tokenizer that `metadata` describes; `source` names the file in errors.

    Raises ValueError for an unknown kind or pre-tokenizer, missing or unequal arrays, wrong types.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        codec, is_bos_added = _byte_level(metadata, source)
    elif kind == "llama":
        codec, is_bos_added = _sentencepiece(metadata, source), True
    else:
        raise ValueError(
            f"{source}: tokenizer.ggml.model is {quoted(kind)}, expected 'gpt2' (byte-level BPE) "
            "or 'llama' (SentencePiece)"
        )
    size = len(codec.contents)
    return GgufTokenizer(
        codec=codec,
        bos_token_id=_token_id(metadata, "bos", size, source),
        eos_token_id=_token_id(metadata, "eos", size, source),
        is_bos_added=_flag(metadata, "add_bos_token", is_bos_added, source),
    )


def _byte_level(metadata: Mapping[str, object], source: str) -> tuple[Codec, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre is {quoted(name)}, expected one of "
            f"{sorted(PRE_TOKENIZERS)}"
        )
    tokens = _strings(metadata, "tokens", source)
    merges = _strings(metadata, "merges", source)
    types = _numbers(metadata, "token_type", len(tokens), source, missing=NORMAL)
    added = {
        token_id: AddedToken(tokens[token_id], kind != USER_DEFINED, {"normalized": False})
        for token_id, kind in enumerate(types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    # A token may itself begin with a space, never contain one further on.
    pairs = [_split_merge(merge, source) for merge in merges]
    steps: list[PreTokenizer] = []
    if pre.split is not None:
        steps = [Split(Regex(pre.split), "isolated")]
    elif pre.is_digit_split:
        steps = [Digits(individual_digits=True)]
    steps.append(ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    with LibraryErrors(f"{source}: not a readable tokenizer.json"):
        backend = Backend(BPE(vocab, pairs, ignore_merges=pre.is_merge_ignored))
    backend.pre_tokenizer = Sequence(steps)
    backend.decoder = ByteLevelDecoder()
    if pre.is_nfc:
        backend.normalizer = NFC()
    codec, _ = codec_of(backend, source, added)
    unused = {token_id for token_id, kind in enumerate(types) if kind == UNUSED}
    contents = tuple(
        b"" if token_id in unused else content for token_id, content in enumerate(codec.contents)
    )
    return replace(codec, contents=contents), pre.is_bos_added


def _split_merge(merge: str, source: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise ValueError(f"{source}: merge {quoted(merge)} is not two tokens with a space between")
    return merge[:at], merge[at + 1 :]


def _sentencepiece(metadata: Mapping[str, object], source: str) -> Codec:
    tokens = _strings(metadata, "tokens", source)
    scores = _numbers(metadata, "scores", len(tokens), source)
    types = [int(kind) for kind in _numbers(metadata, "token_type", len(tokens), source)]
    if not all(math.isfinite(score) and abs(score) < 1e38 for score in scores):
        raise ValueError(f"{source}: tokenizer.ggml.scores must be finite 32-bit numbers")
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise ValueError(f"{source}: tokenizer.ggml.token_type must be {NORMAL} to {BYTE}")
    model = serialise_bpe(
        tokens,
        scores,
        types,
        has_dummy_prefix=_flag(metadata, "add_space_prefix", True, source),
        has_byte_tokens=BYTE in types,
    )
    return codec_from_spm(model, source)


def _strings(metadata: Mapping[str, object], name: str, source: str) -> list[str]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{source}: {key} must be an array of strings, got {_shown(value)}")
    if name == "tokens" and len(set(value)) != len(value):
        raise ValueError(f"{source}: {key} lists a token twice")
    return value


def _numbers(
    metadata: Mapping[str, object],
    name: str,
    length: int,
    source: str,
    missing: float | None = None,
) -> list[float]:
    """An array of `length` numbers, given as a list or a numpy array; `missing` fills in for it."""
    key = f"tokenizer.ggml.{name}"
    value: Any = metadata.get(key)
    if value is None and missing is not None:
        return [missing] * length
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        raise ValueError(f"{source}: {key} must be an array of numbers, got {_shown(value)}")
    if len(value) != length:
        raise ValueError(f"{source}: {key} has {len(value)} entries for {length} tokens")
    return value


def _token_id(metadata: Mapping[str, object], role: str, size: int, source: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    try:
        token_id = int(str(value))
    except ValueError:
        raise ValueError(f"{source}: {key} must be a token id, got {_shown(value)}") from None
    if not 0 <= token_id < size:
        raise ValueError(f"{source}: {key} is {quoted(token_id)}, expected 0 to {size - 1}")
    return token_id


def _flag(metadata: Mapping[str, object], name: str, missing: bool, source: str) -> bool:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key, missing)
    if str(value) not in ("True", "False"):
        raise ValueError(f"{source}: {key} must be true or false, got {_shown(value)}")
    return bool(value)


def _shown(value: object) -> str:
    return "nothing" if value is None else quoted(value)
