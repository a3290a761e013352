"""Long prompts are read in chunks, between which the caller hears of it and may stop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from test_engine_llm import GREEDY, tokens
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

import engine.chat.conversation
import engine.prefill
from engine.chat.conversation import ask
from engine.command import without_collection
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
    assert stream.stats.generated_tokens == 0 and stream.stats.prefill_seconds > 0
    feature = llm.feature(PROMPT)  # it goes on from there
    fresh = tiny_llm()
    assert torch.equal(feature, fresh.feature(PROMPT))
    assert tokens(llm.generate(PROMPT, GREEDY)[0]) == tokens(fresh.generate(PROMPT, GREEDY)[0])


def test_what_was_read_of_a_stopped_prompt_is_not_read_again():
    llm = tiny_llm()
    stream = llm.stream(PROMPT, GREEDY, lambda done, total: 1 // (done - 16))
    with closing(stream), pytest.raises(ZeroDivisionError):
        next(stream)
    assert llm.generate(PROMPT, GREEDY)[0].stats.reused_tokens == 16


def test_an_engine_that_is_closed_reads_no_further():
    llm, steps = tiny_llm(), []

    def close(done: int, total: int) -> None:
        steps.append(done)
        llm.close()

    with pytest.raises(RuntimeError, match="the engine is closed"):
        next(llm.stream(PROMPT, GREEDY, close))
    assert steps == [8]


def test_garbage_is_not_looked_for_while_a_model_loads():
    with pytest.raises(InterruptedError), without_collection():
        with without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise InterruptedError
    assert gc.isenabled()


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
