"""Tools of a chat: offered to the model, parsed back from what it writes, or forced."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_async_llm import FakeAsyncLLM, Round, events
from serve_app import CHAT, HELLO, chunks_of, client_of, error_of

PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "description": "What time it is."}},
]
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TWO = f'Let me see.\n{ONE}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'


def pieces_of(text: str, size: int) -> list[Round]:
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    return [*(events(piece) for piece in cut[:-1]), events(cut[-1], reason="stop")]


def ask(llm: FakeAsyncLLM, **body: Any) -> Any:
    response = client_of(llm).post(CHAT, json={"messages": HELLO, "tools": TOOLS, **body})
    assert response.status_code == 200, response.text
    return chunks_of(response.text) if body.get("stream") else response.json()["choices"]


def fake(text: str, size: int = 7, style: str | None = "hermes") -> FakeAsyncLLM:
    llm = FakeAsyncLLM(pieces_of(text, size))
    llm.llm.tool_style = style
    return llm


def named(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


CALLED: dict[str, tuple[str, str | None, list[tuple[str, Any]]]] = {
    "one": (ONE, None, [("weather", {"city": "Oslo"})]),
    "two after a text": (TWO, "Let me see.", [("weather", {"city": "Oslo"}), ("time", {})]),
}


@pytest.mark.parametrize("name", CALLED)
def test_calls_are_parsed_back(name: str) -> None:
    text, content, calls = CALLED[name]
    llm = fake(text)
    (choice,) = ask(llm)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == content
    assert named(choice["message"]["tool_calls"]) == calls
    assert llm.tools == TOOLS


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", CALLED)
def test_calls_are_parsed_back_from_a_stream(name: str, size: int) -> None:
    """No part of a call is shown as text; texts before it come as they are made."""
    text, content, calls = CALLED[name]
    chunks = ask(fake(text, size), stream=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert not any("role" in choice["delta"] for choice in choices[1:])
    shown = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert shown == (content or "")
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    last = choices[-1]
    assert last["finish_reason"] == "tool_calls"
    assert [call.pop("index") for call in last["delta"]["tool_calls"]] == list(range(len(calls)))
    assert named(last["delta"]["tool_calls"]) == calls


@pytest.mark.parametrize(
    "body", [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "none"}]
)
def test_without_tools_it_is_all_text(body: dict[str, Any]) -> None:
    llm = fake(ONE)
    (choice,) = ask(llm, **body)
    assert llm.tools is None
    assert (choice["message"]["content"], choice["finish_reason"]) == (ONE, "stop")
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("Just a text.", "hermes"),
        ('<tool_call>\n{"name": 1}\n</tool_call>', "hermes"),
        ('<tool_call>\n{"name": "weather", "argum', "hermes"),
        (ONE, None),
    ],
)
def test_what_is_no_call_stays_text(text: str, style: str | None) -> None:
    (choice,) = ask(fake(text, style=style))
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    chunks = ask(fake(text, style=style), stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_an_answer_cut_short_says_so() -> None:
    llm = FakeAsyncLLM([events(ONE, reason="length")])
    llm.llm.tool_style = "hermes"
    (choice,) = ask(llm)
    assert choice["finish_reason"] == "length" and len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "weather"}}, ["weather"]),
    ],
)
def test_a_call_can_be_forced(choice: Any, names: list[str]) -> None:
    """By a grammar of the call alone, whatever way of calling the template teaches."""
    llm = fake('{"name": "weather", "parameters": {"city": "Rome"}}', style=None)
    (answer,) = ask(llm, tool_choice=choice)
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    assert named(answer["message"]["tool_calls"]) == [("weather", {"city": "Rome"})]
    grammar = llm.streams[0].params.grammar
    assert grammar is not None
    assert [name in grammar.source for name in ("weather", "time")] == [
        name in names for name in ("weather", "time")
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "required without tools": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "auto without tools": ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
    "unknown": ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "with a format": (
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        "response_format",
    ),
    "too large": (
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 70_000}}]},
        "tools",
    ),
    "no schema": (
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}],
        },
        "tool_choice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    body, param = REFUSED[name]
    response = client_of(fake("x")).post(CHAT, json={"messages": HELLO, "tools": TOOLS, **body})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
