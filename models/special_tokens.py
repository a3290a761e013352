"""The special tokens that a model's files name, as a chat template finds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.messages import quoted
from models.model_files import find_json

# The names that every model may use, and what a GGUF file calls them.
_ROLES = {
    "bos_token": ("bos",),
    "eos_token": ("eos",),
    "unk_token": ("unknown",),
    "sep_token": ("separator", "seperator"),  # the second is how the format has spelled it
    "pad_token": ("padding",),
    "cls_token": ("cls",),
    "mask_token": ("mask",),
}
# A SentencePiece model without other files is one of the Llama family.
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def special_tokens(path: Path, gguf_metadata: Mapping[str, object] | None = None) -> dict[str, str]:
    """Text by name ("bos_token", "pad_token", ...) of each special token that is named.

    Read from tokenizer_config.json and special_tokens_map.json of a model directory in the order
    of Hugging Face, or from a GGUF file's metadata; also names of the model's own, such as
    "image_token". Raises ValueError where a token is neither a string nor an object with a content.
    """
    if gguf_metadata is not None:
        return _gguf_tokens(gguf_metadata)
    named: dict[str, Any] = {}
    if not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file():
        named.update(_SENTENCEPIECE)
    named.update(find_json(path, "tokenizer_config.json"))
    # The older way, which files of the newer one may still come with.
    if "added_tokens_decoder" not in named:
        named.update(find_json(path, "special_tokens_map.json"))
    own = named.get("extra_special_tokens")
    own = own if isinstance(own, dict) else {}
    tokens = {}
    for name, value in {**named, **own}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and (name.endswith("_token") or name in own):
            tokens[name] = text
        elif value is not None and name in _ROLES:
            raise ValueError(
                f"{path}: {name} is {quoted(value)}, expected a string or an object with a "
                "content; correct tokenizer_config.json or special_tokens_map.json"
            )
    return tokens


def _gguf_tokens(metadata: Mapping[str, object]) -> dict[str, str]:
    texts = metadata.get("tokenizer.ggml.tokens")
    tokens: dict[str, str] = {}
    for name, roles in _ROLES.items():
        for role in roles:
            token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
            # Some files have an id beyond the vocabulary where there is no such token.
            if isinstance(texts, list) and type(token_id) is int and 0 <= token_id < len(texts):
                tokens.setdefault(name, str(texts[token_id]))
    return tokens
