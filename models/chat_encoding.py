"""Conversations as token ids, in which nobody but the chat template writes special tokens.

A template joins what the messages say and special tokens into one text, and there a special token
is no more than the characters it is written with: a user can write them as well, and so begin a
turn of another role. Hence, before the template sees the messages, the signs that such tokens are
made of (`<`, `|`, ...) are replaced by marks, one for one: rare characters that the messages do not
use. In the text that comes of it, a token without a mark is the template's own. Then the marks
become signs again, and what they spell is encoded as the ordinary text it is.

Guarded are the special tokens, and others that the template writes around messages, as DeepSeek's
`<｜User｜>`, which its files call ordinary; not what may be said within a message (`<think>` and
`<tool_call>` of Qwen). Whatever a template does with the strings of messages and tools (joins,
cuts, strips, replaces, JSON), every sign of a guarded token in the ids is one that the template has
written: of the messages there can be letters, digits, `_` and spaces between them, as the role is
in `'<|' + role + '|>'`. One thing is assumed: that a template cuts no text in two that stands in
its own code, such as `</think>`; these keep their signs where they are no part of a guarded token,
so that it finds them. A single `<`, or a guarded token, it does not find in a message.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import filterfalse
from typing import Any, TypeVar

from models.chat_template import ChatTemplate
from models.tokenizer import Tokenizer
from models.tokenizer_codec import any_of

_MARKS = range(0x20000, 0x2A6D7)  # Chinese characters: printable, so that repr() shows them as such
_NAMES = range(0xF0000, 0xFFFFE)  # for private use: no letters, no spaces, and in no normal form
_SIGN = re.compile(r"[^\w\s]")
_MAX_KEPT = 100  # texts of a template's code that keep their signs, and characters of each
_TURNS = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]

Key = TypeVar("Key")


class ChatEncoder:
    """Encodes the conversations of one model. May be used by several threads."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template = template
        self._tokenizer = tokenizer

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        special_tokens: bool = False,
    ) -> list[int]:
        """The token ids of a conversation as the template writes it, up to the next answer.

        With `special_tokens` those that the messages spell out are special tokens, too. Raises
        ValueError for whatever the template refuses, and for guarded tokens in the messages of
        which the tokenizer cannot make ordinary text.
        """
        if special_tokens:
            return self._ids(self.template.render(messages, tools))
        marks = _Marks(self._guard)
        text = self.template.render(messages, tools, rewrite=marks.put)
        return self._encode(text, marks.removed)

    def _encode(self, marked: str, removed: Callable[[str], str]) -> list[int]:
        guard, text = self._guard, removed(marked)
        own = guard.tokens_in(marked)
        own_ids = [token_id for _, token_id in own]
        ids = self._ids(text)
        # A tokenizer that normalises text may find more tokens than can be seen in it.
        too_many = Counter(filter(guard.ids.__contains__, ids)) - Counter(own_ids)
        if not too_many and own == guard.tokens_in(text):
            return ids
        names = _fresh(set(own_ids), _NAMES, text)
        pieces, at = [], 0
        for (start, end), token_id in own:
            pieces += [marked[at:start], names[token_id]]
            at = end
        renamed = removed("".join(pieces) + marked[at:])
        ids = self._tokenizer.encode_renamed(renamed, {**dict.fromkeys(guard.ids, ""), **names})
        if list(filter(guard.ids.__contains__, ids)) != own_ids:
            raise ValueError(
                "messages hold special tokens of the model, of which its tokenizer cannot make "
                "ordinary text; leave them out, or allow them with special_tokens=True"
            )
        return ids

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens itself.
        return self._tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _guard(self) -> _Guard:
        tokenizer, template = self._tokenizer, self.template
        written: set[int] = set()
        for messages in (_TURNS, _TURNS[1:], _TURNS[1:2]):  # a template may refuse some
            with suppress(ValueError):
                written.update(self._ids(template.render(messages, add_generation_prompt=False)))
        guarded = {
            token_id: text
            for token_id, text in tokenizer.whole.items()
            if token_id in tokenizer.special_ids or (token_id in written and _SIGN.search(text))
        }
        return _Guard(guarded, tokenizer.whole.values(), template.constants)


class _Guard:
    """The tokens, by id, that only the template may write, out of all that a tokenizer finds."""

    def __init__(
        self, tokens: Mapping[int, str], all_texts: Iterable[str], constants: Iterable[str]
    ) -> None:
        self.ids = tokens.keys()
        self._ids = {text: token_id for token_id, text in tokens.items()}
        self._found = re.compile(any_of(all_texts))
        signs = set(_SIGN.findall("".join(self._ids)))
        words = [text for text in self._ids if not _SIGN.search(text)]
        # What a template looks for is short.
        kept = sorted(_apart(constants, self._ids, signs), key=len)[:_MAX_KEPT]
        # A token without a sign, a word, is marked where all of it stands.
        parts = [any_of(kept), *(f"{re.escape(w[0])}(?={re.escape(w[1:])})" for w in words)]
        self.markable = re.compile("|".join([*parts, any_of(signs)]))
        self.characters = signs | {word[0] for word in words}

    def tokens_in(self, text: str) -> list[tuple[tuple[int, int], int]]:
        """Where guarded tokens stand in `text`, (begin, end), and which."""
        found = self._found.finditer(text)
        return [(each.span(), self._ids[each[0]]) for each in found if each[0] in self._ids]


class _Marks:
    """The marks of one conversation."""

    def __init__(self, guard: _Guard) -> None:
        self._guard = guard
        self._signs: dict[int, str] = {}  # by mark

    def put(self, values: list[Any]) -> list[Any]:
        """`values` with marks in all their strings. Raises ValueError where no mark is left."""
        texts: list[str] = []
        _each_text(values, texts.append)
        used = set().union(*texts)
        marks = _fresh(self._guard.characters & used, _MARKS, used)
        self._signs = {ord(mark): sign for sign, mark in marks.items()}
        find = self._guard.markable
        marked: list[Any] = _each_text(
            values, lambda text: find.sub(lambda found: marks.get(found[0], found[0]), text)
        )
        return marked

    def removed(self, text: str) -> str:
        return text.translate(self._signs) if self._signs else text


def _each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """A copy of plain values with each string in it changed, keys as well."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each_text(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each_text(part, change) for part in value)
    return value


def _fresh(keys: Collection[Key], codes: range, used: Iterable[str]) -> dict[Key, str]:
    """A character of its own for each key, none of those in use."""
    free = filterfalse(set(used).__contains__, map(chr, codes))
    fresh = dict(zip(keys, free, strict=False))
    if len(fresh) < len(keys):
        raise ValueError(
            f"messages use nearly all characters from U+{codes[0]:X} to U+{codes[-1]:X}, of which "
            "some must be free; shorten them"
        )
    return fresh


def _apart(texts: Iterable[str], tokens: Iterable[str], signs: set[str]) -> Iterator[str]:
    """Those of `texts` with signs of which no token can take any, whatever stands around them."""
    starts = {token[:length] for token in tokens for length in range(1, len(token) + 1)}
    ends = {token[-length:] for token in tokens for length in range(1, len(token) + 1)}
    for text in texts:
        if len(text) <= _MAX_KEPT and not signs.isdisjoint(text):
            parts = range(1, len(text) + 1)
            if not any(text[-part:] in starts or text[:part] in ends for part in parts) and not any(
                token in text or text in token for token in tokens
            ):
                yield text
