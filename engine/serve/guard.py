"""Who may ask, and how much, before the application sees a request: plain ASGI around it.

In this order: a request id, the headers' size, the API key, requests at once, the body's size and
the time it takes, its nesting. What is refused has cost no more than it took to see that.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.errors import ApiError
from engine.serve.logs import RequestLog
from engine.serve.metrics import Metrics
from engine.serve.options import ServeOptions
from engine.serve.status import STATUS_PATHS

PAGE = "/"  # whose key a browser asks for
PUBLIC = {"/health", "/ready"}  # the routes that need no key
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10  # names, values and the target together
MAX_DEPTH = 64  # of arrays and objects in a body
BODY_SECONDS = 60.0  # in which a body must have come
MAX_KEY_BYTES, MAX_KEY_FILE = 512, 1 << 20
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_NO_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class Refused(Exception):
    """A request that is answered with `error` and goes no further; `reason` is for the metrics."""

    def __init__(
        self, reason: str, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.error = ApiError(status, message, code=reason, headers=headers)


class Guard:
    """The outermost application of a server. It logs every request that it has seen.

    options: keys, limits, and whether logs may hold text. Where there are keys, each may have
    `max_requests_per_key` requests at once; without, each client address may, behind a proxy all
    clients together. body_seconds: in which a body must have come.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        metrics: Metrics,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._body_seconds = body_seconds
        # Digests, so that not even the length of a key can be measured.
        self._keys = [sha256(key.encode()).digest() for key in options.api_keys]
        self._num_running = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The server is told to run neither lifespans nor web sockets.
        assert scope["type"] == "http", scope["type"]
        headers, begin = Headers(scope=scope), perf_counter()
        log = RequestLog(_request_id(headers), scope["method"], scope["path"])
        scope.setdefault("state", {}).update(log=log, request_id=log.request_id)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = log.request_id
                marked["X-Content-Type-Options"] = "nosniff"
                if marked.get("content-type", "").startswith("text/html"):
                    marked.setdefault("X-Frame-Options", "DENY")
                    marked.setdefault("Referrer-Policy", "no-referrer")
            await send(message)

        try:
            await self._pass_on(scope, headers, log, receive, send_marked)
        except Refused as refused:
            self._metrics.rejected(refused.reason)
            await refused.error.response(scope, receive, send_marked)
        finally:
            log.seconds = perf_counter() - begin
            log.write(has_text=self._options.log_text)

    async def _pass_on(
        self, scope: Scope, headers: Headers, log: RequestLog, receive: Receive, send: Send
    ) -> None:
        """Let the application answer what is in order; raises Refused else, before any answer."""
        _check_size(scope)
        if scope["path"] in PUBLIC:
            await self._app(scope, receive, send)
            return
        self._check_host(headers)
        log.key = self._key_name(scope["path"], headers)
        if scope["path"] in STATUS_PATHS:  # also of a client whose other requests are too many
            await self._app(scope, receive, send)
            return
        client = scope.get("client") or ("",)
        with self._running(log.key or client[0]):
            body = await self._body(headers, receive)
            if body is None:  # the client has gone
                return
            _check_json(body)
            is_read = False

            async def receive_again() -> Message:
                nonlocal is_read
                if is_read:
                    return await receive()
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app(scope, receive_again, send)

    def _check_host(self, headers: Headers) -> None:
        """A page of another site that has its name point here must not read answers."""
        given = headers.get("host", "").lower()
        name = given if given.endswith("]") else given.rpartition(":")[0] or given
        if self._options.hosts and name not in self._options.hosts:
            message = (
                f"host: expected one of {', '.join(self._options.hosts)} where no key is needed; "
                "start the server with --api-key-file for other names"
            )
            raise Refused("bad_request", 421, message)

    def _key_name(self, path: str, headers: Headers) -> str | None:
        """Which key the request shows; None where none is needed.

        The page's is a password, which browsers ask for; a site's script cannot make them send it
        to another route.
        """
        if not self._keys:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_page, is_basic = path == PAGE, scheme.lower() == "basic"
        key = _password(given) if is_page and is_basic else given.strip().encode("latin-1")
        # Every key is compared, whichever is right.
        matches = [hmac.compare_digest(sha256(key).digest(), each) for each in self._keys]
        is_known = scheme.lower() == "bearer" or (is_page and is_basic)
        if not is_known or True not in matches:
            message = "a valid API key is needed: send the header Authorization: Bearer KEY"
            challenge = 'Basic realm="an API key is the password"' if is_page else "Bearer"
            raise Refused("unauthorized", 401, message, {"WWW-Authenticate": challenge})
        return f"key{matches.index(True) + 1}"

    @contextmanager
    def _running(self, name: str) -> Iterator[None]:
        limit = self._options.max_requests_per_key
        if self._num_running[name] >= limit:
            message = f"{limit} requests of yours run already; try again when one has ended"
            raise Refused("per_key_limit", 429, message, {"Retry-After": "1"})
        self._num_running[name] += 1
        try:
            yield
        finally:
            self._num_running[name] -= 1
            if not self._num_running[name]:
                del self._num_running[name]

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None where the client went away before it had sent that."""
        limit = self._options.max_body_bytes
        too_large = Refused("too_large", 413, f"the body is larger than {limit} bytes")
        if int(headers.get("content-length", "0")) > limit:
            raise too_large

        async def read() -> bytes | None:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), self._body_seconds)
        except asyncio.TimeoutError:
            message = f"the body did not come within {self._body_seconds:g} seconds"
            raise Refused("too_slow", 408, message, {"Connection": "close"}) from None


def depth(document: bytes) -> int:
    """How deep a JSON document nests arrays and objects, or would if it were one: no recursion."""
    unescaped = document.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    brackets = outside_strings.translate(None, _NO_BRACKET)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def read_keys(path: str) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # do not count.

    Raises ValueError for a file that others than its owner and group can read, that holds no key,
    or that holds what no header could.
    """
    name = f"--api-key-file: {path}"
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read(MAX_KEY_FILE + 1).splitlines()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}; expected a file of keys") from error
    if mode & 0o007:
        raise ValueError(f"{name}: everyone can read or change it; run chmod 600 on it")
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith(b"#")]
    if not keys:
        raise ValueError(f"{name}: got no key, expected one a line; add one")
    for number, key in enumerate(keys, 1):
        if len(key) > MAX_KEY_BYTES or not re.fullmatch(rb"[!-~]+", key):
            raise ValueError(
                f"{name}: got key {number} with blanks or of more than {MAX_KEY_BYTES} characters, "
                "expected printable ASCII; replace it"
            )
    return tuple(key.decode() for key in dict.fromkeys(keys))


def _password(credentials: str) -> bytes:
    """Of a Basic authorization; b"" where it is none."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _check_size(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    size += len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        message = f"expected at most {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them"
        raise Refused("too_many_headers", 431, message)


def _check_json(body: bytes) -> None:
    # JSON in UTF-16 or UTF-32 has them everywhere, and quotes inside of characters.
    if b"\0" in body:
        raise Refused("bad_request", 400, "the body has a NUL byte; expected JSON in UTF-8")
    if depth(body) > MAX_DEPTH:
        raise Refused("too_deep", 400, f"the body nests deeper than {MAX_DEPTH} levels")
