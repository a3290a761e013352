"""What the lines of a server's log say, and what they never do."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shlex
import threading
from collections.abc import Iterator

import pytest
from asgi_client import ask
from fake_async_llm import FakeAsyncLLM, events
from serve_app import CHAT, COMPLETIONS
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from engine.serve.app import create_app
from engine.serve.guard import Guard
from engine.serve.logs import FORMATS, LOG, log_loop_error, start_logging
from engine.serve.metrics import Metrics
from engine.serve.options import ServeOptions
from engine.serve.status import STATUS_PATHS

SECRET = "the launch code is xyzzy"
ANSWER = "never tell plugh"


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What is logged, in the format that the test's parameter names, or JSON."""
    root = logging.getLogger()
    before, level, can_raise = list(root.handlers), root.level, logging.raiseExceptions
    stream = io.StringIO()
    start_logging(getattr(request, "param", "json"), stream)
    yield stream
    logging.basicConfig(handlers=before, level=level, force=True)
    logging.raiseExceptions = can_raise
    threading.excepthook = threading.__excepthook__
    LOG.setLevel(logging.NOTSET)


both = pytest.mark.parametrize("log", FORMATS, indirect=True)


def lines(log: io.StringIO) -> list[dict[str, object]]:
    """The fields of each line, of either format."""
    made = []
    for line in log.getvalue().splitlines():
        if line.startswith("{"):
            made.append(json.loads(line))
            continue
        time, level, *rest = line.split(" ")
        fields = dict(word.split("=", 1) for word in shlex.split(" ".join(rest)) if "=" in word)
        made.append({"time": time, "level": level, **fields})
    return made


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    await request.body()
    record = request.state.log
    record.prompt_tokens, record.tokens, record.finish_reason = 7, 12, "stop"
    record.prompt, record.answer = SECRET, ANSWER
    if scope["path"] == "/fails":
        raise RuntimeError(f"could not answer {SECRET!r}")
    await PlainTextResponse(ANSWER)(scope, receive, send)


def asked(path: str = "/v1", app: object = application, **options: object) -> None:
    guard = Guard(app, ServeOptions(**options), Metrics())  # type: ignore[arg-type]
    headers = [("X-Request-Id", "trace-1"), ("Authorization", "Bearer sk-secret")]
    asyncio.run(ask(guard, "POST", path, headers, [json.dumps([SECRET]).encode()]))


@both
def test_a_request_is_one_line(log: io.StringIO) -> None:
    asked("/v1/x?password=sk-secret", api_keys=("sk-other", "sk-secret"))
    (line,) = lines(log)
    assert len(log.getvalue().splitlines()) == 1
    assert float(line.pop("seconds")) < 10  # type: ignore[arg-type]
    assert str(line.pop("time")).endswith("Z") and line.pop("message", "request") == "request"
    assert {name: str(value) for name, value in line.items()} == {
        "level": "INFO", "request_id": "trace-1", "method": "POST", "path": "/v1/x",
        "key": "key2", "status": "200", "prompt_tokens": "7", "tokens": "12",
        "finish_reason": "stop",
    }  # fmt: skip


@both
def test_no_line_holds_text_or_keys(log: io.StringIO) -> None:
    asked()
    asked(api_keys=("sk-secret",))
    asked(api_keys=("sk-another",))
    asked(max_body_bytes=5)
    with pytest.raises(RuntimeError):
        asked("/fails")
    said = log.getvalue()
    assert [str(line["status"]) for line in lines(log)[:4]] == ["200", "200", "401", "413"]
    assert not any(text in said for text in ("xyzzy", "plugh", "sk-secret", "sk-another"))
    asked(log_text=True)
    assert SECRET in log.getvalue() and ANSWER in log.getvalue(), "where it was asked for"


@both
def test_an_exception_is_logged_by_its_type_and_frames(log: io.StringIO) -> None:
    try:
        raise ValueError(f"got {SECRET!r}")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    (line,) = lines(log)
    assert line["error"] == "ValueError" and "xyzzy" not in log.getvalue()
    assert "test_an_exception_is_logged_by_its_type_and_frames" in str(line["frames"])


@both
def test_what_an_event_loop_catches_is_logged_like_that(log: io.StringIO) -> None:
    async def fail() -> None:
        raise ValueError(f"got {SECRET!r}")

    async def lose_a_task() -> None:
        asyncio.get_running_loop().set_exception_handler(log_loop_error)
        task = asyncio.create_task(fail())
        await asyncio.wait([task])

    asyncio.run(lose_a_task())
    (line,) = lines(log)
    assert (line["level"], line["error"]) == ("ERROR", "ValueError")
    assert "xyzzy" not in log.getvalue() and "never retrieved" in log.getvalue()


@both
def test_a_path_cannot_forge_a_line(log: io.StringIO) -> None:
    asked("/v1\n2026-01-01T00:00:00.000Z INFO ready status=200 \x1b[31m" + "x" * 1000)
    (line,) = lines(log)
    assert str(line["status"]) == "200" and "\x1b" not in log.getvalue()
    assert len(log.getvalue().splitlines()) == 1 and len(log.getvalue()) < 1000


def test_probes_are_logged_only_where_they_fail(log: io.StringIO) -> None:
    for path in STATUS_PATHS - {"/version"}:
        asked(path)
    assert not log.getvalue()
    asked("/metrics", api_keys=("sk-other",))
    assert [line["status"] for line in lines(log)] == [401]


def test_what_the_server_says_of_clients_that_speak_no_http_is_dropped(log: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("asyncio").warning("a callback took long")
    assert [line["level"] for line in lines(log)] == ["WARNING"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_application_fills_the_line_in(log: io.StringIO, path: str, stream: bool) -> None:
    """Prompt and answer with --log-text only."""
    llm = FakeAsyncLLM([events("ok", " then", reason="length")])
    body = {"messages": [{"role": "user", "content": SECRET}], "prompt": SECRET, "stream": stream}
    del body["prompt" if path == CHAT else "messages"]
    for log_text in (False, True):
        options = ServeOptions(log_text=log_text)
        app = Guard(create_app(llm, options, Metrics()), options, Metrics())  # type: ignore[arg-type]
        headers = [("Content-Type", "application/json")]
        asyncio.run(ask(app, "POST", path, headers, [json.dumps(body).encode()]))
        line = lines(log)[-1]
        assert (line["status"], line["prompt_tokens"], line["tokens"]) == (200, 5, 2), line
        assert line["finish_reason"] == "length"
        assert (SECRET in str(line.get("prompt"))) == log_text
        assert line.get("answer") == ("ok then" if log_text else None)
