"""Grammars for tests, and what their answers must be, checked without the library behind them."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

from engine import Grammar
from engine.grammar_state import GrammarState

WORDS = st.text('abcdeé"\\/ <>日', min_size=1, max_size=6)


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is what a schema of `schemas` says."""
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    if "anyOf" in schema:
        return any(fits(one, value) for one in schema["anyOf"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "array":
        is_long = isinstance(value, list) and schema["minItems"] <= len(value)
        return is_long and len(value) <= schema["maxItems"] and all(
            fits(schema["items"], one) for one in value
        )  # fmt: skip
    if kind == "object":
        parts = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(parts)
            and all(fits(parts[name], one) for name, one in value.items())
        )
    return value in ((True, False) if kind == "boolean" else (None,)) and type(value) is not int


def _integers() -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.tuples(st.integers(-900, 900), st.integers(0, 900))
    return pairs.map(lambda p: {"type": "integer", "minimum": p[0], "maximum": p[0] + p[1]})


def _objects(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def draw(draw: Any) -> dict[str, Any]:
        properties = draw(st.dictionaries(WORDS, parts, min_size=1, max_size=3))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
        names = {"type": "object", "properties": properties, "required": required}
        return names | {"additionalProperties": False}

    return draw()


def _nested(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(
        lambda items, low, more: {
            "type": "array", "items": items, "minItems": low, "maxItems": low + more,
        },
        parts, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    return arrays | _objects(parts) | st.lists(parts, min_size=1, max_size=3).map(_any_of)


def _any_of(parts: list[Any]) -> dict[str, Any]:
    return {"anyOf": parts}


LEAVES = (
    st.sampled_from(({"type": "boolean"}, {"type": "null"}))
    | _integers()
    | st.integers(0, 5).map(lambda n: {"type": "string", "maxLength": n})
    | st.lists(WORDS | st.integers(-99, 99), min_size=1, max_size=3).map(lambda e: {"enum": e})
)
SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=5)


def _regexes(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.lists(parts, min_size=1, max_size=3).map("".join)
        | st.lists(parts, min_size=1, max_size=3).map(lambda p: f"({'|'.join(p)})")
        | st.tuples(parts, st.sampled_from(("?", "{1,3}", "{2}"))).map(lambda p: f"({p[0]}){p[1]}")
    )


ATOMS = st.sampled_from(("a", "b", "foo", "[a-f]", "[0-9]", "é", "日本", "[^\\n]", "\\.", "/", '"'))
REGEXES = st.recursive(ATOMS, _regexes, max_leaves=6)
CHOICES = st.lists(st.text("abé<>os \n\x02\\\"'", min_size=1, max_size=9), min_size=1, max_size=5)

# A grammar, and whether a text is one of its answers.
CASES = (
    SCHEMAS.map(lambda s: (Grammar.json_schema(s), lambda text: fits(s, json.loads(text))))
    | REGEXES.map(lambda r: (Grammar.regex(r), lambda text: re.fullmatch(r, text) is not None))
    | CHOICES.map(lambda c: (Grammar.choice(c), lambda text: text in c))
)


def tokens_of(state: GrammarState, drafted: tuple[int, ...] = ()) -> set[int]:
    """The tokens that may follow."""
    mask = state.mask(drafted)
    return set() if mask is None else {
        8 * i + bit for i, byte in enumerate(mask.tolist()) for bit in range(8) if byte >> bit & 1
    }  # fmt: skip
