"""Text to token ids and back, the same for every kind of tokenizer file.

A model directory is read from tokenizer.json, or else from tokenizer.model (SentencePiece); a GGUF
file from its metadata. All of them become one Codec, so decoding is ours and identical everywhere:
a token is some bytes, a text is its tokens' bytes read as UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.config_files import known_vocab_size
from models.messages import quoted
from models.model_files import MAX_JSON, find_file, find_json, read_bounded
from models.tokenizer_codec import AddedToken, Codec
from models.tokenizer_gguf import read_gguf_tokenizer
from models.tokenizer_json import codec_from_json
from models.tokenizer_spm import codec_from_spm

_ID = re.compile(r"[0-9]{1,9}")
_SURROGATE = re.compile("[\ud800-\udfff]")  # no text in UTF-8
_TOKEN_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


class Tokenizer:
    """Encodes and decodes the text of one model. Made by `load_tokenizer`.

    `special_ids` are the tokens that stand for no text. `whole` are those, by id, that encoding
    finds in a text before all else, special and others. `first_id` is what encoding puts before a
    text. `vocab_size` counts ids and is at least the codec's; ids without a token (padding of the
    model's vocabulary) stand for b"".
    """

    def __init__(
        self,
        codec: Codec,
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        first_id: int | None = None,
        vocab_size: int = 0,
    ) -> None:
        self._codec = codec
        self._first_id = first_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.special_ids = codec.special_ids
        self.whole = codec.whole
        self.vocab_size = max(vocab_size, len(codec.contents))
        self.is_leading_space_dropped = codec.is_leading_space_dropped

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
        if not add_special_tokens or self._first_id is None or ids[:1] == [self._first_id]:
            return ids
        return [self._first_id, *ids]

    def encode_renamed(self, text: str, names: Mapping[int, str]) -> list[int]:
        """Token ids of `text` where tokens of `whole` have other `names`, by id; "" is none at all.

        Their own texts are ordinary ones then, with the ids they would have if there were no such
        tokens. Nothing comes first. Raises ValueError for a text that cannot be encoded.
        """
        assert self._codec.encode_renamed is not None, "a codec with whole tokens has this"
        return self._codec.encode_renamed(text, names)

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

    def token_id(self, text: str) -> int | None:
        """The token that is written `text`, a special one before others; None without any."""
        return self._codec.find(text)

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`; None where there is none."""
        found = self._codec.find(text)
        return found if found in self.special_ids else None

    def _content(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in 0 to {self.vocab_size - 1}")
        contents = self._codec.contents
        return contents[token_id] if token_id < len(contents) else b""


def load_tokenizer(path: Path, gguf_metadata: Mapping[str, object] | None = None) -> Tokenizer:
    """The tokenizer of a model directory, or of a .gguf file whose metadata has been read.

    Raises ValueError naming the file when there is none, or it is malformed or of an unknown kind,
    over 64 MiB long, or a link out of the model.
    """
    if gguf_metadata is not None:
        return _from_gguf(path, gguf_metadata)
    if path.suffix == ".gguf" and not path.is_dir():
        raise ValueError(f"{path}: the tokenizer of a GGUF file needs its metadata, got none")
    config = find_json(path, "tokenizer_config.json")
    named = find_json(path, "special_tokens_map.json")
    # The map is the older way, and has the last word where there is no newer one, as in
    # transformers; null names nothing.
    is_newer = "added_tokens_decoder" in config
    named |= {
        key: v for key, v in config.items() if v is not None and (is_newer or key not in named)
    }
    added = _added_tokens(config, path)
    json_path, spm_path = find_file(path, "tokenizer.json"), find_file(path, "tokenizer.model")
    if json_path is not None:
        # The post-processor alone says what comes first: transformers reads no add_bos_token here.
        data = read_bounded(json_path, MAX_JSON)
        codec, first_id = codec_from_json(data, str(json_path), added)
        bos_token_id = _named_id(named, "bos_token", codec, path)
        bos_token_id = first_id if bos_token_id is None else bos_token_id
    elif spm_path is not None:
        codec = codec_from_spm(read_bounded(spm_path, MAX_JSON), str(spm_path), added)
        bos_token_id = _named_id(named, "bos_token", codec, path)
        bos_token_id = codec.find("<s>") if bos_token_id is None else bos_token_id
        first_id = bos_token_id if _is_bos_added(config, path) else None
    else:
        raise ValueError(
            f"{path}: no tokenizer found, looked for tokenizer.json and tokenizer.model; copy the "
            "tokenizer's files next to the weights"
        )
    return Tokenizer(
        codec,
        bos_token_id=bos_token_id,
        eos_token_id=_named_id(named, "eos_token", codec, path),
        first_id=first_id,
        # Models often have more rows than their tokenizer has tokens.
        vocab_size=known_vocab_size(find_json(path, "config.json")),
    )


def _from_gguf(path: Path, metadata: Mapping[str, object]) -> Tokenizer:
    gguf = read_gguf_tokenizer(metadata, str(path))
    return Tokenizer(
        gguf.codec,
        bos_token_id=gguf.bos_token_id,
        eos_token_id=gguf.eos_token_id,
        first_id=gguf.bos_token_id if gguf.is_bos_added else None,
        vocab_size=known_vocab_size(metadata),
    )


def _is_bos_added(config: Mapping[str, object], path: Path) -> bool:
    value = config.get("add_bos_token")
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            f"{path / 'tokenizer_config.json'}: add_bos_token is {quoted(value)}, expected true or "
            "false"
        )
    return value is not False


def _named_id(config: Mapping[str, object], name: str, codec: Codec, path: Path) -> int | None:
    """The id of a token that `config` names, as a string or as {"content": ...}."""
    value = config.get(name)
    text = value.get("content") if isinstance(value, Mapping) else value
    found = codec.find(text) if isinstance(text, str) and text else None
    if found is None and text is not None:
        raise ValueError(f"{path}: {name} is {quoted(value)}, which is no token of the vocabulary")
    return found


def _added_tokens(config: Mapping[str, object], path: Path) -> dict[int, AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json: {"32000": {"content": ..., ...}}."""
    entries = config.get("added_tokens_decoder")
    if entries is None:
        return {}
    added = {}
    for key, token in entries.items() if isinstance(entries, dict) else [("", entries)]:
        fields = token if isinstance(token, dict) else {}
        content = fields.get("content")
        flags = {name: value for name, value in fields.items() if name in _TOKEN_FLAGS}
        if (
            not _ID.fullmatch(key)
            or not isinstance(content, str)
            or _SURROGATE.search(content)
            or not all(isinstance(flag, bool) for flag in flags.values())
        ):
            raise ValueError(
                f"{path / 'tokenizer_config.json'}: added_tokens_decoder must map ids to tokens "
                f"with a content, got {quoted(token)} for {quoted(key)}"
            )
        if content:  # the libraries pass over a token without a text
            added[int(key)] = AddedToken(content, flags.pop("special", False), flags)
    return added
