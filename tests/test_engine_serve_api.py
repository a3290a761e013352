"""The shapes of OpenAI's API, whole and streamed, from rounds that a script gives."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from fake_async_llm import STATS, FakeAsyncLLM, Round, events
from serve_app import CHAT, COMPLETIONS, HELLO, ascii_llm, chunks_of, client_of, recorder

from engine import AsyncLLM
from engine.types import TokenEvent

STORY: list[Round] = [
    events("O", "nce ", drafted=True),
    events(""),  # half of a character
    events("upon", " a", " time", drafted=True),
    events(".", reason="stop"),
]
TEXT = "Once upon a time."
HEAD = {"id", "object", "created", "model", "system_fingerprint"}
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 4,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 1,
    },
}


def test_a_chat() -> None:
    client = client_of(FakeAsyncLLM(STORY))
    body = client.post(CHAT, json={"model": "fake", "messages": HELLO}).json()
    assert body.keys() == HEAD | {"choices", "usage"}
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["model"] == "fake" and body["system_fingerprint"].startswith("fp_")
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice]
    assert body["usage"] == USAGE
    names = [call[0] for call in recorder(client.app).calls]
    assert names == ["started", "first_token", "tokens", "tokens", "tokens", "tokens", "finished"]
    counts = [count for count, _ in recorder(client.app).named("tokens")]
    assert counts == [2, 1, 3, 1]
    ((*told, seconds),) = recorder(client.app).named("finished")
    assert told == [STATS, "stop"] and 0 < seconds < 60


def test_a_chunk_has_all_that_a_round_made() -> None:
    client = client_of(FakeAsyncLLM(STORY))
    response = client.post(CHAT, json={"messages": HELLO, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response.text)
    assert all(chunk.keys() == HEAD | {"choices"} for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": "Once "},
        {"content": "upon a time"},
        {"content": "."},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]


def test_usage_comes_last_where_it_is_asked_for() -> None:
    client = client_of(FakeAsyncLLM(STORY))
    body = {"messages": HELLO, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(client.post(CHAT, json=body).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 5  # of one prompt, though it has two answers
    assert last["usage"]["completion_tokens"] == 8


def test_usage_of_every_chunk_where_it_is_asked_for() -> None:
    with closing(AsyncLLM(ascii_llm())) as llm:
        wanted = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": HELLO, "stream": True, "max_tokens": 8, "ignore_eos": True}
        body |= {"temperature": 0, "stream_options": wanted}
        *chunks, last = chunks_of(client_of(llm).post(CHAT, json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and 1 <= counts[0] <= counts[-1] == 8
    assert last["usage"] == chunks[-1]["usage"]


def test_answers_come_as_they_are_made() -> None:
    """None waits for another: the second has ended before the first one goes on."""
    first: list[Round] = [events(f"a{i} ") for i in range(5)] + [events("a", reason="stop")]
    client = client_of(FakeAsyncLLM(first, [events("b", reason="length")]))
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"})):
        chunks = chunks_of(client.post(path, json={**body, "n": 2, "stream": True}).text)
        indices = [chunk["choices"][0]["index"] for chunk in chunks]
        assert sorted(indices) == [0, 0, 0, 0, 0, 0, 1] and indices.index(1) <= 1
        client = client_of(FakeAsyncLLM(first, [events("b", reason="length")]))


def test_completions_of_every_kind_of_prompt() -> None:
    llm = FakeAsyncLLM(STORY)
    client = client_of(llm)
    for prompt, wanted in (
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ):
        llm.asked.clear()
        body = client.post(COMPLETIONS, json={"prompt": prompt, "n": 2}).json()
        assert llm.asked == [each for one in wanted for each in (one, (1, 2, 3, 4, 5))]
        assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
        choice = {"text": TEXT, "logprobs": None, "finish_reason": "stop"}
        expected = [{"index": i, **choice} for i in range(2 * len(wanted))]
        assert body["choices"] == expected
        assert body["usage"]["prompt_tokens"] == 5 * len(wanted)
        assert body["usage"]["completion_tokens"] == 8 * len(wanted)


def test_parameters_reach_the_engine() -> None:
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.2, "min_tokens": 3, "ignore_eos": True,
    }  # fmt: skip
    llm = FakeAsyncLLM(STORY)
    client = client_of(llm, max_tokens=100)
    body = {**values, "seed": 2**63 - 1, "n": 2, "stop": "\n", "stop_token_ids": [7], "timeout": 9}
    assert client.post(CHAT, json={"messages": HELLO, **body}).status_code == 200
    assert {name: getattr(llm.streams[0].params, name) for name in values} == values
    first, second = (stream.params for stream in llm.streams)
    assert (first.stop, first.stop_token_ids, first.max_tokens) == (("\n",), (7,), 100)
    assert (first.seed, second.seed) == (2**63 - 1, 0)  # the next one
    assert replace(second, seed=first.seed) == first
    for max_tokens, wanted in ((None, 16), (50, 50), (10**30, 100)):
        client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": max_tokens})
        assert llm.streams[-1].params.max_tokens == wanted
    client.post(CHAT, json={"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 7})
    assert llm.streams[-1].params.max_tokens == 7


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (None, None),
        ("auto", "auto"),
        ("off", "off"),
        ("int8", "int8"),
        ({"enabled": False}, "off"),
        ({"enabled": False, "method": "ngram"}, "off"),
        ({"method": "ngram"}, "ngram"),
        ({"detail": True}, None),
    ],
)
def test_speculation_is_asked_for(asked: Any, wanted: str | None) -> None:
    llm = FakeAsyncLLM(STORY)
    client_of(llm).post(CHAT, json={"messages": HELLO, "speculative": asked})
    assert llm.streams[0].params.speculative == wanted


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_detail_tells_what_was_drafted(path: str) -> None:
    client = client_of(FakeAsyncLLM(STORY))
    client.app.state.serving.plain_speed = 3.0  # type: ignore[attr-defined]
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
    body = {**prompt, "speculative": {"detail": True}}
    chunks = chunks_of(client.post(path, json={**body, "stream": True}).text)
    pieces = [[tuple(p.values()) for p in chunk["choices"][0]["pieces"]] for chunk in chunks]
    assert pieces == [
        [("O", False), ("nce ", True)],
        [("", False)],
        [("upon", False), (" a", True), (" time", True)],
        [(".", False)],
    ]
    *others, last = chunks
    assert all("speculative" not in chunk for chunk in others)
    told = client.post(path, json=body).json()["speculative"]
    assert last["speculative"] == told == {
        "plan": "int8", "domain": "", "similarity": 0.0, "rounds": 2, "tokens_per_round": 1.5,
        "drafted": 3, "accepted": 2, "tokens_per_second": 6.0, "plain_tokens_per_second": 3.0,
        "queue_seconds": 0.0, "prefill_seconds": 0.25, "decode_seconds": 0.5, "reused_tokens": 2,
    }  # fmt: skip


def scored(token_id: int, text: str, **others: float) -> TokenEvent:
    values = {ord(name): value for name, value in others.items()}
    return TokenEvent(token_id, text, logprob=values[token_id], logprobs=values)


EURO = "\u20ac".encode()
SCORED: list[Round] = [
    [scored(ord("a"), "a", b=-0.5, a=-1.0), scored(ord("b"), "b", b=-0.25, a=-2.0)],
    [
        TokenEvent(EURO[0], "", logprob=-3.0, logprobs={EURO[0]: -3.0, ord("a"): -1.0}),
        TokenEvent(257, "", logprob=-0.1, logprobs={257: -0.1, ord("a"): -4.0},
                   finish_reason="stop", stats=STATS),
    ],
]  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_of_chats(is_streamed: bool) -> None:
    llm = FakeAsyncLLM(SCORED)
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "stream": is_streamed}
    response = client_of(llm).post(CHAT, json=body)
    assert llm.streams[0].params.logprobs == 1
    answers = chunks_of(response.text) if is_streamed else [response.json()]
    entries = [e for each in answers for e in each["choices"][0]["logprobs"]["content"]]
    top = [each.pop("top_logprobs") for each in entries]
    assert entries == [
        {"token": "a", "logprob": -1.0, "bytes": [97]},
        {"token": "b", "logprob": -0.25, "bytes": [98]},
        {"token": "bytes:\\xe2", "logprob": -3.0, "bytes": [0xE2]},
        {"token": "<eos>", "logprob": -0.1, "bytes": []},
    ]
    assert [[one["token"] for one in each] for each in top] == [["b"], ["b"], ["a"], ["<eos>"]]


def test_logprobs_without_top_ones() -> None:
    llm = FakeAsyncLLM(SCORED)
    body = client_of(llm).post(CHAT, json={"messages": HELLO, "logprobs": True}).json()
    assert llm.streams[0].params.logprobs == 0
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[]] * 4


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_of_completions(is_streamed: bool) -> None:
    llm = FakeAsyncLLM(SCORED)
    body = {"prompt": "x", "logprobs": 2, "stream": is_streamed}
    response = client_of(llm).post(COMPLETIONS, json=body)
    assert llm.streams[0].params.logprobs == 2
    answers = chunks_of(response.text) if is_streamed else [response.json()]
    found: dict[str, list[Any]] = {}
    for each in answers:
        for name, values in each["choices"][0]["logprobs"].items():
            found.setdefault(name, []).extend(values)
    assert found == {
        "tokens": ["a", "b", "bytes:\\xe2", "<eos>"],
        "token_logprobs": [-1.0, -0.25, -3.0, -0.1],
        "top_logprobs": [
            {"b": -0.5, "a": -1.0},
            {"b": -0.25, "a": -2.0},
            {"bytes:\\xe2": -3.0, "a": -1.0},
            {"<eos>": -0.1, "a": -4.0},
        ],
        "text_offset": [0, 1, 2, 2],
    }


def test_messages_are_what_templates_expect() -> None:
    llm = FakeAsyncLLM(STORY)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Seven.", "annotations": [], "audio": None},
    ]
    assert client_of(llm).post(CHAT, json={"messages": messages}).status_code == 200
    assert llm.asked[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Seven."},
    ]


def test_models() -> None:
    client = client_of(FakeAsyncLLM(STORY), model_names=("org/name", "other"))
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["org/name", "other"]
    assert client.get("/v1/models/org/name").json() == listed["data"][0]
    assert listed["data"][1]["root"] == "org/name"
    for name in ("org/name", "other", None):
        body = client.post(CHAT, json={"messages": HELLO, "model": name}).json()
        assert body["model"] == "org/name"


def test_tokens() -> None:
    client = client_of(FakeAsyncLLM(STORY))
    text = "h\u20ac"
    body = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = [256, 104, *EURO]
    strings = ["<bos>", "h", *(f"bytes:\\x{byte:02x}" for byte in EURO)]
    assert body == {"count": 5, "max_model_len": 256, "tokens": ids, "token_strs": strings}
    plain = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == ids[1:] and plain["token_strs"] is None
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": f"<bos>{text}"}


def test_the_page_is_there() -> None:
    response = client_of(FakeAsyncLLM(STORY)).get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
