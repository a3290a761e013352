"""Hugging Face tokenizer.json, run by the `tokenizers` library, as a Codec."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tokenizers import Tokenizer as Backend

from models.tokenizer_codec import MAX_VOCAB_SIZE, Codec, byte_level_bytes, sentencepiece_bytes

_KNOWN_DECODERS = (
    "ByteLevel",
    "Metaspace",
    "Sequence of Replace, ByteFallback, Fuse and Strip of one leading space",
)


def codec_from_json(data: bytes, source: str) -> tuple[Codec, int | None]:
    """The codec of a tokenizer.json, and the token its post-processor puts first (None: none).

    `source` names the file in errors. Raises ValueError when the text is no tokenizer.json, has an
    empty vocabulary, or a decoder whose tokens cannot be turned into bytes one by one.
    """
    try:
        backend = Backend.from_buffer(data)
    except ValueError as error:
        raise ValueError(f"{source}: not a readable tokenizer.json ({error})") from error
    backend.no_truncation()
    backend.no_padding()
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
    added = backend.get_added_tokens_decoder()
    for token_id, added_token in added.items():
        contents[token_id] = added_token.content.encode("utf-8")
    codec = Codec(
        encode=partial(_encode, backend),
        contents=tuple(contents),
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        is_leading_space_dropped=is_leading_space_dropped,
    )
    first = _first_special(_state(backend.post_processor))
    return codec, None if first is None else vocab.get(first)


def _encode(backend: Backend, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


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
        f"{source}: decoder {json.dumps(state)[:200]} is not supported, expected one of: "
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
    if state.get("type") != "TemplateProcessing" or not state["single"]:
        return None
    special = state["single"][0].get("SpecialToken")
    return None if special is None else str(special["id"])
