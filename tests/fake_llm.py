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
from collections.abc import Iterator, Mapping, Sequence

import engine.chat
from engine.params import SamplingParams
from engine.terminal import loading_progress
from engine.types import CompletionOutput, RequestOutput, RequestStats, TokenEvent

Messages = Sequence[Mapping[str, str]]
NUM_SLOW = 400


class FakeLLM:
    """Answers like the real one, of words instead of tokens."""

    def __init__(self, generation: Mapping[str, object] | None = None) -> None:
        self.model_name = "fake"
        self.device = "cpu"
        self.dtype = "float32"
        self.max_length = 128
        self.generation = generation or {}
        self.last_stats: RequestStats | None = None
        self.asked: list[list[dict[str, str]]] = []
        self.params: SamplingParams | None = None
        self.num_closed = 0
        self._draws = itertools.count()

    def encode_chat(self, messages: Messages) -> list[int]:
        return [len(word) for message in messages for word in message["content"].split()]

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[TokenEvent]:
        self._record(messages, params)
        num_tokens = 0
        pieces = list(self._pieces(messages[-1]["content"].split()[-1], params))
        try:
            for index, piece in enumerate(pieces):
                if piece == "<fail>":
                    raise RuntimeError("the machine\nbroke")
                if piece == "<wait>":
                    time.sleep(1.5)
                    continue
                if len(pieces) == NUM_SLOW:
                    time.sleep(0.05)
                num_tokens += 1
                is_last = index == len(pieces) - 1
                yield TokenEvent(index, piece, finish_reason="stop" if is_last else None)
        finally:
            self.num_closed += 1
            prompt = len(self.encode_chat(messages))
            self.last_stats = RequestStats(prompt, 2, num_tokens, 0.25, 0.5, 6.0)

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> RequestOutput:
        events = list(self.stream_chat(messages, params))
        assert self.last_stats is not None
        text = "".join(event.text for event in events)
        answer = CompletionOutput(text, tuple(event.token_id for event in events), "stop")
        prompt = tuple(self.encode_chat(messages))
        return RequestOutput(prompt, (answer,), self.last_stats)

    def _record(self, messages: Messages, params: SamplingParams | None) -> None:
        self.asked.append([dict(message) for message in messages])
        self.params = params
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a") as file:
                file.write(json.dumps(self.asked[-1]) + "\n")

    def _pieces(self, word: str, params: SamplingParams | None) -> list[str]:
        if word == "template":
            raise ValueError("the model has no chat template")
        if word == "slow":
            return [f"word{index} " for index in range(NUM_SLOW)]
        if word == "draw":
            seed = None if params is None else params.seed
            return [f"drawn{next(self._draws) if seed is None else seed}"]
        answers = {
            "escape": ["a\x1b[31mb", "\x9b2J\r\tc"],
            "many": [f"line {index}\n" for index in range(20_000)],
            "fail": ["some ", "<fail>"],
            "failfirst": ["<fail>"],
            "wait": ["<wait>", "late"],
            "empty": [""],
            "newline": ["ends\n"],
        }
        return answers.get(word, ["you ", "said ", word])


def load_fake(args: object) -> FakeLLM:
    """Stands in for `engine.chat.load_llm`, progress bar included."""
    with loading_progress() as on_progress:
        if on_progress is not None:
            on_progress(1, 2)
            time.sleep(0.2)
            on_progress(2, 2)
    return FakeLLM()


if __name__ == "__main__":
    engine.chat.load_llm = load_fake  # type: ignore[assignment]
    sys.exit(engine.chat.main())
