"""The API over a real engine under load: a full queue, clients that leave, an end in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serve_app import (
    CHAT,
    COMPLETIONS,
    HELLO,
    Exchange,
    app_of,
    ascii_llm,
    chunks_of,
    client_of,
    error_of,
    recorder,
    until,
    wait_idle,
)

from engine.async_llm import AsyncLLM
from models.tokenizer import Tokenizer

LONG = {"prompt": [*b"abc"], "ignore_eos": True, "max_tokens": 250}


@contextmanager
def standstill(llm: AsyncLLM) -> Iterator[None]:
    """The engine makes no step meanwhile."""
    may_go_on = threading.Event()
    llm._post(lambda: may_go_on.wait(30) and None)
    try:
        yield
    finally:
        may_go_on.set()


@pytest.fixture
def llm() -> Iterator[AsyncLLM]:
    with AsyncLLM(ascii_llm(max_sequences=2), max_queue=1) as llm:
        yield llm


def is_idle(llm: AsyncLLM) -> bool:
    return llm.load.running == llm.load.waiting == 0


def test_a_full_queue_is_told_at_once(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a prompt of a megabyte is looked at."""

    async def run() -> None:
        app = app_of(llm)
        with standstill(llm):
            taken = [Exchange(app, COMPLETIONS, LONG | {"stream": True}) for _ in range(3)]
            await until(lambda: sum((llm.load.running, llm.load.waiting)) == 3)
            monkeypatch.setattr(Tokenizer, "encode", lambda *_args, **_kwargs: pytest.fail("read"))
            long = {"messages": [{"role": "user", "content": "x" * (1 << 20)}]}
            for path, body in ((CHAT, long), (COMPLETIONS, {"prompt": "x" * (1 << 20)})):
                for count in (1, 4):
                    refused = Exchange(app, path, body | {"n": count})
                    await refused.task
                    assert refused.status == 503
                    assert (b"retry-after", b"1") in refused.sent[0]["headers"]
            assert recorder(app).named("rejected") == [["full"]] * 4
        for exchange in taken:
            await exchange.task
            assert len(chunks_of(exchange.text)) > 1
        await until(lambda: is_idle(llm))

    asyncio.run(run())


def test_answers_that_find_no_room_leave_none_behind(llm: AsyncLLM) -> None:
    client = client_of(llm)
    with standstill(llm):
        response = client.post(COMPLETIONS, json=LONG | {"n": 4})  # there is room for three
    assert response.status_code == 503 and error_of(response)["type"] == "overloaded_error"
    assert client.post(COMPLETIONS, json=LONG | {"n": 3}).status_code == 200
    wait_idle(llm)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_leaves_frees_its_slots(llm: AsyncLLM, is_streamed: bool, count: int) -> None:
    async def run() -> None:
        app = app_of(llm)
        body = LONG | {"stream": is_streamed, "n": count}
        with standstill(llm):
            exchange = Exchange(app, COMPLETIONS, body)
            await until(lambda: sum((llm.load.running, llm.load.waiting)) == count)
            exchange.left.set()
            await asyncio.wait_for(exchange.task, 5)
        await until(lambda: is_idle(llm))
        assert len(recorder(app).named("cancelled")) == count
        assert not recorder(app).named("finished")
        again = Exchange(app, COMPLETIONS, LONG)
        await again.task
        assert again.status == 200

    asyncio.run(run())


def test_one_that_leaves_in_the_middle_of_its_answer(llm: AsyncLLM) -> None:
    async def run() -> None:
        app = app_of(llm)
        exchange = Exchange(app, COMPLETIONS, LONG | {"stream": True})
        await until(lambda: len(exchange.sent) > 3)
        with standstill(llm):
            exchange.left.set()
            await asyncio.wait_for(exchange.task, 5)
        await until(lambda: is_idle(llm))
        assert recorder(app).named("cancelled") == [[]]

    asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_end_in_between(llm: AsyncLLM, is_streamed: bool) -> None:
    """Answers under way end with what they have; new requests are refused."""

    async def run() -> None:
        app = app_of(llm)
        with standstill(llm):
            exchange = Exchange(app, COMPLETIONS, LONG | {"stream": is_streamed})
            await until(lambda: sum((llm.load.running, llm.load.waiting)) == 1)
            draining = asyncio.ensure_future(llm.drain(0))
            await asyncio.sleep(0.05)
            late = Exchange(app, CHAT, {"messages": HELLO})
            await late.task
            assert late.status == 503
            assert recorder(app).named("rejected") == [["drain"]]
        await draining
        await exchange.task
        assert exchange.status == 200 and '"finish_reason":"abort"' in exchange.text

    asyncio.run(run())


def test_nothing_is_kept_of_requests_that_were_refused(llm: AsyncLLM) -> None:
    async def run() -> None:
        app = app_of(llm)
        with standstill(llm):
            taken = [Exchange(app, COMPLETIONS, LONG) for _ in range(3)]
            await until(lambda: sum((llm.load.running, llm.load.waiting)) == 3)
            await asyncio.sleep(0.1)
            before = asyncio.all_tasks()
            for _ in range(200):
                refused = Exchange(app, CHAT, {"messages": HELLO})
                await refused.task
                assert refused.status == 503
            assert asyncio.all_tasks() == before
        bodies: list[Any] = [await exchange.task for exchange in taken]
        assert len(bodies) == 3

    asyncio.run(run())
