"""Answers over HTTP: whole, or as server-sent events, one for each round of each answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from json import JSONEncoder
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from engine.serve.answers import Answers, until_left
from engine.serve.errors import LEFT, ApiError
from engine.serve.logs import LOG
from engine.serve.sampling import wants_detail
from engine.serve.schemas import GenerationBody, StreamOptions
from engine.serve.serving import Serving
from engine.types import TokenEvent

encode = JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Form(Protocol):
    """How one kind of answer is written. prefix: of ids; kinds: the "object" whole and streamed."""

    prefix: str
    kinds: tuple[str, str]

    def delta(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """What a chunk says of choice `index`; None while there is nothing to say."""

    def whole(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Choice `index`, from all its events."""


async def respond(request: Request, body: GenerationBody, answers: Answers, form: Form) -> Response:
    """The response to a request whose answers have been started. It closes them."""
    serving = Serving.of(request)
    head = serving.head(request, form.prefix, form.kinds[bool(body.stream)])
    if body.stream:
        chunks = _chunks(body, answers, form, encode(head)[:-1])
        return EventStream(chunks, answers, serving.options.stall_timeout)
    events = await until_left(answers.all(), request.receive, answers.close)
    if events is None:
        return Response(status_code=LEFT)
    choices = [form.whole(index, each) for index, each in enumerate(events)]
    content = {**head, "choices": choices, "usage": answers.usage(body.n or 1)}
    if wants_detail(body):
        content["speculative"] = answers.speculation(0)
    return Response(encode(content), media_type="application/json")


async def _chunks(
    body: GenerationBody, answers: Answers, form: Form, head: str
) -> AsyncGenerator[bytes, None]:
    """The events of a stream. head: what every chunk begins with, as JSON without its end."""
    is_detailed = wants_detail(body)
    wanted = body.stream_options or StreamOptions()
    counts_usage, counts_always = wanted.include_usage, wanted.continuous_usage_stats
    try:
        async for index, events in answers.rounds():
            choice = form.delta(index, events)
            if choice is None:
                continue
            content: dict[str, Any] = {"choices": [choice]}
            if counts_usage:
                content["usage"] = answers.usage(body.n or 1) if counts_always else None
            if is_detailed:
                choice["pieces"] = [
                    {"text": event.text, "drafted": event.from_draft}
                    for event in events
                    if event.text or event.token_id is not None
                ]
                if events[-1].finish_reason is not None:
                    content["speculative"] = answers.speculation(index)
            yield f"data: {head},{encode(content)[1:]}\n\n".encode()
        if counts_usage:
            content = {"choices": [], "usage": answers.usage(body.n or 1)}
            yield f"data: {head},{encode(content)[1:]}\n\n".encode()
    except ApiError as error:
        yield f"data: {encode(error.body)}\n\n".encode()
    yield b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends events until they end, the client leaves, or takes nothing for `stall_timeout` s."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], answers: Answers, stall_timeout: float
    ) -> None:
        # Proxies are told to pass events on as they come.
        super().__init__(chunks, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks, self._answers, self._stall_timeout = chunks, answers, stall_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_left(self._send_all(send), receive, self._close)

    async def _send_all(self, send: Send) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            LOG.warning("a reader took nothing for %g s", self._stall_timeout)
            task.cancel()

        async def send_in_time(message: Message) -> None:
            stalled = loop.call_later(self._stall_timeout, stop)
            try:
                await send(message)
            finally:
                stalled.cancel()

        await self.stream_response(send_in_time)

    async def _close(self) -> None:
        await self._chunks.aclose()
        await self._answers.close()
