"""Asks an ASGI application as a server would, message by message, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message

Pairs = Sequence[tuple[str, str]]
LEAVE: bytes = b"\0leave"  # instead of a chunk: the client goes away


class Answer(NamedTuple):
    """What came back. num_received: how often the application asked for more of the request."""

    status: int | None
    headers: dict[str, str]
    body: bytes
    num_received: int

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that has OpenAI's shape, and nothing else."""
        document = json.loads(self.body)
        assert document.keys() == {"error"}, document
        assert document["error"].keys() == {"message", "type", "param", "code"}, document
        assert isinstance(document["error"]["message"], str) and document["error"]["type"]
        return document["error"]


def scope_of(
    method: str, path: str, headers: Pairs = (), client: str = "127.0.0.1"
) -> dict[str, Any]:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    target, _, query = path.partition("?")
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": target, "raw_path": target.encode(), "root_path": "",
        "query_string": query.encode(), "headers": raw, "client": (client, 1), "state": {},
        "server": ("127.0.0.1", 8000),
    }  # fmt: skip


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    headers: Pairs = (),
    chunks: Iterable[bytes] = (b"",),
    *,
    client: str = "127.0.0.1",
    has_length: bool = True,
) -> Answer:
    """chunks: of the body, as they arrive; after the last, nothing comes."""
    parts = list(chunks)
    if has_length and (size := sum(map(len, parts))):
        headers = [*headers, ("Content-Length", str(size))]
    messages, num_received = list[Message](), 0

    async def receive() -> Message:
        nonlocal num_received
        num_received += 1
        await asyncio.sleep(0)
        if not parts:
            await asyncio.Event().wait()
        chunk = parts.pop(0)
        if chunk == LEAVE:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": bool(parts)}

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope_of(method, path, headers, client), receive, send)
    if not messages:
        return Answer(None, {}, b"", num_received)
    first, *rest = messages
    got = {name.decode(): value.decode() for name, value in first["headers"]}
    return Answer(
        first["status"], got, b"".join(message.get("body", b"") for message in rest), num_received
    )
