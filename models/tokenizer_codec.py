"""What every kind of tokenizer is reduced to: one encoding function and a table of bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from models.messages import cause_of

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Codec:
    """Text to ids, and ids to bytes.

    `encode` parses special tokens written in the text and adds none of its own. `contents[i]` is
    what token i stands for, special tokens included; b"" where the id has no token.
    """

    encode: Callable[[str], list[int]]
    contents: tuple[bytes, ...]
    special_ids: frozenset[int]
    # SentencePiece puts a space before the text it encodes, so decoding takes one off again.
    is_leading_space_dropped: bool
    # The tokens, by id, that are found in a text before anything else is done with it, and how to
    # encode where some of these are written in another way, those named "" in none.
    whole: Mapping[int, str] = field(default_factory=dict)
    encode_renamed: Callable[[str, Mapping[int, str]], list[int]] | None = None

    def find(self, text: str) -> int | None:
        """The token that is written `text`, a special one before others; None without any."""
        content = text.encode("utf-8", "surrogatepass")
        found = next((i for i in sorted(self.special_ids) if self.contents[i] == content), None)
        return self.contents.index(content) if found is None and content in self.contents else found


@dataclass(frozen=True)
class AddedToken:
    """A token that a checkpoint adds to, or marks in, the vocabulary of its tokenizer.

    `options` are lstrip, rstrip, single_word and normalized, as far as the file says them.
    """

    content: str
    is_special: bool
    options: Mapping[str, bool] = field(default_factory=dict)


def any_of(texts: Iterable[str]) -> str:
    """A regular expression that finds the longest of these texts; of none, it matches nowhere."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


class LibraryErrors(AbstractContextManager[None]):
    """Turns whatever a tokenizer library raises into a ValueError that begins with `message`.

    What they raise is no closed set: bare `Exception`s, and for a panic in Rust an exception that
    is no `Exception` and has no public name.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            assert error is not None
            raise ValueError(f"{self._message}: {cause_of(error)}") from error


def byte_level_bytes(token: str) -> bytes:
    """Bytes of one token of a byte-level vocabulary, where each byte is one printable character.

    A token with a character outside that alphabet is taken literally, as in Hugging Face.
    """
    try:
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8")


def sentencepiece_bytes(piece: str, has_byte_tokens: bool) -> bytes:
    """Bytes of one SentencePiece piece: `<0x0A>` is that byte, a lower one eighth block a space."""
    byte = _BYTE_TOKEN.fullmatch(piece) if has_byte_tokens else None
    if byte is not None:
        return bytes([int(byte.group(1), 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def _byte_of_char() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: byte for byte in printable}
    # Characters that are no part of the alphabet must not pass for the byte of the same number.
    table.update(dict.fromkeys(others, 0x10FFFF))
    table.update({0x100 + n: byte for n, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
