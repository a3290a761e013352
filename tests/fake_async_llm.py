"""A stand-in for `engine.async_llm.AsyncLLM` that plays a script: for what no real model can do at
will, such as a round of given tokens, a failure, or an answer that never comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from tokenizers_for_tests import byte_tokenizer

from engine.params import SamplingParams
from engine.types import RequestStats, TokenEvent

STATS = RequestStats(5, 2, 4, 0.25, 0.5, 6.0, plan="int8", rounds=2, drafted=3, accepted=2)
# What a stream does next: tokens of one round, an error, or None: wait until it is closed.
Round = list[TokenEvent] | BaseException | None


def events(*texts: str, reason: str | None = None, drafted: bool = False) -> list[TokenEvent]:
    """One round: a token for each text, that of its first byte."""
    made = [
        TokenEvent(ord(text[0]) if text else 0, text, from_draft=drafted and index > 0)
        for index, text in enumerate(texts)
    ]
    if reason is not None:
        last = made.pop() if made else TokenEvent(None, "")
        made.append(
            TokenEvent(last.token_id, last.text, last.from_draft, finish_reason=reason, stats=STATS)
        )
    return made


class FakeStream:
    def __init__(self, script: Sequence[Round], params: SamplingParams, error: Exception | None):
        self.params = params
        self.prompt_token_ids = (1, 2, 3, 4, 5)
        self.num_rounds = 0  # taken
        self.is_started = self.is_closed = False
        self._script, self._error = script, error
        self._ready: list[TokenEvent] = []

    async def start(self) -> None:
        if self._error is not None:
            raise self._error
        self.is_started = True

    async def __anext__(self) -> TokenEvent:
        if not self._ready:
            if self.num_rounds == len(self._script):
                raise StopAsyncIteration
            self.num_rounds += 1
            await asyncio.sleep(0)
            new = self._script[self.num_rounds - 1]
            if new is None:
                await asyncio.Event().wait()
            if isinstance(new, BaseException):
                raise new
            self._ready = list(new or ())
        return self._ready.pop(0)

    def take(self) -> list[TokenEvent]:
        taken, self._ready = self._ready, []
        return taken

    async def aclose(self) -> None:
        self.is_closed = True


class FakeAsyncLLM:
    """Each stream plays the script of its place; the last one's serves all that follow.

    errors: what the streams raise at their start, by their number.
    """

    def __init__(
        self, *scripts: Sequence[Round], errors: Mapping[int, Exception] | None = None
    ) -> None:
        self.llm = SimpleNamespace(
            model_name="fake", tokenizer=byte_tokenizer(), max_length=256, dtype="float32",
            device="cpu", tool_style=None,
        )  # fmt: skip
        self.streams: list[FakeStream] = []
        self.asked: list[Any] = []  # prompts and messages
        self.tools: Any = None  # of the last chat
        self._scripts, self._errors = scripts, errors or {}

    def stream(
        self, prompt: Any, params: SamplingParams, *, timeout: float | None = None
    ) -> FakeStream:
        number = len(self.streams)
        script = self._scripts[min(number, len(self._scripts) - 1)]
        stream = FakeStream(script, params, self._errors.get(number))
        self.asked.append(prompt)
        self.streams.append(stream)
        return stream

    def stream_chat(
        self,
        messages: Any,
        params: SamplingParams,
        *,
        timeout: float | None = None,
        tools: Any = None,
    ) -> FakeStream:
        self.tools = tools
        return self.stream(messages, params, timeout=timeout)
