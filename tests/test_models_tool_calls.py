"""Calls of tools in what a model writes: all found, none invented, whole or in pieces."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tool_calls import ToolCall, ToolCallStream, parse_tool_calls

F = ToolCall("f", '{"x": "ü"}')
CALL = '{"name": "f", "arguments": {"x": "ü"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"
LLAMA = '{"name": "f", "parameters": {"x": "\\u00fc"}}'
EMPTY = ToolCall("now", "{}")
NOW = '{"name": "now", "arguments": {}}'

# The style, an answer, what it says, and its calls.
FOUND: dict[str, tuple[str, str, str, list[ToolCall]]] = {
    "hermes": ("hermes", TAGGED, "", [F]),
    "on one line": ("hermes", f"<tool_call>{CALL}</tool_call>", "", [F]),
    "two": ("hermes", f"{TAGGED}\n{TAGGED}\n", "", [F, F]),
    "after words": ("hermes", f"Let me see. \n\n{TAGGED}", "Let me see.", [F]),
    "between words": ("hermes", f"One\n{TAGGED}\nTwo\n{TAGGED}", "One\nTwo", [F, F]),
    "no end": ("hermes", f"<tool_call>\n{CALL}", "", [F]),
    "nothing given": ("hermes", f"<tool_call>{NOW}</tool_call>", "", [EMPTY]),
    "tags in a string": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call><tool_call>"}}</tool_call>',
        "", [ToolCall("f", '{"x": "</tool_call><tool_call>"}')],
    ),
    "one of two": (
        "hermes", f"<tool_call>{{</tool_call>\n{TAGGED}", "<tool_call>{</tool_call>", [F]
    ),
    "more keys": ("hermes", f'<tool_call>{{"id": 1, {CALL[1:]}</tool_call>', "", [F]),
    "llama": ("llama", LLAMA, "", [F]),
    "llama with the other key": ("llama", CALL, "", [F]),
    "llama with a tag": ("llama", f"<|python_tag|>{LLAMA}", "", [F]),
    "llama in spaces": ("llama", f"\n {LLAMA}\n", "", [F]),
    "llama twice": ("llama", f"{LLAMA}; {LLAMA}", "", [F, F]),
    "llama on two lines": ("llama", f"{LLAMA}\n{LLAMA};", "", [F, F]),
    "mistral": ("mistral", f"[{CALL}]", "", [F]),
    "mistral with a tag": ("mistral", f"[TOOL_CALLS] [{CALL}, {NOW}]", "", [F, EMPTY]),
    "mistral after words": ("mistral", f"Well. [TOOL_CALLS][{CALL}]", "Well.", [F]),
    "mistral with an id": ("mistral", f'[{CALL[:-1]}, "id": "abcdefghi"}}]', "", [F]),
}  # fmt: skip


def in_pieces(text: str, style: str | None, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    stream, shown = ToolCallStream(style), ""
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += stream.push(text[begin:end])
        assert text.startswith(shown)
    rest, calls = stream.finish()
    return shown + rest, calls


@pytest.mark.parametrize("name", FOUND)
def test_calls_are_found(name: str) -> None:
    style, text, said, calls = FOUND[name]
    assert parse_tool_calls(text, style) == (said, calls)
    assert in_pieces(text, style, list(range(1, len(text)))) == (said, calls)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)


NO_CALLS = {
    "hermes": [
        "", " ", "Hello", "a <tool_", "a < b", "<tool_call>", "<tool_call></tool_call>",
        "<tool_call>{}</tool_call>", "<tool_call>[1]</tool_call>",
        f"<tool_call>[{CALL}]</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 99_999 + "]" * 99_999 + "}}",
        f"<tool_call>{CALL} and so on</tool_call>", f"<tool_call>{CALL[:-1]}</tool_call>", CALL,
        f"<tool_call>{CALL},</tool_call>", "<TOOL_CALL>{}", "</tool_call>",
    ],
    "llama": [
        "", "\n", "Hello", "{", "{}", '{"name": "Bob"}', '{"name": "Bob", "age": 7}', f"{LLAMA} so",
        f"So: {LLAMA}", f"{LLAMA} {{", f"{LLAMA}, {LLAMA}", "<|python_tag|>", f"[{LLAMA}]", ";",
        '<|python_tag|>search.call(query="x")', "{" * 9999, "<|python", TAGGED, f"; {LLAMA}",
    ],
    "mistral": [
        "", "Hello", "[", "[]", "[1]", "[TOOL_CALLS]", "[TOOL_CALLS] []", f"[{CALL}",
        f"[{CALL}] so", f"[{CALL}, 1]", f"[[{CALL}]]", "[TOOL_CALLS]f{}", CALL, "[" * 99_999,
        "[TOOL_", "[1] is a list",
    ],
    None: [TAGGED, LLAMA, f"[{CALL}]", "[TOOL_CALLS]"],
    "another": [TAGGED, LLAMA, f"[{CALL}]"],
}  # fmt: skip


@pytest.mark.parametrize("style", NO_CALLS, ids=str)
def test_what_is_no_call_stays_as_it_is(style: str | None) -> None:
    for text in NO_CALLS[style]:
        assert parse_tool_calls(text, style) == (text, []), text[:80]
        if len(text) < 999:
            assert in_pieces(text, style, list(range(1, len(text) + 1))) == (text, [])


SHOWN: dict[str, list[tuple[str, list[str]]]] = {
    # Pieces of an answer with, after each, what is shown at once.
    "hermes": [
        ("Hello ", ["Hello"]), ("there", [" there"]), (" <", [""]), ("b> ", [" <b>"]), ("\n", [""]),
        ("<tool", [""]), ("_call>", [""]), ("{}", [""]), ("more", [""]),
    ],
    "llama": [(" ", [""]), ("{", [""]), ("a", [""])],
    "mistral": [("\n", [""]), ("x", ["\nx"]), (" [", [""]), ("1]", [" [1]"]), ("[T", [""])],
}  # fmt: skip


@pytest.mark.parametrize("style", SHOWN)
def test_text_is_shown_as_soon_as_no_call_can_begin_in_it(style: str) -> None:
    stream = ToolCallStream(style)
    for piece, shown in SHOWN[style]:
        assert [stream.push(piece)] == shown, piece


PARTS = [
    *("<tool_call>", "</tool_call>", "\n", " ", "{", "}", CALL, LLAMA, f"[{CALL}]", "[TOOL_CALLS]"),
    *("<|python_tag|>", ";", ",", "Hello", "<", "<tool_", "[", "[TOOL", TAGGED, '"', "\\"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["hermes", "llama", "mistral", None]),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    st.data(),
)
def test_pieces_say_what_the_whole_says(style: str | None, text: str, data: Any) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=9).map(sorted))
    whole = parse_tool_calls(text, style)
    assert in_pieces(text, style, cuts) == whole
    for call in whole[1]:
        assert call in (F, EMPTY)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 100_000, "<tool_call>{" * 100_000, '<tool_call>{"a":"' * 60_000,
        TAGGED * 20_000, " " * 1_000_000, "<" * 1_000_000, "[" * 1_000_000, "{" * 1_000_000,
        f"[{CALL}" * 20_000, f"{LLAMA};" * 20_000, "<tool_call>" + " \n" * 500_000,
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
@pytest.mark.parametrize("style", ["hermes", "llama", "mistral"])
def test_long_answers_take_a_moment(style: str, text: str) -> None:
    begin = time.process_time()
    said, calls = parse_tool_calls(text, style)
    assert time.process_time() - begin < 2  # the slowest takes 0.3 here
    assert len(calls) <= 128 and len(said) <= len(text)
