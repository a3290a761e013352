"""What an answer must be: a grammar, checked, in the words of llguidance; see grammar_state.py."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.messages import cause_of, quoted

MAX_SOURCE = 1 << 16  # bytes of a schema, or of choices
MAX_REGEX = 1 << 12  # characters
MAX_CHOICES = 1000
# For llguidance, which has others for what is not named. A lexer state takes one or two kilobytes;
# the fuel also bounds how much of a long text is found to be forced, at each of its tokens.
LIMITS = {"max_lexer_states": 20_000, "initial_lexer_fuel": 200_000, "verbose_errors": False}
# JSON on one line, as Python writes it: more of it is forced, and no answer is all white space.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CAUSE = re.compile(r"error: |\(in regex\): ")


@dataclass(frozen=True)
class Grammar:
    """What an answer must be, from its first token to its last. Made by the methods of the class.

    End tokens are drawn only where the answer may end. Where nothing else may follow it ends at
    once, with finish_reason "stop", whatever `ignore_eos` and `min_tokens` say. What a caller cuts
    it short with, `max_tokens`, stop strings and `stop_token_ids` that stand for text, may leave it
    incomplete.

    Each method raises ValueError, in one line, for what is not valid, too large, or not supported.
    """

    source: str  # as llguidance reads it

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that this schema describes, on one line; nothing is fetched that it refers to."""
        if isinstance(schema, str):
            _check_size("schema", len(schema), MAX_SOURCE, "bytes")
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(value, allow_nan=False)
            if not isinstance(value, dict):
                raise ValueError("it is no object")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"schema: got {quoted(schema)}, expected a JSON schema ({cause_of(error)})"
            ) from error
        _check_size("schema", len(text), MAX_SOURCE, "bytes")
        # A schema could set the options of llguidance here, also not to be followed in full.
        text = json.dumps({key: value[key] for key in value if key != "x-guidance"})
        make = library().LLMatcher.grammar_from_json_schema
        return _checked("schema", schema, lambda: make(text, overrides=JSON_STYLE))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object, on one line."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches in full, in Rust's syntax without look-around."""
        if not isinstance(pattern, str) or (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise ValueError(f"regex: got {quoted(pattern)}, expected a regular expression")
        _check_size("regex", len(pattern), MAX_REGEX, "characters")
        return _checked("regex", pattern, lambda: library().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of some texts, letter by letter."""
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not is_list or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"choice: got {quoted(texts)}, expected a list of non-empty strings")
        _check_size("choice", len(texts), MAX_CHOICES, "strings")
        _check_size("choice", sum(map(len, texts)), MAX_SOURCE, "characters in all")
        quotes = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return _checked("choice", texts, lambda: f"start: {quotes}")


def library() -> Any:
    """The module llguidance, which is no part of the least installation."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise ValueError(
            "grammar: got one, but llguidance is not installed; pip install 'knn-ssd-engine[serve]'"
        ) from None


def parser_limits() -> Any:
    """What llguidance may spend on one grammar."""
    return library().LLParserLimits(**LIMITS)


def _check_size(name: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise ValueError(f"{name}: got {size} {unit}, expected at most {limit}; make it smaller")


def _checked(name: str, got: object, make: Callable[[], str]) -> Grammar:
    check = library().LLMatcher.validate_grammar_with_warnings
    try:
        source = make()
        is_wrong, messages = check(source, limits=parser_limits())
    except ValueError as error:
        is_wrong, messages = True, [str(error)]
    if not is_wrong:
        return Grammar(source)
    cause = ValueError(_CAUSE.split(messages[0])[-1].partition("\n")[0])
    raise ValueError(
        f"{name}: got {quoted(got)}, expected one that llguidance can follow ({cause_of(cause)})"
    )
