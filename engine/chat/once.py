"""One answer: where its prompt comes from, and how it is printed."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engine.chat.conversation import Conversation, ask, check_text, unix_text
from engine.chat.terminal import AnswerWriter
from engine.interrupts import noted_interrupts
from engine.params import SamplingParams
from engine.types import RequestStats
from models.messages import cause_of

if TYPE_CHECKING:
    from engine.llm import LLM


def read_prompt(argument: str | None) -> str | None:
    """The argument, or standard input; None where that is a terminal.

    Raises ValueError for an empty prompt, and for one that cannot be read.
    """
    if argument is not None:
        name, prompt = "--prompt", unix_text(argument)
    elif sys.stdin is not None and sys.stdin.isatty():
        return None
    else:
        name, prompt = "standard input", unix_text(_read_stdin()).rstrip("\n")
    if not prompt.strip():
        raise ValueError(f"{name}: the prompt is empty")
    return check_text(name, prompt)


def _read_stdin() -> str:
    if sys.stdin is None:
        return ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not valid UTF-8: {error.reason}") from None
    except OSError as error:
        cause = error.strerror or cause_of(error)
        raise ValueError(f"standard input: cannot be read: {cause}") from None


def answer_text(llm: LLM, params: SamplingParams, conversation: Conversation) -> RequestStats:
    """Print the answer as it comes. Raises KeyboardInterrupt where it was stopped."""
    writer = AnswerWriter(sys.stdout)
    with writer, noted_interrupts(lambda: writer.has_started) as is_stopped:
        answer = ask(llm, conversation.asked(), params, writer.write, is_stopped)
        if not writer.has_started and not is_stopped():
            writer.write("")  # an empty answer is an empty line
    return answer.stats


def answer_json(llm: LLM, params: SamplingParams, conversation: Conversation) -> RequestStats:
    """Print the answer as one JSON document. Raises KeyboardInterrupt where it was stopped."""
    with noted_interrupts() as is_stopped:
        answer = ask(llm, conversation.asked(), params, lambda text: None, is_stopped)
    document = {
        "model": llm.model_name,
        "prompt_token_ids": answer.prompt_token_ids,
        "text": answer.text,
        "token_ids": [event.token_id for event in answer.events],
        "finish_reason": answer.finish_reason,
        "stats": _stats_document(answer.stats),
    }
    print(json.dumps(document), flush=True)
    return answer.stats


def _stats_document(stats: RequestStats) -> dict[str, Any]:
    derived = ("acceptance_rate", "tokens_per_round", "acceptance_by_position")
    document = {**asdict(stats), **{name: getattr(stats, name) for name in derived}}
    if not math.isfinite(stats.ratio):
        document["ratio"] = None  # JSON has no infinity
    return document
