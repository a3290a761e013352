"""A stand-in for the server that speaks the page's part of its API and answers by rule.

The last word of the question chooses the answer, see `Stub.chat`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import cycle, pairwise
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from engine.serve.page import page_router

# Tokens and whether they were drafted. Spaces, signs of 2 to 4 bytes, and a token without text yet.
TOKENS = [
    ("The", False), (" waves", True), (" of the sea", True), (" rôle", False), ("", True),
    (" 🌊", True), (" on.\n\nThe", False), (" waves", True), (" <end>", False),
]  # fmt: skip
MARKUP = '<script>window.ran = 1</script><img src="x" onerror="window.ran = 1"><b>bold</b>'
COST = {
    "plan": "int8+ngram", "domain": "story_telling", "similarity": 0.91234, "rounds": 4,
    "tokens_per_round": 2.25, "drafted": 8, "accepted": 5, "tokens_per_second": 312.4,
    "plain_tokens_per_second": 233.0, "queue_seconds": 0.0, "prefill_seconds": 0.02,
    "decode_seconds": 0.1, "reused_tokens": 31,
}  # fmt: skip
USAGE = {"prompt_tokens": 58, "completion_tokens": 9, "total_tokens": 67}


class Stub:
    """The stand-in. `bodies` are the requests for answers, `cut` counts answers that were cut off
    by the client, `key` is the API key it wants.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.cut = 0
        self.key = ""
        self.app = FastAPI()
        self.app.include_router(page_router())
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    def reset(self) -> None:
        self.bodies, self.cut, self.key = [], 0, ""

    def refused(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return refusal(401, "got no valid API key, expected\none")

    async def models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"data": [{"id": "tiny/model"}]})

    async def chat(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.bodies.append(body)
        match body["messages"][-1]["content"].split()[-1]:
            case "busy":
                return refusal(503, "the queue is full", {"Retry-After": "7"})
            case "slow":
                stream = self.slow()
            case "markup":
                stream = whole(
                    [chunk([(MARKUP, False)]), last({**COST, "domain": MARKUP}), "[DONE]"]
                )
            case "plain":
                stream = whole([{"choices": [{"delta": {"content": "As others do."}}]}, "[DONE]"])
            case "failing":
                stream = self.open([chunk([("Half", False)]), {"error": {"message": "no memory"}}])
            case "broken":
                stream = whole([chunk([("Half", False)])])
            case _:
                stream = whole([*map(chunk, rounds()), last(COST), usage(), "[DONE]"])
        return StreamingResponse(stream, media_type="text/event-stream")

    async def slow(self) -> AsyncIterator[bytes]:
        """Two tokens a round, until the client goes."""
        try:
            while True:
                yield sse(chunk([(" tick", False), (" tock", True)]))
                await asyncio.sleep(0.01)
        finally:
            self.cut += 1

    async def open(self, events: list[dict[str, Any] | str]) -> AsyncIterator[bytes]:
        """A stream that does not end with its last event."""
        async for data in whole(events):
            yield data
        async for data in self.slow():
            yield data


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message}}, status, headers)


def rounds() -> list[list[tuple[str, bool]]]:
    """TOKENS by round: a round ends with the model's own token."""
    made: list[list[tuple[str, bool]]] = [[]]
    for token in TOKENS:
        made[-1].append(token)
        if not token[1]:
            made.append([])
    return made[:-1]


def chunk(tokens: list[tuple[str, bool]]) -> dict[str, Any]:
    pieces = [{"text": text, "drafted": drafted} for text, drafted in tokens]
    content = "".join(text for text, _ in tokens)
    return {"choices": [{"delta": {"content": content}, "pieces": pieces, "finish_reason": None}]}


def last(cost: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"delta": {}, "finish_reason": "length"}], "speculative": cost}


def usage() -> dict[str, Any]:
    return {"choices": [], "usage": USAGE}


def sse(event: dict[str, Any] | str, end: str = "\n") -> bytes:
    data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return f"data: {data}{end}{end}".encode()


async def whole(events: list[dict[str, Any] | str]) -> AsyncIterator[bytes]:
    """The stream with both ends of lines and comments, cut inside of signs and of ends of lines."""
    ends = cycle(["\n", "\r\n"])
    data = b": keep alive\n\n".join(sse(event, next(ends)) for event in events)
    cuts = [i for i in range(1, len(data)) if data[i] in b"\r\n" or data[i] & 0xC0 == 0x80]
    for start, end in pairwise([0, *cuts, len(data)]):
        yield data[start:end]
        await asyncio.sleep(0.001)  # so that it is sent, and read, on its own
