"""The answers to one HTTP request while they run, until they end or the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from time import perf_counter
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from engine.async_llm import AsyncTokenStream
from engine.failure import Failure
from engine.params import SamplingParams
from engine.serve.errors import ApiError, bad_input, failure
from engine.serve.logs import RequestLog
from engine.serve.serving import Serving
from engine.types import RequestStats, TokenEvent

T = TypeVar("T")
# Of RequestStats, what an answer with detail says.
_TOLD = (
    "plan", "domain", "similarity", "rounds", "tokens_per_round", "drafted", "accepted",
    "tokens_per_second", "queue_seconds", "prefill_seconds", "decode_seconds", "reused_tokens",
)  # fmt: skip
Open = Callable[[SamplingParams], AsyncTokenStream]  # a prompt, ready to be answered


class Answers:
    """One stream for each prompt and each of its `n` answers, in that order."""

    def __init__(self, serving: Serving, request: Request, prompt: object) -> None:
        """prompt: for the log, where that shows text."""
        self._serving, self._prompt = serving, prompt
        self._begin = perf_counter()
        self._log: RequestLog | None = request.scope.get("state", {}).get("log")
        self._num_prompt = self._num_generated = 0  # tokens
        self._texts: list[str] = []  # of all answers as they came, if the log shows text
        self._end: str | None = None  # of the answer that ended last
        self._streams: list[AsyncTokenStream] = []
        self._times: dict[int, float] = {}  # when the last tokens of each came
        self._running: set[int] = set()
        self._stats: dict[int, RequestStats] = {}  # of those that have ended
        self._next: dict[asyncio.Future[TokenEvent], int] = {}

    async def start(
        self, prompts: Sequence[Open], params: Sequence[SamplingParams], timeout: float | None
    ) -> None:
        """Queue every answer. Raises QueueFull, Draining, or ApiError for wrong arguments.

        A prompt is made into tokens once, and its other answers take those.
        """
        limit, num_answers = self._serving.options.max_choices, len(prompts) * len(params)
        if not 0 < num_answers <= limit:
            message = f"got {len(prompts)} with n={len(params)}, expected 1 to {limit} answers"
            raise ApiError(400, f"prompt: {message}", param="prompt")
        is_started = False
        try:
            for prompt in prompts:
                first = prompt(params[0])
                await self._start(first)
                token_ids = first.prompt_token_ids
                self._num_prompt += len(token_ids)
                for each in params[1:]:
                    await self._start(self._serving.llm.stream(token_ids, each, timeout=timeout))
            is_started = True
        finally:
            if not is_started:
                await self.close()

    async def _start(self, stream: AsyncTokenStream) -> None:
        self._streams.append(stream)
        with bad_input():
            await stream.start()
        self._serving.metrics.started()
        self._running.add(len(self) - 1)
        num_tokens = len(stream.prompt_token_ids)
        limit = self._serving.options.max_prompt_tokens
        if limit is not None and num_tokens > limit:
            message = f"prompt: got {num_tokens} tokens, expected at most {limit}"
            raise ApiError(400, message, param="prompt")

    def __len__(self) -> int:
        return len(self._streams)

    async def rounds(self) -> AsyncGenerator[tuple[int, list[TokenEvent]], None]:
        """(number of the answer, all that a round added to it), as they come.

        Raises ApiError, 500, when one of them fails.
        """
        if len(self) == 1:  # as most are: nothing has to be waited for side by side
            while 0 not in self._stats:
                with Failure(None, []) as failed:
                    first = await self._streams[0].__anext__()
                if failed.error is not None:
                    raise self._failed(0, failed.error) from failed.error
                yield 0, self._account(0, [first, *self._streams[0].take()])
            return
        for index in range(len(self)):
            self._expect(index)
        while self._next:
            done, _ = await asyncio.wait(self._next, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=self._next.__getitem__):
                index, error = self._next.pop(future), future.exception()
                if error is not None:
                    raise self._failed(index, error) from error
                events = self._account(index, [future.result(), *self._streams[index].take()])
                yield index, events
                if events[-1].finish_reason is None:
                    self._expect(index)

    async def all(self) -> list[list[TokenEvent]]:
        """The events of each answer, once all have ended."""
        events: list[list[TokenEvent]] = [[] for _ in self._streams]
        async for index, new in self.rounds():
            events[index] += new
        return events

    async def close(self) -> None:
        """End what has not ended, within a round."""
        for future in self._next:
            future.cancel()
        await asyncio.gather(*self._next, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()
        while self._running:
            self._running.pop()
            self._end = self._end or "cancelled"
            self._serving.metrics.cancelled()
        log = self._log
        if log is not None:
            log.prompt_tokens, log.tokens = self._num_prompt, self._num_generated
            log.finish_reason = self._end
            if self._serving.options.log_text:
                log.prompt, log.answer = str(self._prompt), "".join(self._texts)

    def usage(self, num_choices: int) -> dict[str, Any]:
        """Tokens of all answers by now, each prompt counted once for its `num_choices` of them."""
        stats = [self._stats.get(i) or stream.stats for i, stream in enumerate(self._streams)]
        firsts = stats[::num_choices]
        num_prompt = sum(each.prompt_tokens for each in firsts)
        num_generated = sum(each.generated_tokens for each in stats)
        num_accepted = sum(each.accepted for each in stats)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(each.reused_tokens for each in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": sum(each.drafted for each in stats) - num_accepted,
            },
        }

    def speculation(self, index: int) -> dict[str, Any]:
        """What speculation brought an answer that has ended."""
        stats = self._stats[index]
        told = {name: getattr(stats, name) for name in _TOLD}
        return told | {"plain_tokens_per_second": self._serving.plain_speed}

    def _expect(self, index: int) -> None:
        self._next[asyncio.ensure_future(self._streams[index].__anext__())] = index

    def _failed(self, index: int, error: BaseException) -> ApiError:
        self._running.discard(index)
        self._end = "failed"
        self._serving.metrics.failed(type(error).__name__)
        return failure(error, self._log)

    def _account(self, index: int, events: list[TokenEvent]) -> list[TokenEvent]:
        """Count what a round added; it is returned."""
        metrics, now, last = self._serving.metrics, perf_counter(), events[-1]
        num_tokens = sum(event.token_id is not None for event in events)
        self._num_generated += num_tokens
        if self._serving.options.log_text:
            self._texts += [event.text for event in events]
        if num_tokens:
            if index not in self._times:
                metrics.first_token(now - self._begin)
            metrics.tokens(num_tokens, now - self._times.get(index, now))
            self._times[index] = now
        if last.finish_reason is not None:
            assert last.stats is not None
            self._stats[index] = last.stats
            self._running.discard(index)
            self._end = last.finish_reason
            metrics.finished(last.stats, last.finish_reason, now - self._begin)
        return events


async def until_left(
    work: Coroutine[Any, Any, T], receive: Receive, close: Callable[[], Coroutine[Any, Any, None]]
) -> T | None:
    """Do the work until the client leaves, which is None; then, whatever happened, close."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_done = working.done() and not working.cancelled()
        return working.result() if is_done else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
        await close()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
