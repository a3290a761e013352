"""The engine for services: requests of any number of event loops and threads, decoded together.

One worker thread runs the passes. What it makes goes to the event loop that asked, once per round;
what is asked of it goes through an inbox, read between two steps. So a request costs its neighbours
one chunk of its prompt at most, and one that is closed is gone within a round.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from engine.failure import Event
from engine.llm import LLM, Messages
from engine.order import ORDERS
from engine.params import SamplingParams
from engine.passes import CLOSED
from engine.request import Prompt
from engine.sequence import RunningSequence
from engine.types import RequestOutput, RequestStats, TokenEvent
from router.route import Route

Tools = Sequence[Mapping[str, Any]]
# Of a prompt in one step on a CPU, where bits do not depend on it: what others wait for it.
CPU_CHUNK_TOKENS = 48
STUCK_SECONDS = 2e-3  # between two looks for a slot, while synchronous requests hold all of them


class QueueFull(RuntimeError):
    """Too many requests run and wait already; nothing was done for this one."""


class Draining(RuntimeError):
    """No new requests are taken: the engine is about to end."""


class Load(NamedTuple):
    """What the engine has to do at the moment, and what its cache has done so far."""

    running: int  # requests with a slot of the cache
    waiting: int
    cache_tokens: int  # held now, remembered prefixes included
    cache_capacity: int
    prefix_hits: int  # requests that found a prefix in the cache
    prefix_tokens: int  # tokens that these did not have to read
    preempted: int  # times that a running answer had to wait for room


class AsyncLLM:
    """Answers requests of any number of event loops and threads with one LLM.

    llm: its `max_sequences` and `cache_tokens` bound what is decoded together.
    max_queue: requests that may wait beside those; one more raises QueueFull.
    order: who goes first under pressure: "slack", who has least left to do and least time for it,
        or "fcfs", who came first. See order.py.

    Raises ValueError for a wrong argument. `close()`, or leaving a `with` block, ends the worker
    and the LLM. The LLM itself may still be used beside it.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 64, order: str = "slack"):
        if type(max_queue) is not int or max_queue < 0:
            raise ValueError(f"max_queue: got {max_queue!r}, expected an integer of at least 0")
        if order not in ORDERS:
            raise ValueError(f"order: got {order!r}, expected {', '.join(map(repr, ORDERS))}")
        self.llm = llm
        self._max_requests = llm.max_sequences + max_queue
        is_cpu = llm.model.device.type == "cpu"
        self._scheduler = llm.scheduler(
            ORDERS[order], CPU_CHUNK_TOKENS if is_cpu else None, is_shared=True
        )
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        # Weak: a stream that its consumer drops must not live on here.
        self._streams: dict[RunningSequence, weakref.ref[AsyncTokenStream]] = {}
        self._num_requests = 0  # from `start` to their ends
        self._is_draining = self._is_closed = False
        self._worker = threading.Thread(target=self._work, name="engine-worker", daemon=True)
        self._worker.start()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncTokenStream:
        """Yield the answer token by token. Closing or dropping the stream ends the request.

        timeout: seconds from now after which the answer ends with what it has, by "timeout".
        Its first event raises what `LLM.stream` raises, QueueFull or Draining.
        """
        return AsyncTokenStream(self, lambda: self.llm.sequence(prompt, params), timeout)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        tools: Tools | None = None,
    ) -> AsyncTokenStream:
        """Yield the answer to a conversation token by token, as `stream` does."""
        llm = self.llm
        return AsyncTokenStream(
            self, lambda: llm.sequence(llm.encode_chat(messages, tools), params), timeout
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
    ) -> RequestOutput:
        """The whole answer to one prompt. Cancelling the task ends the request."""
        return await self.stream(prompt, params, timeout=timeout).whole()

    async def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        tools: Tools | None = None,
    ) -> RequestOutput:
        """The whole answer to a conversation. Cancelling the task ends the request."""
        return await self.stream_chat(messages, params, timeout=timeout, tools=tools).whole()

    @property
    def load(self) -> Load:
        """What there is to do, as of now; any thread may ask."""
        scheduler, pool = self._scheduler, self.llm.slots
        held = len(scheduler.reading) + len(scheduler.running)
        return Load(
            held, max(self._num_requests - held, 0), pool.num_tokens, pool.capacity,
            pool.num_hits, pool.num_hit_tokens, scheduler.num_preempted,
        )  # fmt: skip

    @property
    def is_open(self) -> bool:
        """Whether requests are answered: not after `close`, nor where the worker itself failed."""
        return not self._is_closed

    async def drain(self, seconds: float) -> None:
        """Take no new requests; let the others end, after so many seconds with what they have."""
        self._is_draining = True
        end = time.monotonic() + seconds
        while self._num_requests and time.monotonic() < end:
            await asyncio.sleep(0.01)
        while self._num_requests and self.is_open:  # again for what was tokenised meanwhile
            self._post(lambda: self._tell(self._scheduler.end_all("abort")))
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """End the worker after its step, and the LLM. Requests under way raise RuntimeError."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._worker.join()
        self.llm.close()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _enter(self) -> None:
        """Count one request more. Raises QueueFull or Draining; see `_leave`."""
        with self._wake:
            if self._is_closed:
                raise RuntimeError(CLOSED)
            if self._is_draining:
                raise Draining("the engine takes no new requests: it is about to end")
            if self._num_requests >= self._max_requests:
                raise QueueFull(
                    f"{self._num_requests} requests run or wait already, which is all that "
                    "max_sequences and max_queue allow: try again later"
                )
            self._num_requests += 1

    def _leave(self) -> None:
        with self._wake:
            self._num_requests -= 1

    def _post(self, action: Callable[[], None]) -> bool:
        """Let the worker run `action` before its next step; False where it takes none any more."""
        with self._wake:
            if self._is_closed:
                return False
            self._inbox.append(action)
            self._wake.notify()
            return True

    def _submit(self, stream: weakref.ref[AsyncTokenStream], sequence: RunningSequence) -> None:
        def action() -> None:
            self._streams[sequence] = stream
            self._scheduler.submit(sequence)

        if not self._post(action):
            self._leave()
            raise RuntimeError(CLOSED)

    def _cancel(self, sequence: RunningSequence) -> None:
        def action() -> None:
            if self._streams.pop(sequence, None) is not None:
                self._scheduler.drop(sequence)
                self._leave()

        self._post(action)

    def _work(self) -> None:
        """The worker thread: what was posted, then a step, over and over."""
        try:
            while self._run_actions():
                self._tell(self._scheduler.step())
                if self._scheduler.is_stuck:
                    time.sleep(STUCK_SECONDS)
                self.llm.let_others_in()
        finally:
            with self._wake:
                self._is_closed = True
            self._run_actions()  # requests that came meanwhile end with the others
            for sequence in list(self._streams):
                sequence.error = RuntimeError(CLOSED)
                self._tell([(sequence, sequence.error)])
            self._scheduler.close()

    def _run_actions(self) -> bool:
        """Wait until there is something to do, do what was posted; False when closed."""
        with self._wake:
            while not (self._inbox or self._scheduler.is_busy or self._is_closed):
                self._wake.wait()
            actions, self._inbox = self._inbox, deque()
        for action in actions:
            action()
        return not self._is_closed

    def _tell(self, events: Sequence[Event]) -> None:
        """Hand events to the streams of their sequences, all of one sequence at once."""
        by_sequence: dict[RunningSequence, list[TokenEvent | Exception]] = {}
        for sequence, event in events:
            by_sequence.setdefault(sequence, []).append(event)
        for sequence, new in by_sequence.items():
            sequence.num_delivered = sequence.num_generated
            stream = self._streams[sequence]()
            if sequence.is_over:
                del self._streams[sequence]
                self._leave()
            if stream is None or not stream.push(new):
                self._cancel(sequence)


class AsyncTokenStream(AsyncIterator[TokenEvent]):
    """The answer to one request, token by token, for the event loop that started it.

    What nobody reads is kept, at most one answer. Closing the stream, or dropping it, ends the
    request within one round.
    """

    def __init__(self, owner: AsyncLLM, make: Callable[[], RunningSequence], timeout: float | None):
        """make: checks the request and tokenises its prompt; it runs in a thread."""
        self._sequence: RunningSequence | None = None
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and timeout > 0):
            raise ValueError(f"timeout: got {timeout!r}, expected seconds above 0, or None")
        self._owner, self._make, self._timeout = owner, make, timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_news = asyncio.Event()
        self._events: deque[TokenEvent | Exception] = deque()
        self._is_over = False  # no event follows those that are there

    async def start(self) -> None:
        """Hand the request to the engine; the first `__anext__` does it else.

        Raises QueueFull or Draining before anything else is done, and then ValueError for wrong
        arguments.
        """
        assert self._sequence is None, "started before"
        deadline = None if self._timeout is None else time.perf_counter() + self._timeout
        self._owner._enter()
        sequence = None
        try:
            sequence = await asyncio.to_thread(self._make)
        finally:
            if sequence is None:
                self._owner._leave()
        sequence.deadline = deadline
        self._loop, self._sequence = asyncio.get_running_loop(), sequence
        self._owner._submit(weakref.ref(self), sequence)

    async def __anext__(self) -> TokenEvent:
        if self._sequence is None:
            await self.start()
        while not self._events:
            if self._is_over:
                raise StopAsyncIteration
            self._has_news.clear()
            try:
                await self._has_news.wait()
            except asyncio.CancelledError:
                await self.aclose()
                raise
        return self._take_one()

    def take(self) -> list[TokenEvent]:
        """The events that are there already, without waiting: the rest of what a round made."""
        taken = []
        while self._events and isinstance(self._events[0], TokenEvent):
            taken.append(self._take_one())
        return taken

    async def whole(self) -> RequestOutput:
        """Wait for the end of the answer."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        return self.output()

    async def aclose(self) -> None:
        """End the request: no token follows, and its slot of the cache is free within a round."""
        self._cancel()

    def output(self) -> RequestOutput:
        """The answer, once it has ended."""
        return self._known.output()

    @property
    def stats(self) -> RequestStats:
        """What the request has cost so far."""
        return self._known.stats()

    @property
    def route(self) -> Route | None:
        """What the router decided: None before the first token, and where nothing is routed."""
        return self._known.drafting.route

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt, as the model reads it."""
        return tuple(self._known.token_ids[: self._known.num_prompt])

    def push(self, events: Sequence[TokenEvent | Exception]) -> bool:
        """For the worker: here are new events. False where the event loop is gone."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._take_in, events)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _take_in(self, events: Sequence[TokenEvent | Exception]) -> None:
        if self._is_over:
            return
        self._events.extend(events)
        last = events[-1]
        self._is_over = isinstance(last, Exception) or last.finish_reason is not None
        self._has_news.set()

    def _take_one(self) -> TokenEvent:
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def _cancel(self) -> None:
        if self._sequence is not None and not self._is_over:
            self._is_over = True
            self._events.clear()
            self._has_news.set()  # another task may wait for an event
            self._owner._cancel(self._sequence)

    def __del__(self) -> None:
        self._cancel()

    @property
    def _known(self) -> RunningSequence:
        assert self._sequence is not None, "not started"
        return self._sequence
