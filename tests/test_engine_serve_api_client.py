"""OpenAI's own client, over a socket: it parses everything into its types."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from fake_async_llm import FakeAsyncLLM, events
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve_app import HELLO, app_of, ascii_llm, recorder, served

from engine.async_llm import AsyncLLM, Draining, QueueFull

Messages: Any = HELLO
CHAT: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 3, "max_completion_tokens": 12}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with AsyncLLM(ascii_llm(max_sequences=4)) as llm, served(app_of(llm)) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def strict(answer: Any, kind: type) -> Any:
    """The answer, of which every field has the type that the client's models say."""
    assert type(answer) is kind
    values = answer.model_dump(mode="json")
    for choice in values.get("choices", ()):
        if kind is Completion:  # whose finish_reason is null in OpenAI's own chunks as well
            choice["finish_reason"] = choice["finish_reason"] or "stop"
    kind.model_validate(values)
    return answer


def test_a_chat(client: OpenAI) -> None:
    body = strict(
        client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3, n=2), ChatCompletion
    )
    assert body.object == "chat.completion" and abs(body.created - time.time()) < 60
    assert [choice.index for choice in body.choices] == [0, 1]
    for choice in body.choices:
        assert choice.message.role == "assistant"
        entries = choice.logprobs.content
        written = b"".join(bytes(entry.bytes) for entry in entries).decode()
        assert written.removesuffix("\x02") == choice.message.content
        assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens
    assert body.usage.prompt_tokens_details.cached_tokens >= 0
    assert body.usage.completion_tokens_details.accepted_prediction_tokens >= 0


def test_a_streamed_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    stream = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    *chunks, last = [strict(chunk, ChatCompletionChunk) for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in [*chunks, last]} == {last.id}


def test_the_helper_that_gathers_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    with client.chat.completions.stream(**CHAT) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_completions(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": [97, 98], "seed": 1, "logprobs": 5}
    body = strict(client.completions.create(**asked), Completion)
    logprobs = body.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == body.usage.completion_tokens
    stream = client.completions.create(**asked, stream=True)
    chunks = [strict(chunk, Completion) for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == body.choices[0].text


def test_extensions_and_a_conversation(client: OpenAI) -> None:
    extra = {"top_k": 5, "min_tokens": 4, "speculative": {"detail": True, "method": "ngram"}}
    first = client.chat.completions.create(**CHAT, extra_body=extra)
    assert first.speculative["plan"] == "ngram"  # type: ignore[attr-defined]
    # The client's own object of an answer goes back as it is.
    messages = [*HELLO, first.choices[0].message, {"role": "user", "content": "And?"}]
    body = client.chat.completions.create(**CHAT | {"messages": messages})
    assert body.usage is not None and body.usage.prompt_tokens > first.usage.prompt_tokens


def test_models(client: OpenAI) -> None:
    (card,) = client.models.list()
    assert strict(card, Model).id == "tiny"
    assert strict(client.models.retrieve("tiny"), Model) == card


def test_errors_are_the_client_s(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, temperature=-1)
    assert caught.value.param == "temperature" and "expected at least" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**CHAT | {"model": "gpt-4o"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(**CHAT, logit_bias={"1": 1})


@pytest.mark.parametrize("error", [QueueFull("full"), Draining("draining")])
def test_a_client_tries_again(error: Exception) -> None:
    llm = FakeAsyncLLM([events("yes", reason="stop")], errors={0: error})
    asked = CHAT | {"model": "fake"}
    with (
        served(app_of(llm)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as impatient,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            impatient.chat.completions.create(**asked)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        assert impatient.chat.completions.create(**asked).choices[0].message.content == "yes"


def test_a_failure_in_a_stream_is_an_error() -> None:
    llm = FakeAsyncLLM([events("a"), RuntimeError("secret")])
    with (
        served(app_of(llm)) as address,
        OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(**CHAT | {"model": "fake"}, stream=True)
        assert next(stream).choices[0].delta.content == "a"
        with pytest.raises(openai.APIError, match="the request failed"):
            next(stream)


def test_asynchronous(address: str) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            bodies = await asyncio.gather(
                *(client.chat.completions.create(**CHAT | {"seed": seed}) for seed in range(12))
            )
            stream = await client.chat.completions.create(**CHAT | {"seed": 7}, stream=True)
            text = ""
            async for chunk in stream:
                text += strict(chunk, ChatCompletionChunk).choices[0].delta.content or ""
            assert text == bodies[7].choices[0].message.content
            assert len({body.id for body in bodies}) == 12

    asyncio.run(run())


def test_a_client_that_breaks_off_frees_its_slot() -> None:
    """Streamed and not; over a socket, which the server sees close."""
    llm = FakeAsyncLLM([events("a"), None])
    app = app_of(llm)
    asked = CHAT | {"model": "fake"}
    with (
        served(app) as address,
        OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=0.5) as client,
    ):
        stream = client.chat.completions.create(**asked, stream=True)
        next(stream)
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**asked)
        end = time.monotonic() + 10
        while len(recorder(app).named("cancelled")) < 2:
            assert time.monotonic() < end, recorder(app).calls
            time.sleep(0.01)
    assert all(stream.is_closed for stream in llm.streams)


def test_a_socket_that_is_not_read_is_given_up() -> None:
    """Chunks fill the buffers of both sides; then the answer stands still, and ends."""
    llm = FakeAsyncLLM([events("x" * 10_000) for _ in range(5_000)])
    app = app_of(llm, stall_timeout=0.5)
    body = b'{"prompt": "x", "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with served(app) as address, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((urlsplit(address).hostname, urlsplit(address).port))
        reader.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        end = time.monotonic() + 20
        while not recorder(app).named("cancelled"):
            assert time.monotonic() < end
            time.sleep(0.01)
        (stream,) = llm.streams
        assert stream.is_closed and stream.num_rounds < 2_000
