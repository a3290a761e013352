"""Bad input of every kind: a 400 (or 404) with OpenAI's body that names the field, never a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
from fake_async_llm import FakeAsyncLLM, events
from fastapi.testclient import TestClient
from serve_app import CHAT, COMPLETIONS, HELLO, client_of, error_of, recorder

DEEP = "[" * 100_000
USER = HELLO[0]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return client_of(FakeAsyncLLM([events("ok", reason="stop")]), max_stops=4, max_choices=12)


def messages(*values: Any) -> dict[str, Any]:
    return {"messages": list(values)}


def content(value: Any) -> dict[str, Any]:
    return messages({"role": "user", "content": value})


# Beside a right request: the fields that are wrong, and the parameter that the error names.
CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"temprature": 1}, "temprature"),
    "template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "template arguments": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    "messages missing": ({"messages": None}, "messages"),
    "no messages": (messages(), "messages"),
    "messages are a text": ({"messages": "Hello"}, "messages"),
    "a message is a text": (messages("Hello"), "messages.0"),
    "role missing": (messages({"content": "x"}), "messages.0.role"),
    "unknown role": (messages({"role": "boss", "content": "x"}), "messages.0.role"),
    "content is a number": (content(1), "messages.0.content"),
    "image": (content([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content"),
    "part without text": (content([{"type": "text"}]), "messages.0.content.0.text"),
    "unknown field of a message": (messages({**USER, "cache": 1}), "messages.0.cache"),
    "answer of no call": (messages(USER, {"role": "tool", "content": "1"}), "messages.1"),
    "audio": (messages({**USER, "audio": {"id": "1"}}), "messages.0.audio"),
    "n is 0": ({"n": 0}, "n"),
    "n above 8": ({"n": 9}, "n"),
    "n is a float": ({"n": 1.0}, "n"),
    "temperature": ({"temperature": -0.1}, "temperature"),
    "temperature is a text": ({"temperature": "1"}, "temperature"),
    "temperature is huge": ({"temperature": 1e39}, "temperature"),
    "temperature is a bool": ({"temperature": True}, "temperature"),
    "top_p is 0": ({"top_p": 0}, "top_p"),
    "top_p above 1": ({"top_p": 1.01}, "top_p"),
    "negative top_k": ({"top_k": -2}, "top_k"),
    "top_k is huge": ({"top_k": 2**40}, "top_k"),
    "min_p": ({"min_p": 1.5}, "min_p"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "presence_penalty": ({"presence_penalty": 2.1}, "presence_penalty"),
    "frequency_penalty": ({"frequency_penalty": -2.1}, "frequency_penalty"),
    "negative seed": ({"seed": -1}, "seed"),
    "seed is huge": ({"seed": 2**63}, "seed"),
    "max_tokens is 0": ({"max_tokens": 0}, "max_tokens"),
    "max_completion_tokens": ({"max_completion_tokens": -5}, "max_tokens"),
    "max_tokens is a text": ({"max_tokens": "many"}, "max_tokens"),
    "min_tokens": ({"min_tokens": -1}, "min_tokens"),
    "min_tokens above max_tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    "empty stop": ({"stop": ""}, "stop"),
    "empty stop among others": ({"stop": ["a", ""]}, "stop"),
    "too many stops": ({"stop": ["a"] * 5}, "stop"),
    "a stop is a number": ({"stop": [1]}, "stop.0"),
    "long stop": ({"stop": "x" * 257}, "stop"),
    "stop_token_ids": ({"stop_token_ids": [-1]}, "stop_token_ids"),
    "a stop token is a text": ({"stop_token_ids": ["1"]}, "stop_token_ids.0"),
    "ignore_eos": ({"ignore_eos": 1}, "ignore_eos"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs above 20": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logprobs is a number": ({"logprobs": 3}, "logprobs"),
    "stream is a text": ({"stream": "yes"}, "stream"),
    "stream_options": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "timeout is 0": ({"timeout": 0}, "timeout"),
    "store": ({"store": True}, "store"),
    "metadata": ({"metadata": {"a": 1}}, "metadata.a"),
    "logit_bias": ({"logit_bias": {"1": 5}}, "logit_bias"),
    "speculative is a file": ({"speculative": "/etc/passwd"}, "speculative"),
    "speculative method": ({"speculative": {"method": "plan.json"}}, "speculative.method"),
    "speculative field": ({"speculative": {"plan": "x"}}, "speculative.plan"),
    "tool without a type": ({"tools": [{"function": {"name": "f"}}]}, "tools.0.type"),
    "name of a tool": (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name",
    ),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
}
TEXTS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt missing": ({"prompt": None}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "prompt is a number": ({"prompt": 5}, "prompt"),
    "prompts of two kinds": ({"prompt": ["a", 1]}, "prompt.1"),
    "too many prompts": ({"prompt": ["a"] * 13}, "prompt"),
    "too many answers": ({"prompt": ["a"] * 5, "n": 3}, "prompt"),
    "echo": ({"echo": True}, "echo"),
    "best_of": ({"best_of": 2}, "best_of"),
    "suffix": ({"suffix": "x"}, "suffix"),
    "logprobs above 5": ({"logprobs": 6}, "logprobs"),
    "logprobs is a bool": ({"logprobs": True}, "logprobs"),
    "messages": ({"messages": HELLO}, "messages"),
}


def refusal(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json={k: v for k, v in body.items() if v is not None})
    assert response.status_code == 400, response.text
    return error_of(response)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_bad_chats(client: TestClient, name: str, is_streamed: bool) -> None:
    wrong, param = CHATS[name]
    body = {"messages": HELLO, **({"stream": True} if is_streamed else {}), **wrong}
    error = refusal(client, CHAT, body)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param), error
    assert param.split(".")[-1] in error["message"] and len(error["message"]) < 600


@pytest.mark.parametrize("name", TEXTS)
def test_bad_completions(client: TestClient, name: str) -> None:
    wrong, param = TEXTS[name]
    assert refusal(client, COMPLETIONS, {"prompt": "x", **wrong})["param"] == param


BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "two of them": b"{} {}",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"model": "\xff"}',
    "half of a surrogate pair": b'{"model": "\\ud800"}',
    "half of one as a field": b'{"\\ud800": 1}',
    "NaN": b'{"messages": [], "temperature": NaN}',
    "Infinity": b'{"messages": [], "metadata": {"a": -Infinity}}',
    "a number beyond floats": b'{"messages": [], "temperature": 1e999}',
    "an integer without end": b'{"seed": ' + b"9" * 10_000 + b"}",
    "deep": DEEP.encode(),
    "deep objects": b'{"a":' * 10_000,
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(client: TestClient, name: str, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(path, content=BODIES[name], headers=headers)
    assert response.status_code == 400, response.text
    error_of(response)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_page_elsewhere_cannot_send_requests(client: TestClient, kind: str | None) -> None:
    """Such types need no consent of the server before a browser sends them."""
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 400
    assert "Content-Type" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": HELLO}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}),
        ("/detokenize", {"tokens": [258]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [1], "x": 1}),
    ],
)
def test_bad_tokens(client: TestClient, path: str, body: dict[str, Any]) -> None:
    refusal(client, path, body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO}),
        (COMPLETIONS, {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_another_model_is_not_found(client: TestClient, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json={**body, "model": "gpt-4o"})
    assert response.status_code == 404
    assert error_of(response) | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert client.get("/v1/models/gpt-4o").status_code == 404


def test_unknown_routes_and_methods(client: TestClient) -> None:
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get(CHAT), 405),
        (client.delete("/v1/models"), 405),
    ):
        assert response.status_code == status
        error_of(response)
    assert client.get(CHAT).headers["allow"] == "POST"


def test_nothing_bad_reaches_the_engine(client: TestClient) -> None:
    llm = FakeAsyncLLM([events("ok", reason="stop")])
    client = client_of(llm, max_stops=4, max_choices=12)
    for wrong, _ in CHATS.values():
        refusal(client, CHAT, {"messages": HELLO, **wrong})
    for wrong, _ in TEXTS.values():
        refusal(client, COMPLETIONS, {"prompt": "x", **wrong})
    assert llm.asked == [] and not recorder(client.app).named("started")
    count = len(CHATS) + len(TEXTS)
    assert recorder(client.app).named("rejected") == [["bad_request"]] * count
    assert client.post(CHAT, json={"messages": HELLO}).status_code == 200
