"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import Request, Response

from engine.grammar import Grammar
from engine.params import SamplingParams
from engine.serve.answers import Answers
from engine.serve.errors import ApiError
from engine.serve.routes import json_router
from engine.serve.sampling import (
    Makers,
    check_size,
    grammar_of,
    sampling_params,
    timeout_of,
    wants_detail,
)
from engine.serve.schemas import ChatBody, Message, ResponseFormat
from engine.serve.serving import Serving
from engine.serve.sse import respond
from engine.serve.tools import Offer, as_openai, call_grammar, offer_of
from engine.types import TokenEvent
from models.tool_calls import ToolCallStream

router = json_router()


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    serving = Serving.of(request)
    serving.check_model(body.model)
    messages = [template_message(index, each) for index, each in enumerate(body.messages)]
    offer = offer_of(body, serving.llm.llm.tool_style)
    params = await _params(body, serving, offer)
    timeout = timeout_of(body, serving.options)
    prompt = partial(serving.llm.stream_chat, messages, timeout=timeout, tools=offer.definitions)
    answers = Answers(serving, request, messages)
    await answers.start([prompt], params, timeout)
    return await respond(request, body, answers, ChatForm(serving, body, offer))


async def _params(body: ChatBody, serving: Serving, offer: Offer) -> list[SamplingParams]:
    options = serving.options
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    check_size("tools", offer.definitions, options)
    makers: Makers = {}
    if body.response_format is not None and body.response_format.type != "text":
        check_size("response_format", body.response_format.model_dump(), options)
        makers = {"response_format": partial(_json_grammar, body.response_format)}
    if offer.forced:
        makers = {**makers, "tool_choice": partial(call_grammar, offer.forced)}
    newer, older = body.max_completion_tokens, body.max_tokens
    return sampling_params(
        body,
        options,
        max_tokens=older if newer is None else newer,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await grammar_of(body, options, makers),
    )


def _json_grammar(wanted: ResponseFormat) -> Grammar:
    if wanted.type == "json_object":
        return Grammar.json_object()
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ValueError("response_format: got no json_schema.schema, expected one")
    return Grammar.json_schema(wanted.json_schema.schema_)


class ChatForm:
    """Answers as messages."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, serving: Serving, body: ChatBody, offer: Offer) -> None:
        self._serving, self._body, self._style = serving, body, offer.style
        self._calls: dict[int, ToolCallStream] = {}  # by choice
        self._begun: set[int] = set()  # choices that a chunk was made of
        self._is_terse = not body.logprobs and not wants_detail(body)

    def delta(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        message, reason = self._message(index, events)
        is_empty = not message["content"] and "tool_calls" not in message
        if self._is_terse and is_empty and reason is None:
            return None
        for number, call in enumerate(message.get("tool_calls", ())):
            call["index"] = number
        if index in self._begun:
            del message["role"]
            if not message["content"]:
                del message["content"]
        self._begun.add(index)
        return self._choice(index, "delta", message, reason, events)

    def whole(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        message, reason = self._message(index, events)
        if "tool_calls" in message:
            message["content"] = message["content"] or None
        return self._choice(index, "message", message, reason, events)

    def _message(
        self, index: int, events: Sequence[TokenEvent]
    ) -> tuple[dict[str, Any], str | None]:
        """What events add to a choice, and why it ends; its calls come with the last event."""
        stream = self._calls.setdefault(index, ToolCallStream(self._style))
        message: dict[str, Any] = {"role": "assistant"}
        text = stream.push("".join(event.text for event in events))
        reason: str | None = events[-1].finish_reason
        if reason is not None:
            rest, calls = stream.finish()
            text += rest
            if calls:
                message["tool_calls"] = as_openai(calls)
                reason = "tool_calls" if reason == "stop" else reason
        message["content"] = text
        return message, reason

    def _choice(
        self,
        index: int,
        name: str,
        message: dict[str, Any],
        reason: str | None,
        events: Sequence[TokenEvent],
    ) -> dict[str, Any]:
        return {
            "index": index,
            name: message,
            "logprobs": {"content": self._logprobs(events)} if self._body.logprobs else None,
            "finish_reason": reason,
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """One entry for each token, whatever was cut from the text."""
        num_top = self._body.top_logprobs or 0
        entries = []
        for event in events:
            if event.token_id is None:
                continue
            assert event.logprobs is not None
            ranked = sorted(event.logprobs.items(), key=lambda item: -item[1])[:num_top]
            entry = self._entry(event.token_id, event.logprobs[event.token_id])
            entries.append(entry | {"top_logprobs": [self._entry(*item) for item in ranked]})
        return entries

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = self._serving.token(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}


def template_message(index: int, message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: its text in one piece, a developer's as the system's.

    Raises ApiError, 400, for a tool's answer that does not say to which call.
    """
    plain = message.model_dump(exclude_none=True, exclude={"annotations"})
    if message.role == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    if message.role == "tool" and message.tool_call_id is None:
        place = f"messages.{index}.tool_call_id"
        raise ApiError(400, f"{place}: missing; a tool answers a call", param=place)
    return plain
