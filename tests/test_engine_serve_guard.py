"""What the guard of a server refuses, and that it costs nothing to refuse it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from asgi_client import LEAVE, Answer, Pairs, ask, scope_of
from fake_async_llm import FakeAsyncLLM, events
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import Message, Receive, Scope, Send

from engine.serve import guard
from engine.serve.app import create_app
from engine.serve.guard import MAX_DEPTH, MAX_HEADER_BYTES, Guard, depth, read_keys
from engine.serve.metrics import Metrics
from engine.serve.options import ServeOptions
from engine.serve.status import STATUS_PATHS, Status

KEYS = ("sk-first", "sk-second", "sk-third")


class Application:
    """Tells what it was asked, and how often; on /wait once `go` is set."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_calls += 1
        request = Request(scope, receive)
        body = await request.body()
        if scope["path"] == "/wait":
            await self.go.wait()
        if scope["path"] == "/fails":
            raise RuntimeError("the application broke")
        if scope["path"] == "/page":
            await HTMLResponse("<p>")(scope, receive, send)
        else:
            told = {"size": len(body), "id": request.state.request_id, "key": request.state.log.key}
            await JSONResponse(told)(scope, receive, send)


def guarded(**options: Any) -> Guard:
    return Guard(Application(), ServeOptions(**options), Metrics(), body_seconds=0.2)


def asked(
    app: Guard,
    headers: Pairs = (),
    chunks: Iterable[bytes] = (b"",),
    method: str = "POST",
    path: str = "/v1",
    **how: Any,
) -> Answer:
    return asyncio.run(ask(app, method, path, headers, chunks, **how))


def bearer(key: str, scheme: str = "Bearer") -> Pairs:
    return [("Authorization", f"{scheme} {key}")]


def rejected(app: Guard, reason: str) -> float:
    name = "knnssd:admission_rejections_total"
    value = app._metrics.registry.get_sample_value(name, {"reason": reason})
    assert value is not None, reason
    return value


def test_a_request_id_is_kept_where_it_is_fit_to_be_and_made_otherwise() -> None:
    for given_id in ("a", "trace-7/8_9", "~" * 128):
        answer = asked(guarded(), [("X-Request-Id", given_id)])
        assert answer.headers["x-request-id"] == json.loads(answer.body)["id"] == given_id
    made = set()
    for given_id in ("", " ", "a b", "a\nb", "é", "x" * 129, "\x7f"):
        answer = asked(guarded(), [("X-Request-Id", given_id)])
        made.add(answer.headers["x-request-id"])
        assert answer.headers["x-request-id"] == json.loads(answer.body)["id"]
    assert len(made) == 7 and all(each.startswith("req-") and len(each) == 28 for each in made)
    refused = asked(guarded(api_keys=KEYS), [("X-Request-Id", "mine")])
    assert refused.status == 401 and refused.headers["x-request-id"] == "mine"


def whole_server() -> tuple[Guard, list[str]]:
    """The server's application behind keys, ready, and every path that it knows or does not."""
    llm, options, metrics = FakeAsyncLLM([events("ok", reason="stop")]), ServeOptions(), Metrics()
    app = create_app(llm, options, metrics)  # type: ignore[arg-type]
    status = Status(metrics)
    status.app, status.phase = app, "ready"
    known = {getattr(route, "path", "") for route in app.routes}
    known |= set(app.openapi()["paths"])
    paths = known | STATUS_PATHS | {"/", "/docs", "/redoc", "/openapi.json", "/nothing", ""}
    paths |= {"//health", "/health/", "/health/../v1/models", "/HEALTH", "/ready/x", "/v1"}
    return Guard(status, ServeOptions(api_keys=KEYS), metrics), sorted(paths)


def test_every_route_but_two_needs_a_key() -> None:
    app, paths = whole_server()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"} <= {*paths}
    wrong: list[Pairs] = [
        [], bearer("sk-wrong"), bearer(""), bearer("sk-firs"), bearer("sk-first-"),
        bearer("SK-FIRST"), bearer("sk-first", "Basic"), bearer("é"), [("Authorization", KEYS[0])],
        [("X-Api-Key", KEYS[0])],
    ]  # fmt: skip
    for path in paths:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"):
            for headers in wrong if method in ("GET", "POST") else wrong[:1]:
                answer = asked(app, headers, method=method, path=path)
                if path in ("/health", "/ready"):
                    assert answer.status == (200 if method in ("GET", "HEAD") else 405)
                    continue
                assert answer.status == 401, (method, path, headers)
                challenge = answer.headers["www-authenticate"]
                assert challenge.partition(" ")[0] == ("Basic" if path == "/" else "Bearer")
                assert answer.error["code"] == "unauthorized" and answer.num_received == 0
                assert not any(key in answer.body.decode() for key in KEYS)
        for key in KEYS:
            for scheme in ("Bearer", "bearer"):
                answer = asked(app, bearer(key, scheme), method="GET", path=path)
                assert answer.status not in (401, 500), path


def test_a_browser_asks_for_the_key_of_the_page_and_of_nothing_else() -> None:
    app, paths = whole_server()

    def basic(password: str) -> Pairs:
        return bearer(base64.b64encode(f"anyone:{password}".encode()).decode(), "Basic")

    for path in paths:
        if path not in ("/health", "/ready"):
            answer = asked(app, basic(KEYS[1]), method="GET", path=path)
            assert (answer.status != 401) == (path == "/"), path
    for headers in (basic("wrong"), basic(""), bearer("no base64!", "Basic"), bearer("", "Basic")):
        assert asked(app, headers, method="GET", path="/").status == 401


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: Any) -> None:
    compared = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(guard, "hmac", type("Hmac", (), {"compare_digest": compare}))
    app = guarded(api_keys=KEYS)
    for index, key in enumerate((*KEYS, "", "x" * 5000)):
        compared.clear()
        answer = asked(app, bearer(key))
        assert len(compared) == len(KEYS), "whichever is right, all are compared"
        assert {len(value) for pair in compared for value in pair} == {32}, "of one length"
        if index < len(KEYS):
            assert json.loads(answer.body)["key"] == f"key{index + 1}"
        else:
            assert answer.status == 401


def test_a_body_is_counted_as_it_arrives() -> None:
    app = guarded(max_body_bytes=1000)
    for chunks in ([b"x" * 1000], [b"x" * 400, b"", b"x" * 600], [b"1"] * 1000):
        for has_length in (True, False):
            answer = asked(app, chunks=chunks, has_length=has_length)
            assert answer.status == 200 and json.loads(answer.body)["size"] == 1000
    declared = asked(app, chunks=[b"x" * 1001])
    assert (declared.status, declared.num_received) == (413, 0), "nothing was read"
    for chunks in ([b"x" * 1001], [b"x" * 1000, b"x"]):
        assert asked(app, chunks=chunks, has_length=False).status == 413
    endless = (b"x" * 400 for _ in range(1000))
    streamed = asked(app, chunks=endless, has_length=False)
    assert (streamed.status, streamed.num_received) == (413, 3), "no more was read"
    lying = asked(app, [("Content-Length", "5")], [b"x" * 2000], has_length=False)
    assert lying.status == 413 and lying.error["type"] == "invalid_request_error"
    assert rejected(app, "too_large") == 5


def test_what_follows_the_body_reaches_the_application() -> None:
    """A client that leaves while it is answered."""
    seen = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])

    app = Guard(application, ServeOptions(), Metrics())
    assert asked(app, chunks=[b"ab", b"c", b"", LEAVE]).status is None and not seen
    messages = [{"type": "http.request", "body": b"abc", "more_body": False}]
    messages += [{"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    expected = list(messages)
    asyncio.run(app(scope_of("POST", "/v1"), receive, None))  # type: ignore[arg-type]
    assert seen == expected


def test_a_client_that_leaves_or_is_slow_holds_nothing() -> None:
    app = guarded(max_requests_per_key=1)
    for _ in range(3):
        assert asked(app, chunks=[b"half", LEAVE], has_length=False).status is None
    assert app._app.num_calls == 0  # type: ignore[attr-defined]

    async def slow() -> Answer:
        never = asyncio.Event()

        async def receive() -> Message:
            await never.wait()
            raise AssertionError

        sent = []

        async def send(message: Message) -> None:
            sent.append(message)

        await app(scope_of("POST", "/v1", [("Content-Length", "9")]), receive, send)
        return Answer(sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"], 1)

    answer = asyncio.run(slow())
    assert answer.status == 408 and answer.error["code"] == "too_slow"
    assert answer.headers[b"connection"] == b"close"  # type: ignore[index]
    assert rejected(app, "too_slow") == 1
    assert asked(app).status == 200, "the place is free"


def test_each_key_has_its_own_requests_at_once() -> None:
    app = guarded(api_keys=KEYS, max_requests_per_key=2)
    application: Any = app._app

    async def crowd() -> None:
        first = bearer(KEYS[0])
        running = [asyncio.create_task(ask(app, "POST", "/wait", first)) for _ in range(2)]
        while application.num_calls < 2:
            await asyncio.sleep(0)
        refused = await ask(app, "POST", "/v1", first, [b"x" * 99])
        assert (refused.status, refused.num_received) == (429, 0)
        assert int(refused.headers["retry-after"]) > 0
        assert refused.error["type"] == "rate_limit_error"
        assert (await ask(app, "POST", "/v1", bearer(KEYS[1]))).status == 200, "another key"
        application.go.set()
        assert [(await each).status for each in running] == [200, 200]
        with pytest.raises(RuntimeError):
            await ask(app, "POST", "/fails", first)
        for _ in range(3):
            assert (await ask(app, "POST", "/v1", first)).status == 200

    asyncio.run(crowd())
    assert rejected(app, "per_key_limit") == 1 and not app._num_running


def test_without_keys_an_address_is_what_is_counted_and_probes_are_not() -> None:
    app = guarded(max_requests_per_key=1)
    application: Any = app._app

    async def crowd() -> None:
        running = asyncio.create_task(ask(app, "POST", "/wait", client="10.0.0.1"))
        while not application.num_calls:
            await asyncio.sleep(0)
        assert (await ask(app, "POST", "/v1", client="10.0.0.1")).status == 429
        for path in STATUS_PATHS:
            assert (await ask(app, "GET", path, client="10.0.0.1")).status == 200, path
        assert (await ask(app, "POST", "/v1", client="10.0.0.2")).status == 200
        application.go.set()
        assert (await running).status == 200

    asyncio.run(crowd())


def test_headers_have_a_size() -> None:
    app = guarded()
    assert asked(app, [("X", "y")] * 100).status == 200
    for headers, path in (
        ([("X", "y")] * 200, "/v1"),
        ([("X", "y" * MAX_HEADER_BYTES)], "/v1"),
        ([], "/" + "v" * MAX_HEADER_BYTES),
        ([], "/v1?" + "v" * MAX_HEADER_BYTES),
        ([("X", "y" * 200)] * 99, "/health"),
    ):
        answer = asked(app, headers, path=path)
        assert answer.status == 431 and answer.error["code"] == "too_many_headers"


KEY = st.text('["\\}')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\/aé\n☃', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=30,
)  # fmt: skip


def nesting(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(nesting, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.booleans())
def test_depth_is_that_of_the_document(value: Any, is_ascii: bool) -> None:
    assert depth(json.dumps(value, ensure_ascii=is_ascii).encode()) == nesting(value)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (MAX_DEPTH + 1), b"[" * 1_000_000, b'{"a":' * 200_000, b"[{" * 40,
        b'["\\\\",' * (MAX_DEPTH + 1), json.dumps(["x"]).encode("utf-16"),
        b'"' + "\u5b22".encode("utf-16-le") + b"[" * 100, b"\0",
    ],
    ids=["65", "million", "objects", "mixed", "escapes", "utf-16", "quotes in utf-16", "nul"],
)  # fmt: skip
def test_what_would_exhaust_a_parser_is_refused(body: bytes) -> None:
    app = guarded()
    answer = asked(app, chunks=[body])
    assert answer.status == 400 and answer.error["type"] == "invalid_request_error"
    assert app._app.num_calls == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * MAX_DEPTH, b'"' + b"[" * 1000 + b'"', b'"\\"' + b"[" * 1000 + b'"', b"[]" * 500_000,
        b'"' + b'\\"' * 500_000, b'"' * 1_000_000, b'"\\' * 500_000, b"\\" * 1_000_000,
    ],
)  # fmt: skip
def test_what_is_not_deep_passes_soon(body: bytes) -> None:
    """In time that grows with the body's length only, also where it is no JSON."""
    assert asked(guarded(), chunks=[body]).status == 200


def test_answers_say_how_a_browser_must_treat_them() -> None:
    answer = asked(guarded())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "x-frame-options" not in answer.headers
    page = asked(guarded(), path="/page")
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"


def key_file(tmp_path: Path, text: bytes, mode: int = 0o600) -> str:
    path = tmp_path / "keys"
    path.write_bytes(text)
    path.chmod(mode)
    return str(path)


def test_a_key_file_holds_keys_and_comments(tmp_path: Path) -> None:
    text = b"# of the team\n\nsk-1\n  sk-2 \r\n#sk-3\nsk-1\n"
    for mode in (0o600, 0o400, 0o640):
        assert read_keys(key_file(tmp_path, text, mode)) == ("sk-1", "sk-2")
        (tmp_path / "keys").unlink()


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (b"sk-secret\n", 0o604, "chmod 600"), (b"sk-secret\n", 0o602, "chmod 600"),
        (b"", 0o600, "no key"), (b"# sk-secret\n\n", 0o600, "no key"),
        (b"ok\nsk-secret and more\n", 0o600, "key 2"), (b"sk-secret\xff\n", 0o600, "key 1"),
        (b"sk-secret" * 99, 0o600, "key 1"),
    ],
)  # fmt: skip
def test_a_key_file_is_refused(tmp_path: Path, text: bytes, mode: int, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read_keys(key_file(tmp_path, text, mode))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="--api-key-file"):
            read_keys(str(path))


def test_without_a_key_a_request_must_call_this_machine_by_its_own_name() -> None:
    app = guarded(hosts=("127.0.0.1", "localhost", "::1", "[::1]"))
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "[::1]"):
        assert asked(app, [("Host", host)]).status == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost."):
        answer = asked(app, [("Host", host)])
        assert (answer.status, answer.num_received) == (421, 0), host
    assert asked(guarded(), [("Host", "any.example")]).status == 200
