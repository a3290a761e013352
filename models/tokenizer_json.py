"""Hugging Face tokenizer.json, run by the `tokenizers` library, as a Codec."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as BackendToken
from tokenizers import Tokenizer as Backend

from models.config import MAX_VOCAB_SIZE
from models.messages import quoted
from models.model_files import parse_json
from models.tokenizer_codec import (
    AddedToken,
    Codec,
    LibraryErrors,
    byte_level_bytes,
    sentencepiece_bytes,
)

_KNOWN_DECODERS = (
    "ByteLevel",
    "Metaspace",
    "Sequence of Replace, ByteFallback, Fuse and Strip of one leading space",
)
# Times that a normalizer may lengthen a text. Published ones stay below 150, at worst.
_MAX_GROWTH = 256


def codec_from_json(
    data: bytes, source: str, added_tokens: Mapping[int, AddedToken] | None = None
) -> tuple[Codec, int | None]:
    """The codec of a tokenizer.json, and the token its post-processor puts first (None: none).

    `added_tokens` (by id) are put beside those of the file. `source` names the file in errors.
    Raises ValueError when the text is no tokenizer.json, has an empty vocabulary, no place for an
    added token's id, or a decoder whose tokens cannot be turned into bytes one by one.
    """
    _check_normalizer(parse_json(Path(source), data).get("normalizer"), source)
    with LibraryErrors(f"{source}: not a readable tokenizer.json"):
        backend = Backend.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
    return codec_of(backend, source, added_tokens or {})


def codec_of(
    backend: Backend, source: str, added_tokens: Mapping[int, AddedToken]
) -> tuple[Codec, int | None]:
    """What `codec_from_json` returns, of a tokenizer that the library has built; adds to it."""
    special_ids = _add_tokens(backend, added_tokens, source)
    vocab = backend.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"{source}: the vocabulary needs {size} ids, expected 1 to {MAX_VOCAB_SIZE}"
        )
    to_bytes, is_leading_space_dropped = _decoder(_state(backend.decoder), source)
    contents = [b""] * size
    for token, token_id in vocab.items():
        contents[token_id] = to_bytes(token)
    whole = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    for token_id, content in whole.items():
        contents[token_id] = content.encode("utf-8")
    codec = Codec(
        encode=partial(_encode, backend, source),
        encode_renamed=partial(_encode_renamed, backend, source),
        whole=whole,
        contents=tuple(contents),
        special_ids=special_ids,
        is_leading_space_dropped=is_leading_space_dropped,
    )
    first = _first_special(_state(backend.post_processor))
    return codec, None if first is None else vocab.get(first)


def _add_tokens(backend: Backend, added: Mapping[int, AddedToken], source: str) -> frozenset[int]:
    """Adds what the backend does not have yet, in the order of ids; returns all special ones."""
    known = backend.get_added_tokens_decoder()
    tokens = [
        BackendToken(token.content, special=token.is_special, **token.options)
        for _, token in sorted(added.items())
    ]
    with LibraryErrors(f"{source}: cannot take the tokens of added_tokens_decoder"):
        backend.add_tokens(tokens)
    for token_id, token in added.items():
        got = backend.token_to_id(token.content)
        if got != token_id:
            raise ValueError(
                f"{source}: {quoted(token.content)} has id {token_id} in added_tokens_decoder of "
                f"tokenizer_config.json, but {got} here; expected one id, so mend or remove its "
                "entry there"
            )
    # Special in one of the two files is special.
    special = {token_id for token_id, token in known.items() if token.special}
    return frozenset(special | {token_id for token_id, token in added.items() if token.is_special})


def _check_normalizer(normalizer: object, source: str) -> None:
    """Refuse what would make the library ask for more memory than there is, which ends a process.

    Every step multiplies the length of a text, at worst.
    """
    growth, todo = 1, [normalizer]
    while todo:
        step = todo.pop()
        if isinstance(step, list):
            todo.extend(step)
        elif isinstance(step, dict):
            growth = min(growth * _step_growth(step, source), _MAX_GROWTH + 1)
            todo.extend(step.values())
    if growth > _MAX_GROWTH:
        raise ValueError(
            f"{source}: its normalizer can make a text more than {_MAX_GROWTH} times as long; "
            "do not use this tokenizer"
        )


def _step_growth(step: Mapping[str, Any], source: str) -> int:
    """How many bytes a normalizer's step can make of one; Unicode's own tables are no matter."""
    if "precompiled_charsmap" in step:
        return _longest_replacement(step["precompiled_charsmap"], source)
    if isinstance(step.get("prepend"), str):
        return 1 + _num_bytes(step["prepend"])
    if "pattern" in step and isinstance(step.get("content"), str):
        pattern, num_bytes = step["pattern"], _num_bytes(step["content"])
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(1, -(-num_bytes // _num_bytes(literal)))
        return 1 + num_bytes  # a regular expression may match nothing, before every byte
    return 2 if step.get("type") in ("ByteLevel", "BertNormalizer") else 1


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _longest_replacement(charsmap: object, source: str) -> int:
    """Bytes of the longest text in SentencePiece's character map: the size of a trie in 4 bytes,
    the trie, and the texts that it points to, each with a zero behind it.

    The library reserves what the size says before it looks how long the map is.
    """
    try:
        data = base64.b64decode(charsmap if isinstance(charsmap, str) else "", validate=True)
    except ValueError:
        data = b""
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or end > len(data):
        raise ValueError(
            f"{source}: the normalizer's precompiled_charsmap is cut short or no base64; "
            "download the model again"
        )
    return max(1, *map(len, data[end:].split(b"\0")))


def _encode(backend: Backend, source: str, text: str) -> list[int]:
    with LibraryErrors(f"{source}: this tokenizer cannot encode the text"):
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def _encode_renamed(
    backend: Backend, source: str, text: str, names: Mapping[int, str]
) -> list[int]:
    """Takes a moment more than `_encode`: the vocabulary is shared, the added tokens are not."""
    renamed = Backend(backend.model)
    if backend.normalizer is not None:
        renamed.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        renamed.pre_tokenizer = backend.pre_tokenizer
    tokens = {}
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
        token.content = names.get(token_id, token.content)
        if token.content:
            tokens[token_id] = token
    renamed.add_tokens(list(tokens.values()))
    ids = {renamed.token_to_id(token.content): token_id for token_id, token in tokens.items()}
    return [ids.get(token_id, token_id) for token_id in _encode(renamed, source, text)]


def _state(component: Any) -> dict[str, Any]:
    """The JSON a component of the backend was made from; {} for a missing one."""
    if component is None:
        return {}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _decoder(state: Mapping[str, Any], source: str) -> tuple[Callable[[str], bytes], bool]:
    """How one token becomes bytes, and whether a leading space is dropped."""
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes, False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == "\u2581":
        is_dropped = steps[0].get("prepend_scheme", "always") != "never"
        return partial(sentencepiece_bytes, has_byte_tokens=False), is_dropped
    if "Replace" in kinds and all(_is_sentencepiece_step(step) for step in steps):
        has_byte_tokens = "ByteFallback" in kinds
        return partial(sentencepiece_bytes, has_byte_tokens=has_byte_tokens), "Strip" in kinds
    raise ValueError(
        f"{source}: decoder {quoted(state)} is not supported, expected one of: "
        + "; ".join(_KNOWN_DECODERS)
    )


def _is_sentencepiece_step(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Replace":
        return (step["pattern"], step["content"]) == ({"String": "\u2581"}, " ")
    if step.get("type") == "Strip":
        return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    return step.get("type") in ("ByteFallback", "Fuse")


def _first_special(state: Mapping[str, Any]) -> str | None:
    """The special token that a post-processor puts before the text, if it puts one."""
    if state.get("type") == "Sequence":
        firsts = (_first_special(step) for step in state["processors"])
        return next((first for first in firsts if first is not None), None)
    if "cls" in state:  # BertProcessing and RobertaProcessing: [token, id]
        return str(state["cls"][0])
    if state.get("type") != "TemplateProcessing" or not state["single"]:
        return None
    special = state["single"][0].get("SpecialToken")
    return None if special is None else str(special["id"])
