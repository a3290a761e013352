"""A stand-in for `engine.llm.LLM` that answers by rule, and the chat run with it.

`python tests/fake_llm.py ARGUMENTS` is `python -m engine.chat ARGUMENTS` with this model. Each
request's messages are appended to the file that FAKE_LOG names, one JSON list a line.
The last word of the question chooses the answer, see `_pieces`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

import engine.chat.__main__
from engine.command import progress_bar
from engine.params import SamplingParams, Speculative
from engine.sequence import OnPrompt
from engine.types import CompletionOutput, RequestOutput, RequestStats, TokenEvent
from kernels.weight import Dense, Weight
from router.route import Router

Messages = Sequence[Mapping[str, str]]
NUM_SLOW = 400
DRAFTED = RequestStats(
    *(5, 2, 12, 0.25, 0.5, 22.0),
    plan="int8+ngram",
    rounds=4,
    drafted=9,
    accepted=7,
    rounds_by_plan={"int8": 3, "off": 1},
    drafted_by_position=(3, 3, 3),
    accepted_by_position=(3, 2, 2),
)


class FakeStream(Iterator[TokenEvent]):
    """What `FakeLLM.stream` returns, as `engine.sequence.TokenStream`."""

    events: Generator[TokenEvent, None, None]
    route = None

    def __init__(self, stats: RequestStats) -> None:
        self.stats = stats

    def __next__(self) -> TokenEvent:
        return next(self.events)

    def close(self) -> None:
        self.events.close()


HEAD = Weight(Dense(torch.zeros(1, 1)))
WEIGHTS = SimpleNamespace(layers=(), lm_head=HEAD)


class FakeLLM:
    """Answers like the real one, of words instead of tokens.

    Unless speculative is "off", every token but the first counts as drafted.
    """

    def __init__(
        self,
        generation: Mapping[str, object] | None = None,
        speculative: Speculative = "auto",
    ) -> None:
        self.model_name = "fake"
        self.device = "cpu"
        self.dtype = "float32"
        self.max_length = 128
        self.generation = generation or {}
        self.speculative = speculative
        self.int8_bytes = 0
        self.threads = 2
        self.router: Router | None = None
        # What resolve_plans looks at.
        self.model = SimpleNamespace(config=SimpleNamespace(num_layers=2), weights=WEIGHTS)
        self.asked: list[list[dict[str, str]]] = []
        self.params: SamplingParams | None = None
        self.num_closed = 0
        self._draws = itertools.count()
        self._messages: dict[tuple[int, ...], Messages] = {}
        self._ids: dict[str, int] = {}

    def encode_chat(self, messages: Messages) -> list[int]:
        ids = [len(word) for message in messages for word in message["content"].split()]
        self._messages[tuple(ids)] = messages
        return ids

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        on_prompt: OnPrompt | None = None,
    ) -> FakeStream:
        """`prompt` is what encode_chat has returned last for these lengths of words."""
        stream = FakeStream(RequestStats(len(prompt), 2, 0, 0.25, 0.5, 6.0))
        stream.events = self._events(prompt, params or SamplingParams(), stream)
        return stream

    def _events(
        self, prompt: Sequence[int], params: SamplingParams, stream: FakeStream
    ) -> Generator[TokenEvent, None, None]:
        messages = self._messages[tuple(prompt)]
        self._record(messages, params)
        how = self.speculative if params.speculative is None else params.speculative
        word = messages[-1]["content"].split()[-1]
        pieces = self._pieces(word, params, how != "off")
        stop = "stop" if params.max_tokens is None or len(pieces) <= params.max_tokens else "length"
        is_slow = len(pieces) == NUM_SLOW
        pieces = pieces[: params.max_tokens]
        try:
            for index, piece in enumerate(pieces):
                if piece == "<fail>":
                    raise RuntimeError("the machine\nbroke")
                if piece == "<wait>":
                    time.sleep(1.5)
                    continue
                if is_slow:
                    time.sleep(0.05)
                stream.stats = replace(
                    stream.stats, generated_tokens=stream.stats.generated_tokens + 1
                )
                is_last = index == len(pieces) - 1
                if is_last and word == "drafted" and how != "off":
                    stream.stats = DRAFTED
                token_id = self._ids.setdefault(piece, len(self._ids))
                is_drafted = how != "off" and index > 0
                end = {"finish_reason": stop, "stats": stream.stats} if is_last else {}
                yield TokenEvent(token_id, piece, is_drafted, **end)
        finally:
            self.num_closed += 1

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> RequestOutput:
        prompt = tuple(self.encode_chat(messages))
        events = list(self.stream(prompt, params))
        stats = events[-1].stats
        assert stats is not None
        text = "".join(event.text for event in events)
        answer = CompletionOutput(text, tuple(event.token_id for event in events), "stop")
        return RequestOutput(prompt, (answer,), stats)

    def _record(self, messages: Messages, params: SamplingParams | None) -> None:
        self.asked.append([dict(message) for message in messages])
        self.params = params
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a") as file:
                file.write(json.dumps(self.asked[-1]) + "\n")

    def _pieces(self, word: str, params: SamplingParams, is_drafting: bool) -> list[str]:
        if word == "template":
            raise ValueError("the model has no chat template")
        if word == "slow":
            return [f"word{index} " for index in range(NUM_SLOW)]
        if word == "draw":
            return [f"drawn{next(self._draws) if params.seed is None else params.seed}"]
        if word == "lie":
            return ["the ", "\x1blie" if is_drafting else "truth"]
        if word == "long":  # one token more, or less, than without drafts
            return ["the ", "end"][: 2 if is_drafting else 1]
        if word == "short":
            return ["the ", "end"][: 1 if is_drafting else 2]
        answers = {
            "escape": ["a\x1b[31mb", "\x9b2J\r\tc"],
            "many": [f"line {index}\n" for index in range(20_000)],
            "fail": ["some ", "<fail>"],
            "failfirst": ["<fail>"],
            "wait": ["<wait>", "late"],
            "pause": ["soon ", "<wait>", "later ", "last"],
            "empty": [""],
            "newline": ["ends\n"],
        }
        return answers.get(word, ["you ", "said ", word])


def load_fake(args: Namespace) -> FakeLLM:
    """Stands in for `engine.chat.__main__.load_llm`, progress bar included."""
    with progress_bar(in_bytes=True) as show:
        if sys.stderr.isatty():
            show("loading", 1, 2)
            time.sleep(0.2)
            show("loading", 2, 2)
    return FakeLLM(speculative=args.speculative)


if __name__ == "__main__":
    engine.chat.__main__.load_llm = load_fake  # type: ignore[assignment]
    os._exit(engine.chat.__main__.main())
