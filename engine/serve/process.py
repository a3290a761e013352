"""The life of a server's process: bind, load, warm up, serve, drain, end.

One event loop answers from the moment that the port is bound; the model is loaded by a thread
beside it. uvicorn runs the connections, and the signals are ours: it would stop listening before
requests are told that the server drains.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import ipaddress
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from engine.command import EXIT_OK, engine_options, note, progress_bar, without_collection
from engine.interrupts import EXIT_INTERRUPTED, handle_interrupts
from engine.params import SamplingParams
from engine.serve.guard import Guard
from engine.serve.logs import LOG, log_loop_error, start_logging
from engine.serve.metrics import Metrics
from engine.serve.options import ServeOptions
from engine.serve.status import Status

if TYPE_CHECKING:
    from fastapi import FastAPI

    from engine.async_llm import AsyncLLM

WARM_UPS, WARM_UP_TOKENS = 3, 32
CONTEXTS = 4  # that the cache holds on a CPU if nothing is said, however many sequences share them
MAX_HEAD_BYTES = 64 << 10  # of a request's head; the guard's answer to a large one needs it whole
HEAD_SECONDS = 20  # in which a request's head must have come, from the connection or answer before
GRACE_SECONDS = 1  # to write what is written already, once all has been drained
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def serve(args: argparse.Namespace, options: ServeOptions) -> int:
    """Serve until a signal says to stop; the exit code.

    Raises ValueError, RuntimeError, OSError or MemoryError where it cannot be begun.
    """
    start_logging(args.log_format)
    process = _Process(args, options, _bind(args.host, args.port))
    try:
        return asyncio.run(process.run())
    finally:
        process.watch.cancel()


def _bind(host: str, port: int) -> socket.socket:
    """Listen there. Raises ValueError for a host without an address, OSError for a port in use."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host: got {host!r}, which is no address of this machine") from error
    family, *_, address = found[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}; choose another --port") from error


class _Process:
    """What the steps of a server's life share."""

    def __init__(
        self, args: argparse.Namespace, options: ServeOptions, listener: socket.socket
    ) -> None:
        self._args, self._options, self._listener = args, options, listener
        self._metrics = Metrics()
        self._status = Status(self._metrics)
        self._engine: AsyncLLM | None = None
        self._stop = asyncio.Event()
        self.watch = threading.Timer(args.shutdown_timeout + GRACE_SECONDS + 0.5, _give_up)
        self.watch.daemon = True
        self._server = uvicorn.Server(
            uvicorn.Config(
                Guard(self._status, options, self._metrics), http="h11", ws="none", lifespan="off",
                loop="asyncio", log_config=None, access_log=False, server_header=False,
                proxy_headers=False, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=HEAD_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )  # fmt: skip

    async def run(self) -> int:
        server, config = self._server, self._server.config
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_error)
        self._take_signals(loop)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup([self._listener])
        beside = [asyncio.create_task(server.main_loop()), asyncio.create_task(self._close_idle())]
        self._say_where()
        stopping = asyncio.create_task(self._stop.wait())
        steps = [asyncio.create_task(step) for step in (self._start(), self._watch_engine())]
        try:
            for step in steps:
                await asyncio.wait((step, stopping), return_when=asyncio.FIRST_COMPLETED)
                if step.done():
                    step.result()  # raises what has ended it
            await self._drain()
        finally:
            await server.shutdown([self._listener])
            for task in (*beside, *steps, stopping):
                task.cancel()
        if self._engine is not None:
            self._engine.close()
        LOG.info("stopped")
        return EXIT_OK

    def _take_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._stop.is_set():
                os._exit(EXIT_INTERRUPTED)
            loop.call_soon_threadsafe(self._stop.set)

        signal.signal(signal.SIGTERM, handle)
        handle_interrupts(handle)

    async def _start(self) -> None:
        """Load, warm up, and be ready. Raises what `LLM` does."""
        loop = asyncio.get_running_loop()
        # A pool of its own: the loop would wait for its default one when it ends.
        app = await loop.run_in_executor(ThreadPoolExecutor(1), self._load)
        assert self._engine is not None
        self._status.phase = "warming up"
        params = SamplingParams(
            max_tokens=WARM_UP_TOKENS, temperature=0, ignore_eos=True, speculative="off"
        )
        # The best of some: whatever else the machine does only ever makes one slower.
        outputs = [await self._engine.generate("Hello", params) for _ in range(WARM_UPS)]
        speed = max(output.stats.tokens_per_second for output in outputs)
        app.state.serving.plain_speed = speed
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection during an answer looks through it
        if self._stop.is_set():
            return
        self._status.app, self._status.phase = app, "ready"
        LOG.info(f"ready: {self._engine.llm.model_name}, {speed:.1f} tokens/s without drafts")

    def _load(self) -> FastAPI:
        """The application with its engine; in a thread."""
        with progress_bar(in_bytes=True) as show, without_collection():
            # Here and not above: it imports torch, which takes seconds.
            from engine import LLM
            from engine.async_llm import AsyncLLM
            from engine.serve.app import create_app
            from kernels.cpu.compile import is_compiled

            if not is_compiled():
                LOG.info("compiling kernels for this processor: once, about half a minute")
            args = self._args
            llm = LLM(
                on_progress=lambda done, total: show("loading", done, total),
                max_sequences=args.max_sequences, cache_tokens=args.cache_tokens,
                **engine_options(args),
            )  # fmt: skip
        if args.cache_tokens is None and llm.model.device.type == "cpu":
            llm.slots.capacity = min(llm.slots.capacity, CONTEXTS * llm.max_length)
        self._engine = AsyncLLM(llm, max_queue=args.max_queue, order=args.order)
        self._metrics.attach(self._engine)
        neutral, own = (SamplingParams().with_defaults(values) for values in ({}, llm.generation))
        pairs = [(name, getattr(own, name)) for name in SAMPLING]
        said = [f"{name} {value}" for name, value in pairs if value != getattr(neutral, name)]
        LOG.info(f"from the model's generation_config.json: {', '.join(said) or 'nothing'}")
        return create_app(self._engine, self._options, self._metrics)

    async def _drain(self) -> None:
        """Let requests finish for a while, and end the rest. The process ends soon after that."""
        seconds = self._args.shutdown_timeout
        self._status.phase = "draining"
        self.watch.start()
        LOG.info(f"stopping: requests have {seconds:g} seconds; Ctrl-C ends them at once")
        if self._engine is not None:
            await self._engine.drain(seconds)

    async def _watch_engine(self) -> None:
        """Raises RuntimeError where the engine ends by itself: whoever started the server can see
        that, and start another one.
        """
        while self._engine is None or self._engine.is_open:
            await asyncio.sleep(1)
        raise RuntimeError("the engine has failed; the log says where")

    async def _close_idle(self) -> None:
        """Close connections that have not sent a whole head for a while, or that wait to be closed
        for a reader who reads no more: uvicorn lets them be.
        """
        # Connection: its last request and what was left to write of the answer, from when on.
        since: dict[object, tuple[object, float]] = {}
        while True:
            await asyncio.sleep(HEAD_SECONDS / 10)
            now, seen = time.monotonic(), since
            since = {}
            for connection in list(self._server.server_state.connections):
                request = connection.cycle  # type: ignore[union-attr]
                transport = connection.transport  # type: ignore[union-attr]
                if transport.is_closing() or request is None or request.response_complete:
                    state = request, transport.get_write_buffer_size()
                    last, begin = seen.get(connection, (None, now))
                    since[connection] = state, begin if last == state else now
                    if now - since[connection][1] > HEAD_SECONDS:
                        transport.abort()

    def _say_where(self) -> None:
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        LOG.info(f"listening on http://{shown}:{port}")
        if not ipaddress.ip_address(host).is_loopback and not self._options.api_keys:
            LOG.warning(f"whoever reaches {host} may ask: give --api-key-file to require a key")


def _give_up() -> None:
    """The last resort against what will not end: a pass that hangs, a client that does not read."""
    note("error: what was left did not end in time")
    os._exit(EXIT_OK)
