"""POST /v1/completions: texts that go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response

from engine.serve.answers import Answers
from engine.serve.routes import json_router
from engine.serve.sampling import grammar_of, sampling_params, timeout_of, wants_detail
from engine.serve.schemas import CompletionBody
from engine.serve.serving import Serving
from engine.serve.sse import respond
from engine.types import TokenEvent

DEFAULT_MAX_TOKENS = 16
router = json_router()


@router.post("/v1/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    serving = Serving.of(request)
    serving.check_model(body.model)
    params = sampling_params(
        body,
        serving.options,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        grammar=await grammar_of(body, serving.options),
    )
    timeout = timeout_of(body, serving.options)
    prompts = [partial(serving.llm.stream, each, timeout=timeout) for each in _prompts(body)]
    answers = Answers(serving, request, body.prompt)
    await answers.start(prompts, params, timeout)
    return await respond(request, body, answers, CompletionForm(serving, body))


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


class CompletionForm:
    """Answers as texts."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, serving: Serving, body: CompletionBody) -> None:
        self._serving, self._body = serving, body
        self._is_terse = body.logprobs is None and not wants_detail(body)
        self._lengths: dict[int, int] = defaultdict(int)  # of the text so far, by choice

    def delta(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        choice = self.whole(index, events)
        is_empty = self._is_terse and not choice["text"] and choice["finish_reason"] is None
        return None if is_empty else choice

    def whole(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(event.text for event in events),
            "logprobs": None if self._body.logprobs is None else self._logprobs(index, events),
            "finish_reason": events[-1].finish_reason,
        }

    def _logprobs(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """One entry for each token; its offset is where the text shown before it ends."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for event in events:
            if event.token_id is not None:
                assert event.logprobs is not None
                tokens.append(self._serving.token(event.token_id)[0])
                logprobs.append(event.logprobs[event.token_id])
                named = {self._serving.token(i)[0]: value for i, value in event.logprobs.items()}
                tops.append(named)
                offsets.append(self._lengths[index])
            self._lengths[index] += len(event.text)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops if self._body.logprobs else None,
            "text_offset": offsets,
        }
