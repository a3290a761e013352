"""Long prompts are read in chunks, between which the caller hears of it and may stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from test_engine_llm import GREEDY, tokens
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

import engine.chat.conversation
import engine.prefill
from engine.chat.conversation import ask
from models.chat_template import ChatTemplate

PROMPT = "a prompt of 27 characters.."


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(engine.prefill, "CHUNK_TOKENS", 8)


def test_a_long_prompt_says_how_far_it_is():
    llm, steps = tiny_llm(), []

    def note(*step: int) -> None:
        steps.append(step)

    events = list(llm.stream(PROMPT, GREEDY, note))
    total = len(llm.generate(PROMPT, GREEDY)[0].prompt_token_ids)
    assert steps == [(8, total), (16, total), (24, total), (total, total)]
    assert tuple(event.token_id for event in events) == tokens(
        tiny_llm().generate(PROMPT, GREEDY)[0]
    )
    steps.clear()
    list(llm.stream(PROMPT + " and more", GREEDY, note))
    assert steps[0][0] == total + 8 and len(steps) == 2  # what the cache held is not read again


def test_a_prompt_is_stopped_between_chunks():
    llm = tiny_llm()

    def stop(done: int, total: int) -> None:
        if done == 16:
            raise InterruptedError

    stream = llm.stream(PROMPT, GREEDY, stop)
    with pytest.raises(InterruptedError):
        next(stream)
    assert stream.stats.generated_tokens == 0
    whole = llm.generate(PROMPT, GREEDY)[0]
    assert whole.stats.reused_tokens == 16  # it goes on from there
    assert tokens(whole) == tokens(tiny_llm().generate(PROMPT, GREEDY)[0])


@pytest.fixture
def chat(monkeypatch):
    """A model that answers messages, and what a progress bar was told: None at its end."""
    drawn = []

    @contextmanager
    def bar() -> Iterator[object]:
        yield lambda what, done, total: drawn.append((done, total))
        drawn.append(None)

    monkeypatch.setattr(engine.chat.conversation, "progress_bar", bar)
    return tiny_llm(chat_template=ChatTemplate(CHAT_TEMPLATE, "test")), drawn


def test_the_chat_draws_a_bar_until_the_first_token(chat):
    llm, drawn = chat
    answer = ask(llm, [{"role": "user", "content": PROMPT}], GREEDY, drawn.append)
    total = len(answer.prompt_token_ids)
    assert drawn[0] == (8, total) and drawn[-(-total // 8) - 1] == (total, total)
    assert drawn.index(None) == -(-total // 8)
    assert "".join(drawn[drawn.index(None) + 1 :]) == answer.text != ""
    drawn.clear()
    ask(llm, [{"role": "user", "content": PROMPT}], GREEDY, drawn.append)  # the cache has it
    assert None not in drawn


def test_the_chat_stops_while_a_prompt_is_read(chat):
    llm, drawn = chat
    checks = iter([False, True])
    answer = ask(
        llm, [{"role": "user", "content": PROMPT}], GREEDY, drawn.append, lambda: next(checks)
    )
    assert answer.events == () and answer.finish_reason is None
    assert drawn == [(8, len(answer.prompt_token_ids)), None]
