"""SentencePiece models, run by the `sentencepiece` library, as a Codec.

The library itself decides the pieces, also for a GGUF file: its tokens, scores and types are
written back into the model format that the library reads (`sentencepiece_model.proto`), so there
is no second implementation of the merge order to keep equal.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping

from sentencepiece import SentencePieceProcessor

from models.config import MAX_VOCAB_SIZE
from models.tokenizer_codec import (
    AddedToken,
    Codec,
    LibraryErrors,
    any_of,
    sentencepiece_bytes,
)

# Types of a piece; GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def codec_from_spm(
    model: bytes, source: str, added_tokens: Mapping[int, AddedToken] | None = None
) -> Codec:
    """The codec of a serialised SentencePiece model, extended by `added_tokens` (by id).

    Control tokens, the unknown token and added tokens are found in the text first. What lies
    between them is encoded on its own, so each stretch gets the dummy space that the model asks
    for, as in Llama 2's tokenizer.json. Raises ValueError when the library refuses the model.
    """
    if not model:
        raise ValueError(f"{source}: not a readable SentencePiece model: the file is empty")
    with LibraryErrors(f"{source}: not a readable SentencePiece model"):
        processor = SentencePieceProcessor(model_proto=model)
    num_pieces = processor.get_piece_size()
    added = dict(added_tokens or {})
    size = max([num_pieces - 1, *added]) + 1
    if size > MAX_VOCAB_SIZE or min(added, default=0) < 0:
        raise ValueError(f"{source}: token ids must be 0 to {MAX_VOCAB_SIZE - 1}, got {size - 1}")
    contents = [b""] * size
    with LibraryErrors(f"{source}: not a readable SentencePiece model"):
        for token_id in range(num_pieces):
            piece = processor.id_to_piece(token_id)
            if processor.is_control(token_id) or processor.is_unknown(token_id):
                added.setdefault(token_id, AddedToken(piece, is_special=True))
            elif not processor.is_unused(token_id):
                contents[token_id] = sentencepiece_bytes(piece, processor.is_byte(token_id))
        # A dummy space shows as a piece that begins with the space mark, which the text does not.
        pieces = processor.encode("a", out_type=str)
    for token_id, token in added.items():
        contents[token_id] = token.content.encode("utf-8")
    whole = {token_id: token.content for token_id, token in added.items() if token.content}
    return Codec(
        encode=_encoder(processor, whole, source),
        encode_renamed=lambda text, names: _encoder(processor, {**whole, **names}, source)(text),
        whole=whole,
        contents=tuple(contents),
        special_ids=frozenset(i for i, token in added.items() if token.is_special),
        is_leading_space_dropped="".join(pieces).startswith("\u2581"),
    )


def _encoder(
    processor: SentencePieceProcessor, whole: Mapping[int, str], source: str
) -> Callable[[str], list[int]]:
    """Text to ids, whole tokens first, the library for the text between them."""
    whole_ids = {text: token_id for token_id, text in whole.items() if text}
    split = re.compile(f"({any_of(whole_ids)})").split

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        with LibraryErrors(f"{source}: this tokenizer cannot encode the text"):
            for index, part in enumerate(split(text)):
                if index % 2 == 1:
                    ids.append(whole_ids[part])
                elif part:
                    ids.extend(processor.encode(part))
        return ids

    return encode


def serialise_bpe(
    tokens: Iterable[str],
    scores: Iterable[float],
    types: Iterable[int],
    *,
    has_dummy_prefix: bool,
    has_byte_tokens: bool,
) -> bytes:
    """A SentencePiece BPE model of these pieces, without text normalisation (Llama has none)."""
    out = bytearray()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = _field(1, token.encode("utf-8")) + b"\x15" + struct.pack("<f", score)
        out += _field(1, piece + _number(3, kind))
    model_type_bpe = 2
    out += _field(2, _number(3, model_type_bpe) + _number(35, int(has_byte_tokens)))
    normalizer = _field(1, b"identity") + _number(3, int(has_dummy_prefix))
    out += _field(3, normalizer + _number(4, 0) + _number(5, 1))
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Protocol-buffer varint: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
