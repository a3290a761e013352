"""A light client of OpenAI-compatible servers: requests in a closed and an open loop.

The client shares the cores with the server, so while requests run it only notes what comes back
and when, some 50 microseconds of a core for a chunk where httpx takes 160; `parse` reads it after
the turn. Every request has a connection of its own, which counts into its time.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import random
import shlex
import socket
import subprocess
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

COMPLETIONS = "/v1/chat/completions"


class Job(NamedTuple):
    """A question, and how many tokens its answer has."""

    prompt: str
    new_tokens: int


class Server(NamedTuple):
    """Where a server listens, its model, and fields that each request to it has beside the usual.

    A field that is None is left out of the request, a usual one too.
    """

    name: str
    host: str
    port: int
    model: str
    fields: Mapping[str, Any]


class Answer(NamedTuple):
    """What came back of one request; times in seconds of one clock.

    times: when each chunk with text came. start: when the request was due. new_tokens: as the
    server counts, and where it does not, its chunks. error: the kind, or "" for a whole answer.
    """

    start: float
    end: float
    text: str = ""
    times: Sequence[float] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    finish: str = ""
    error: str = ""


class Turn(NamedTuple):
    """Requests that ran together, and the share of one core that their client took, if any.

    long: a request beside them that does not count.
    """

    answers: Sequence[Answer]
    client_share: float | None = None
    long: Answer | None = None


class Exchange(asyncio.Protocol):
    """One request, what came back and when, and the kind of error, if any."""

    def __init__(self, request: bytes, due: float):
        self.request, self.due, self.error = request, due, ""
        self.parts: list[bytes] = []
        self.times: list[float] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = "connection" if exc else ""
        if not self.closed.done():
            self.closed.set_result(None)

    async def run(self, host: str, port: int) -> None:
        """Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: self, host, port)
        try:
            await self.closed
        finally:
            transport.abort()


def call(server: Server, path: str, body: object = None, timeout: float = 600) -> tuple[int, Any]:
    """Status and JSON of one request, a POST where it has a body; None where it is no JSON.

    Raises OSError where nobody answers.
    """
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout)
    try:
        content = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"}
        connection.request("POST" if content else "GET", path, content, headers)
        response = connection.getresponse()
        text = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP: {error!r}") from error
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, None


def connect(name: str, url: str, fields: Mapping[str, Any]) -> Server:
    """A server that is ready, with its first model. Raises ValueError where it is none."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
        raise ValueError(f"{name}: got {url!r}, expected http://HOST:PORT")
    server = Server(name, parts.hostname, parts.port or 80, "", fields)
    try:
        listed = call(server, "/v1/models", timeout=10)[1]
        return server._replace(model=listed["data"][0]["id"])
    except (OSError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{name}: {url} does not list models: {error!r}") from error


@contextmanager
def started(command: str, seconds: float = 600) -> Iterator[str]:
    """Run a server on a free port, {port} in the command; yields its URL once it is ready.

    It is told to end afterwards. Raises ValueError where it ends by itself or does not get ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, end = Server("", "127.0.0.1", port, "", {}), time.monotonic() + seconds
    with tempfile.TemporaryFile() as log:
        words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:
            raise ValueError(f"server: {words[0]} does not start: {error}") from error
        try:
            while not _is_ready(server):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise ValueError(f"server: {words[0]} is not ready: {' '.join(last)}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(server: Server) -> bool:
    """By /ready, or /health where there is none."""
    try:
        status, _ = call(server, "/ready", timeout=10)
        return status == 200 or (status == 404 and call(server, "/health", timeout=10)[0] == 200)
    except OSError:
        return False


def request_body(server: Server, job: Job, is_streamed: bool = True) -> dict[str, Any]:
    """A greedy request that goes on past end tokens."""
    body: dict[str, Any] = {
        "model": server.model, "messages": [{"role": "user", "content": job.prompt}],
        "max_tokens": job.new_tokens, "temperature": 0, "ignore_eos": True, "stream": is_streamed,
    }  # fmt: skip
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    return {k: v for k, v in {**body, **server.fields}.items() if v is not None}


def in_one_piece(server: Server, job: Job) -> str | None:
    """The answer without streaming, if there is one."""
    _, found = call(server, COMPLETIONS, request_body(server, job, is_streamed=False))
    try:
        return str(found["choices"][0]["message"]["content"])
    except (KeyError, TypeError, IndexError):
        return None


async def send(server: Server, job: Job, timeout: float, due: float | None = None) -> Exchange:
    """One streamed request, to its end. due: when it should have started; None is now."""
    content = json.dumps(request_body(server, job)).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nhost: {server.host}:{server.port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    exchange = Exchange(head.encode() + content, time.perf_counter() if due is None else due)
    try:
        await asyncio.wait_for(exchange.run(server.host, server.port), timeout)
    except asyncio.TimeoutError:
        exchange.error = "timeout"
    except OSError:
        exchange.error = "connection"
    return exchange


async def closed_loop(
    server: Server, jobs: Iterable[Job], streams: int, timeout: float
) -> list[Exchange]:
    """So many streams, each of which sends its next request when its last one has ended."""
    waiting, found = iter(jobs), []

    async def work() -> None:
        for job in waiting:
            found.append(await send(server, job, timeout))

    await asyncio.gather(*(work() for _ in range(streams)))
    return found


async def open_loop(
    server: Server, jobs: Iterable[Job], arrivals: Sequence[float], timeout: float
) -> list[Exchange]:
    """Requests that come when they are due, however many are still unanswered."""
    start, tasks = time.perf_counter(), []
    for job, arrival in zip(jobs, arrivals, strict=False):
        await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
        tasks.append(asyncio.create_task(send(server, job, timeout, start + arrival)))
    return list(await asyncio.gather(*tasks))


def poisson_arrivals(
    rate: float, seed: int, requests: int | None, seconds: float | None
) -> list[float]:
    """Seconds at which requests come, `rate` of them a second in the mean, up to either bound."""
    draws = random.Random(seed)
    times = itertools.accumulate(draws.expovariate(rate) for _ in itertools.repeat(None))
    bounded = itertools.islice(times, requests)
    return list(itertools.takewhile(lambda at: seconds is None or at < seconds, bounded))


def run_turn(loop: Callable[[], Coroutine[Any, Any, list[Exchange]]]) -> Turn:
    """Run a loop of requests; only afterwards read what came back."""
    start, busy = time.perf_counter(), time.process_time()
    exchanges = asyncio.run(loop())
    share = (time.process_time() - busy) / (time.perf_counter() - start)
    return Turn([parse(exchange) for exchange in exchanges], share)


def parse(exchange: Exchange) -> Answer:
    """The answer of an exchange; what ended early or is no stream of chunks has an error."""
    failed = Answer(exchange.due, exchange.times[-1] if exchange.times else exchange.due)
    if exchange.error:
        return failed._replace(error=exchange.error)
    raw = b"".join(exchange.parts)
    head, gap, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not gap or not status:
        return failed._replace(error="connection")
    if status != [b"200"]:
        return failed._replace(error=f"HTTP {status[0].decode('latin-1')}")
    try:
        return _parse_events(failed, _events(exchange, raw, len(head) + 4, head.lower()))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return failed._replace(error="broken")


def _parse_events(answer: Answer, events: Iterable[tuple[float, bytes]]) -> Answer:
    """Raises ValueError where the stream is not whole, and others where a chunk is none."""
    texts: list[str] = []
    times: list[float] = []
    usage: dict[str, Any] = {}
    finish, is_whole = "", False
    for at, data in events:
        if data == b"[DONE]":
            is_whole = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return answer._replace(error=f"event {chunk['error'].get('type')}")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                texts.append(text)
                times.append(at)
            finish = choice.get("finish_reason") or finish
    if not is_whole or not finish:
        raise ValueError("the stream ended early")
    details = usage.get("prompt_tokens_details") or {}
    return answer._replace(
        text="".join(texts), times=times, finish=finish,
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens", 0),
        new_tokens=usage.get("completion_tokens", len(times)),
    )  # fmt: skip


def _events(
    exchange: Exchange, raw: bytes, start: int, head: bytes
) -> Iterator[tuple[float, bytes]]:
    """The data of each event, and when its last byte came."""
    ends = list(itertools.accumulate(map(len, exchange.parts)))
    rest = b""
    for offset, data in _runs(raw, start) if b"chunked" in head else [(start, raw[start:])]:
        lines = (rest + data).split(b"\n")
        at = offset - len(rest)
        for line in lines[:-1]:
            at += len(line) + 1
            if line.startswith(b"data:"):
                yield exchange.times[bisect_left(ends, at)], line[5:].strip()
        rest = lines[-1]


def _runs(raw: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """The bytes of each chunk of HTTP, and where they begin; ValueError where it is cut off."""
    while True:
        end = raw.index(b"\r\n", start)
        size, start = int(raw[start:end].partition(b";")[0], 16), end + 2
        if not size:
            return
        if start + size > len(raw):
            raise ValueError("a chunk is cut off")
        yield start, raw[start : start + size]
        start += size + 2
