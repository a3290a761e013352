"""The server's application over any engine, and requests to it, with and without a socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message
from tiny import family_config, tiny_llm

from engine import LLM
from engine.async_llm import AsyncLLM
from engine.serve.app import create_app
from engine.serve.logs import RequestLog
from engine.serve.options import ServeOptions
from models.chat_template import ChatTemplate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Recorder:
    """Metrics that remember what they were told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: self.calls.append((name, *values))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [values for called, *values in self.calls if called == name]


def app_of(llm: Any, **options: Any) -> FastAPI:
    return create_app(llm, ServeOptions(**options), Recorder())  # type: ignore[arg-type]


def recorder(app: Any) -> Recorder:
    return app.state.serving.metrics


def client_of(llm: Any, **options: Any) -> TestClient:
    return TestClient(app_of(llm, **options))


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The JSON of each event of a stream that has ended as it must."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), text
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: Any) -> dict[str, Any]:
    """The error of a response, whose body must be OpenAI's."""
    body = response.json()
    assert body.keys() == {"error"}, body
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}, body
    assert isinstance(error["message"], str) and error["message"].isprintable()
    assert "Traceback" not in error["message"] and "File " not in error["message"]
    return error


class Exchange:
    """One request to an application without a socket, whose client can stop reading and leave."""

    def __init__(self, app: ASGIApp, path: str, body: Any) -> None:
        self.sent: list[Message] = []
        self.left, self.reading = asyncio.Event(), asyncio.Event()
        self.reading.set()
        self.log = RequestLog("req-1", "POST", path)
        self._body: bytes | None = json.dumps(body).encode()
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "state": {"log": self.log, "request_id": self.log.request_id},
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(self._scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.reading.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait, in this event loop, until something is so; a failure if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.002)


def wait_idle(llm: AsyncLLM) -> None:
    """Until the engine has nothing to do; a failure if a request is left in it."""
    end = time.monotonic() + 10
    while llm.load.running or llm.load.waiting:
        assert time.monotonic() < end, llm.load
        time.sleep(0.002)


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The address of a server of `app` on a port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def ascii_llm(max_positions: int = 256, **options: Any) -> LLM:
    """A tiny model that writes nothing but ASCII, a character a token; \\x02 ends its answers.

    Without <bos> in its vocabulary, it takes completions of token ids only.
    """
    ends = {"eos_token_ids": (2,), "max_positions": max_positions}
    config = family_config("llama2", vocab_size=128, **ends)
    return tiny_llm(config, **{"chat_template": ChatTemplate(TEMPLATE, "tiny"), **options})
