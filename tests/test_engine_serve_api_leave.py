"""Requests that do not end well: clients that leave or stop reading, answers that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_async_llm import FakeAsyncLLM, Round, events
from serve_app import (
    CHAT,
    COMPLETIONS,
    HELLO,
    Exchange,
    app_of,
    chunks_of,
    client_of,
    error_of,
    recorder,
    until,
)

from engine.async_llm import Draining, QueueFull

FOREVER: list[Round] = [events("soon "), None]
ENDED = [events("done", reason="stop")]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_leaves_ends_all_its_answers(is_streamed: bool, count: int) -> None:
    async def run() -> None:
        llm = FakeAsyncLLM(FOREVER)
        app = app_of(llm)
        exchange = Exchange(app, CHAT, {"messages": HELLO, "n": count, "stream": is_streamed})
        await until(lambda: sum(stream.num_rounds == 2 for stream in llm.streams) == count)
        assert not exchange.task.done()
        exchange.left.set()
        await asyncio.wait_for(exchange.task, 5)
        assert all(stream.is_closed for stream in llm.streams)
        assert len(recorder(app).named("cancelled")) == count
        assert not recorder(app).named("failed") and not recorder(app).named("finished")
        assert is_streamed or exchange.status == 499

    asyncio.run(run())


def test_a_reader_that_takes_nothing_is_given_up() -> None:
    async def run() -> None:
        llm = FakeAsyncLLM([events(f"{i} ") for i in range(100)])
        app = app_of(llm, stall_timeout=0.2)
        exchange = Exchange(app, CHAT, {"messages": HELLO, "stream": True})
        exchange.reading.clear()
        await asyncio.wait_for(exchange.task, 5)
        (stream,) = llm.streams
        assert stream.is_closed
        assert stream.num_rounds <= 1  # nothing piles up behind what was not taken
        assert recorder(app).named("cancelled") == [[]]

    asyncio.run(run())


def test_a_reader_may_take_its_time_between_two_chunks() -> None:
    async def run() -> None:
        llm = FakeAsyncLLM([events(f"{i} ") for i in range(5)] + [events("x", reason="stop")])
        exchange = Exchange(
            app_of(llm, stall_timeout=0.5), COMPLETIONS, {"prompt": "x", "stream": True}
        )
        while not exchange.task.done():
            exchange.reading.clear()
            await asyncio.sleep(0.15)
            exchange.reading.set()
            await asyncio.sleep(0)
        texts = [chunk["choices"][0]["text"] for chunk in chunks_of(exchange.text)]
        assert texts == ["0 ", "1 ", "2 ", "3 ", "4 ", "x"]

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError("secret"), MemoryError(), ValueError("secret")])
def test_a_failure_is_a_500_and_no_traceback(error: Exception) -> None:
    llm = FakeAsyncLLM([events("a"), error], FOREVER)
    client = client_of(llm)
    response = client.post(CHAT, json={"messages": HELLO, "n": 2})
    assert response.status_code == 500
    told = error_of(response)
    assert told["type"] == "server_error" and "secret" not in told["message"]
    assert all(stream.is_closed for stream in llm.streams)
    metrics = recorder(client.app)
    assert metrics.named("failed") == [[type(error).__name__]]
    assert metrics.named("cancelled") == [[]]  # the other one


def test_a_failure_ends_a_stream_with_an_error() -> None:
    llm = FakeAsyncLLM([events("a"), RuntimeError("secret")])
    response = client_of(llm).post(CHAT, json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    first, last = chunks_of(response.text)
    assert first["choices"][0]["delta"]["content"] == "a"
    assert last["error"]["type"] == "server_error" and "secret" not in str(last)


@pytest.mark.parametrize(
    ("error", "reason"), [(QueueFull("the queue is full"), "full"), (Draining("ends"), "drain")]
)
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_room_is_a_503_with_a_time(
    error: Exception, reason: str, number: int, is_streamed: bool
) -> None:
    """Also where the third answer of a request finds none: the first two are ended then."""
    llm = FakeAsyncLLM(FOREVER, errors={number: error})
    client = client_of(llm)
    response = client.post(CHAT, json={"messages": HELLO, "n": 4, "stream": is_streamed})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert error_of(response)["message"] == str(error)
    assert len(llm.streams) == number + 1
    assert all(stream.is_closed for stream in llm.streams)
    metrics = recorder(client.app)
    assert metrics.named("rejected") == [[reason]]
    assert len(metrics.named("cancelled")) == number


def test_what_was_not_foreseen_is_a_500_too() -> None:
    llm = FakeAsyncLLM(ENDED, errors={0: TypeError("secret")})
    client = client_of(llm)
    client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
    response = client.post(CHAT, json={"messages": HELLO})
    assert response.status_code == 500
    assert "secret" not in error_of(response)["message"]


@pytest.mark.parametrize("reason", ["timeout", "abort"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_was_ended_has_what_there_is(reason: str, is_streamed: bool) -> None:
    llm = FakeAsyncLLM([events("as far "), events(reason=reason)])
    body: dict[str, Any] = {"messages": HELLO, "stream": is_streamed, "logprobs": False}
    response = client_of(llm).post(CHAT, json=body)
    assert response.status_code == 200
    if is_streamed:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "as far "
        assert choices[-1]["finish_reason"] == reason
    else:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("as far ", reason)


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_log_knows_what_a_request_made(has_text: bool, is_streamed: bool) -> None:
    async def run(last: Round, reason: str) -> Exchange:
        llm = FakeAsyncLLM([events("a ", "secret"), last])
        body = {"prompt": "x", "stream": is_streamed}
        exchange = Exchange(app_of(llm, log_text=has_text), COMPLETIONS, body)
        await until(lambda: llm.streams != [] and llm.streams[0].num_rounds == 2)
        if last is None:
            exchange.left.set()
        await exchange.task
        log = exchange.log
        assert (log.prompt_tokens, log.tokens, log.finish_reason) == (5, 2, reason)
        assert (log.prompt, log.answer) == (("x", "a secret") if has_text else (None, None))
        return exchange

    exchange = asyncio.run(run(events(reason="timeout"), "timeout"))
    assert '"id":"cmpl-req-1"' in exchange.text
    asyncio.run(run(None, "cancelled"))
    asyncio.run(run(RuntimeError("x"), "failed"))
