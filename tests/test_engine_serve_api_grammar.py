"""Structured output over the API: formats, guides and forced calls, of a real, tiny model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serve_app import CHAT, COMPLETIONS, HELLO, ascii_llm, chunks_of, client_of, error_of

from engine.async_llm import AsyncLLM
from models.chat_template import ChatTemplate

TEMPLATE = """\
{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: """
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "hot": {"type": "boolean"}},
    "required": ["city", "hot"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
# A schema with a definition of its own, as pydantic makes them.
SHARED = {
    "$defs": {"Unit": {"enum": ["C", "F"]}},
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/Unit"}},
    "required": ["unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "convert", "parameters": SHARED}},
]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    template = ChatTemplate(TEMPLATE, "tiny")
    with AsyncLLM(ascii_llm(1024, max_sequences=4, chat_template=template)) as llm:
        yield client_of(llm)


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    """A choice that is the same however it is drafted, and streamed."""
    asked = {"messages": HELLO, "seed": 4, "max_tokens": 100, **body}
    texts = set()
    for speculative in ("off", "ngram", "int8"):
        response = client.post(CHAT, json={**asked, "speculative": speculative})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        texts.add(choice["message"]["content"])
    assert len(texts) == 1
    chunks = chunks_of(client.post(CHAT, json={**asked, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    streamed = "".join(delta.get("content", "") for delta in deltas)
    assert streamed == (choice["message"]["content"] or "")
    return choice


@pytest.mark.parametrize("field", [{"response_format": NAMED}, {"guided_json": SCHEMA},
                                   {"guided_json": json.dumps(SCHEMA)}])  # fmt: skip
def test_a_schema_is_kept(client: TestClient, field: dict[str, Any]) -> None:
    choice = chat(client, **field)
    value = json.loads(choice["message"]["content"])
    assert value["city"] in ("Oslo", "Rome") and type(value["hot"]) is bool
    assert choice["finish_reason"] == "stop"


def test_any_object(client: TestClient) -> None:
    choice = chat(client, response_format={"type": "json_object"}, temperature=0)
    text = choice["message"]["content"]
    assert text.startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(json.loads(text), dict)


def test_guides(client: TestClient) -> None:
    text = chat(client, guided_regex="[ab]{3,5}-[0-9]")["message"]["content"]
    assert re.fullmatch("[ab]{3,5}-[0-9]", text)
    assert chat(client, guided_choice=["yes", "no"])["message"]["content"] in ("yes", "no")
    body = {"prompt": [97], "guided_choice": ["left", "right"], "n": 4}
    choices = client.post(COMPLETIONS, json=body).json()["choices"]
    assert {choice["text"] for choice in choices} <= {"left", "right"}


def test_a_format_of_text_is_none(client: TestClient) -> None:
    plain = chat(client)["message"]
    assert chat(client, response_format={"type": "text"})["message"] == plain


@pytest.mark.parametrize("name", ["weather", "convert", None])
def test_a_forced_call(client: TestClient, name: str | None) -> None:
    choice = "required" if name is None else {"type": "function", "function": {"name": name}}
    answer = chat(client, tools=TOOLS, tool_choice=choice)
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] in (("weather", "convert") if name is None else (name,))
    wanted = {"weather": {"city", "hot"}, "convert": {"unit"}}[call["function"]["name"]]
    assert arguments.keys() == wanted


def test_tools_are_in_the_prompt(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"messages": HELLO, "tools": TOOLS}).json()["tokens"]
    prompt = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert prompt.startswith('{"type": "function", "function": {"name": "weather"')
    usage = client.post(CHAT, json={"messages": HELLO, "tools": TOOLS, "max_tokens": 1}).json()
    assert usage["usage"]["prompt_tokens"] == len(tokens)
    without = {"messages": HELLO, "tools": TOOLS, "tool_choice": "none", "max_tokens": 1}
    assert client.post(CHAT, json=without).json()["usage"]["prompt_tokens"] < len(tokens)


NESTED: Any = {"type": "string"}
for _ in range(50):
    NESTED = {"type": "array", "items": NESTED}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"guided_regex": "(["}, "guided_regex"),
    "look-around": ({"guided_regex": "a(?=b)"}, "guided_regex"),
    "long regex": ({"guided_regex": "a" * 70_000}, "guided_regex"),
    "no choices": ({"guided_choice": []}, "guided_choice"),
    "an empty choice": ({"guided_choice": [""]}, "guided_choice"),
    "a text that is no schema": ({"guided_json": "{"}, "guided_json"),
    "no schema": ({"guided_json": {"type": 5}}, "guided_json"),
    "unknown type": ({"guided_json": {"type": "thing"}}, "guided_json"),
    "nothing can be it": ({"guided_json": {"allOf": [{"const": 1}, {"const": 2}]}}, "guided_json"),
    "remote": ({"guided_json": {"$ref": "http://127.0.0.1/x.json"}}, "guided_json"),
    "a file": ({"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json"),
    "a large one": ({"guided_json": {"enum": ["x" * 100] * 10_000}}, "guided_json"),
    "two guides": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
    "a guide and a format": ({"guided_regex": "a", "response_format": NAMED}, "response_format"),
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "format without a schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "format with a bad schema": (
        {"response_format": {"type": "json_schema",
                             "json_schema": {"name": "x", "schema": {"type": "thing"}}}},
        "response_format",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_absurd_grammars_are_refused_soon(client: TestClient, name: str) -> None:
    body, param = REFUSED[name]
    begin = time.monotonic()
    response = client.post(CHAT, json={"messages": HELLO, "max_tokens": 4, **body})
    assert time.monotonic() - begin < 5
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


ENDLESS: dict[str, dict[str, Any]] = {
    "regex": {"guided_regex": "((a{1,900}){1,900}){1,900}"},
    "itself": {"guided_json": {"$ref": "#"}},
    "lists of itself": {
        "guided_json": {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}},
                        "$ref": "#/$defs/a"}
    },
    "nested": {"guided_json": NESTED},
    "many patterns": {
        "guided_json": {"properties": {f"p{i}": {"type": "string", "pattern": "(a|b){1,50}c"}
                                       for i in range(300)}}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_grammars_without_end_are_no_end_of_the_server(client: TestClient, name: str) -> None:
    begin = time.monotonic()
    response = client.post(CHAT, json={"messages": HELLO, "max_tokens": 20, **ENDLESS[name]})
    assert response.status_code in (200, 400) and time.monotonic() - begin < 10
    assert client.post(CHAT, json={"messages": HELLO, "max_tokens": 2}).status_code == 200
