"""A request's body as the engine's own parameters. What is wrong with it is a 400."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from engine.grammar import Grammar
from engine.llm import MAX_SEED
from engine.params import SamplingParams, Speculative
from engine.serve.errors import ApiError, bad_input
from engine.serve.options import ServeOptions
from engine.serve.schemas import GenerationBody, Speculation

# Fields that are called as in SamplingParams, and mean the same.
_SAME = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "min_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_GUIDED: dict[str, Callable[..., Grammar]] = {
    "guided_json": Grammar.json_schema,
    "guided_regex": Grammar.regex,
    "guided_choice": Grammar.choice,
}
Makers = Mapping[str, Callable[[], Grammar]]  # by the field that asks for a grammar


def sampling_params(
    body: GenerationBody,
    options: ServeOptions,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
) -> list[SamplingParams]:
    """Those of each of a prompt's `n` answers: the i-th has the seed `seed` + i.

    Raises ApiError, 400.
    """
    if isinstance(body.stop, list) and len(body.stop) > options.max_stops:
        message = f"stop: got {len(body.stop)} strings, expected at most {options.max_stops}"
        raise ApiError(400, message, param="stop")
    given: dict[str, Any] = {
        name: value for name in _SAME if (value := getattr(body, name)) is not None
    }
    limits = [limit for limit in (max_tokens, options.max_tokens) if limit is not None]
    with bad_input():
        params = SamplingParams(
            **given,
            max_tokens=min(limits, default=None),
            logprobs=logprobs,
            grammar=grammar,
            speculative=_drafting(body),
        )
    if params.seed is None:
        return [params] * (body.n or 1)
    seeds = ((params.seed + i) % (MAX_SEED + 1) for i in range(body.n or 1))
    return [replace(params, seed=seed) for seed in seeds]


async def grammar_of(
    body: GenerationBody, options: ServeOptions, makers: Makers | None = None
) -> Grammar | None:
    """What the answer must be, by guided_* or by one of `makers`; checked in a thread.

    Raises ApiError, 400, for a wrong grammar, one that is too long, or two of them.
    """
    makers = dict(makers or {})
    for name, make in _GUIDED.items():
        value = getattr(body, name)
        if value is not None:
            check_size(name, value, options)
            makers[name] = partial(make, value)
    if len(makers) > 1:
        message = f"{' and '.join(makers)}: expected one of them; leave the others out"
        raise ApiError(400, message, param=next(iter(makers)))
    for name, make in makers.items():
        with bad_input(name):
            return await asyncio.to_thread(make)
    return None


def timeout_of(body: GenerationBody, options: ServeOptions) -> float | None:
    """Seconds that the request may take: what it asks for, within what the server allows."""
    limits = [limit for limit in (body.timeout, options.timeout) if limit is not None]
    return min(limits, default=None)


def wants_detail(body: GenerationBody) -> bool:
    return isinstance(body.speculative, Speculation) and body.speculative.detail


def _drafting(body: GenerationBody) -> Speculative | None:
    wanted = body.speculative
    if isinstance(wanted, Speculation):
        return wanted.method if wanted.enabled else "off"
    return wanted


def check_size(name: str, value: object, options: ServeOptions) -> None:
    """Raises ApiError, 400, for a schema, expression or list of tools that is too long."""
    text = value if isinstance(value, str) else json.dumps(value)
    size = len(text.encode())
    if size > options.max_schema_bytes:
        message = f"{name}: got {size} bytes, expected at most {options.max_schema_bytes}"
        raise ApiError(400, message, param=name)
