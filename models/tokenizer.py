"""Text to token ids and back, the same for every kind of tokenizer file.

A model directory is read from tokenizer.json, or else from tokenizer.model (SentencePiece); a GGUF
file from its metadata. All of them become one Codec, so decoding is ours and identical everywhere:
a token is some bytes, a text is its tokens' bytes read as UTF-8.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from models.tokenizer_codec import MAX_VOCAB_SIZE, Codec
from models.tokenizer_gguf import read_gguf_tokenizer
from models.tokenizer_json import codec_from_json
from models.tokenizer_spm import AddedToken, codec_from_spm


class Tokenizer:
    """Encodes and decodes the text of one model. Made by `load_tokenizer`.

    `special_ids` are the tokens that stand for no text. `vocab_size` counts ids and is at least
    the codec's; ids without a token (padding of the model's vocabulary) stand for b"".
    """

    def __init__(
        self,
        codec: Codec,
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        is_bos_added: bool,
        vocab_size: int = 0,
    ) -> None:
        self._codec = codec
        self._is_bos_added = is_bos_added
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.special_ids = codec.special_ids
        self.vocab_size = max(vocab_size, len(codec.contents))
        self.is_leading_space_dropped = codec.is_leading_space_dropped
        self.bos_token = self._written(bos_token_id)
        self.eos_token = self._written(eos_token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in it become their ids.

        With `add_special_tokens` the BOS token comes first where the model's tokenizer adds one,
        and only once: a text that starts with it (as many chat templates do) gets no second one.
        EOS is never added, because a prompt is there to be continued. Raises ValueError when the
        text holds half of a surrogate pair, which has no UTF-8 form.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has an unpaired surrogate at character {error.start}, expected Unicode "
                "text; decode the input with errors='replace'"
            ) from error
        ids = self._codec.encode(text)
        if add_special_tokens and self._is_bos_added and self.bos_token_id is not None:
            return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text; b"" for special tokens and for ids with no token.

        Raises ValueError for an id outside 0 to `vocab_size` - 1.
        """
        content = self._content(token_id)
        return b"" if token_id in self.special_ids else content

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, with special tokens spelled out unless skipped.

        Invalid UTF-8 shows as U+FFFD; a character that is not complete at the end is left out.
        The one space that SentencePiece puts before a text is taken off. Raises ValueError for an
        id outside the vocabulary.
        """
        content = self.token_bytes if skip_special_tokens else self._content
        data = b"".join(map(content, token_ids))
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        return text.removeprefix(" ") if self.is_leading_space_dropped else text

    def _content(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in 0 to {self.vocab_size - 1}")
        contents = self._codec.contents
        return contents[token_id] if token_id < len(contents) else b""

    def _written(self, token_id: int | None) -> str:
        return "" if token_id is None else self._content(token_id).decode("utf-8", "replace")


def load_tokenizer(path: Path, gguf_metadata: Mapping[str, object] | None = None) -> Tokenizer:
    """The tokenizer of a model directory, or of a .gguf file whose metadata has been read.

    Raises ValueError naming the file when there is none, or it is malformed or of an unknown kind.
    """
    if gguf_metadata is not None:
        gguf = read_gguf_tokenizer(gguf_metadata, str(path))
        size = gguf_metadata.get(f"{gguf_metadata.get('general.architecture')}.vocab_size")
        return Tokenizer(
            gguf.codec,
            bos_token_id=gguf.bos_token_id,
            eos_token_id=gguf.eos_token_id,
            is_bos_added=gguf.is_bos_added,
            vocab_size=_checked_vocab_size(size),
        )
    if path.suffix == ".gguf" and not path.is_dir():
        raise ValueError(f"{path}: the tokenizer of a GGUF file needs its metadata, got none")
    json_path, spm_path = path / "tokenizer.json", path / "tokenizer.model"
    config = _read_json(path / "tokenizer_config.json")
    first_id: int | None
    if json_path.is_file():
        codec, first_id = codec_from_json(json_path.read_bytes(), str(json_path))
    elif spm_path.is_file():
        codec = codec_from_spm(spm_path.read_bytes(), str(spm_path), _added_tokens(config, path))
        first_id = _named_id(config, "bos_token", codec, path)
        if first_id is None and b"<s>" in codec.contents:
            first_id = codec.contents.index(b"<s>")
    else:
        raise ValueError(
            f"{path}: no tokenizer found, looked for tokenizer.json and tokenizer.model; copy the "
            "tokenizer's files next to the weights"
        )
    return _from_directory(path, codec, first_id, config)


def _from_directory(
    path: Path, codec: Codec, first_id: int | None, config: Mapping[str, Any]
) -> Tokenizer:
    """`first_id` is the token that the tokenizer itself puts before a text."""
    named = {**_read_json(path / "special_tokens_map.json"), **config}
    bos_token_id = _named_id(named, "bos_token", codec, path)
    is_bos_added = config.get("add_bos_token")
    if is_bos_added is None:
        is_bos_added = first_id is not None
    return Tokenizer(
        codec,
        bos_token_id=first_id if bos_token_id is None else bos_token_id,
        eos_token_id=_named_id(named, "eos_token", codec, path),
        is_bos_added=bool(is_bos_added),
        vocab_size=_padded_vocab_size(path),
    )


def _padded_vocab_size(path: Path) -> int:
    """Models often have more rows than their tokenizer has tokens; 0 when config.json is silent."""
    return _checked_vocab_size(_read_json(path / "config.json").get("vocab_size"))


def _checked_vocab_size(size: object) -> int:
    return size if type(size) is int and 0 <= size <= MAX_VOCAB_SIZE else 0


def _named_id(config: Mapping[str, Any], name: str, codec: Codec, path: Path) -> int | None:
    """The id of a token that `config` names, as a string or as {"content": ...}."""
    value = config.get(name)
    content = value.get("content") if isinstance(value, Mapping) else value
    if content is None:
        return None
    wanted = content.encode("utf-8") if isinstance(content, str) else b""
    # Special tokens first: a plain token may spell the same text.
    for token_id in chain(sorted(codec.special_ids), range(len(codec.contents))):
        if wanted and codec.contents[token_id] == wanted:
            return token_id
    raise ValueError(f"{path}: {name} is {value!r}, which is no token of the vocabulary")


def _added_tokens(config: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: {"32000": {"content": ..., ...}}."""
    entries = config.get("added_tokens_decoder") or {}
    try:
        return {
            int(token_id): AddedToken(str(token["content"]), bool(token.get("special", False)))
            for token_id, token in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: added_tokens_decoder must map ids to tokens with "
            f"a content ({type(error).__name__}: {error})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
