"""A soak of AsyncLLM: thousands of requests leave nothing behind. And the README's service."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from dataclasses import replace
from pathlib import Path

from fastapi.testclient import TestClient
from test_engine_async import GREEDY, alone, config, engine, is_idle, until
from tiny import tiny_llm
from tokenizers_for_tests import CHAT_TEMPLATE

from engine import SamplingParams
from models.chat_template import ChatTemplate


def test_two_thousand_requests_leave_nothing_behind():
    """Of mixed lengths, plans and seeds, some cancelled: answers of one alone, flat memory."""
    draw = random.Random(7)
    ways = ("off", "ngram", "int8", "auto")
    kinds = [
        (
            "a system prompt that many share: " * (i % 2) + "p" * draw.randint(1, 60),
            replace(
                GREEDY, max_tokens=draw.randint(1, 24), speculative=ways[i % 4],
                temperature=draw.choice([0.0, 0.9]), seed=draw.randint(0, 9),
            ),
        )
        for i in range(24)
    ]  # fmt: skip
    expected = [alone(*kind) for kind in kinds]
    resident, counts = [], {"whole": 0, "cancelled": 0}

    async def ask(llm, gate):
        async with gate:
            i = draw.randrange(len(kinds))
            stream = llm.stream(*kinds[i])
            leave_after = draw.randint(0, 12) if draw.random() < 0.25 else None
            made = []
            async for event in stream:
                made.append(event.token_id)
                if len(made) - 1 == leave_after and event.finish_reason is None:
                    await stream.aclose()
                    counts["cancelled"] += 1
                    assert tuple(made) == expected[i].token_ids[: len(made)]
                    return
            assert stream.output().outputs[0] == expected[i]
            counts["whole"] += 1

    async def main():
        with engine(max_sequences=8, max_queue=2000) as llm:
            check_after_every_round(llm)
            for _ in range(10):
                gate = asyncio.Semaphore(32)
                await asyncio.gather(*(ask(llm, gate) for _ in range(200)))
                gc.collect()
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            await until(lambda: is_idle(llm))
            assert llm.llm.slots.make_room(0) and not llm.llm.slots._lent
            assert not llm._streams and llm._num_requests == 0

    asyncio.run(main())
    assert counts["whole"] + counts["cancelled"] == 2000 and counts["cancelled"] > 200
    assert max(resident[1:]) < 1.02 * resident[0], resident


def check_after_every_round(llm):
    """The scheduler's invariants, asserted after each step of the worker."""
    real, scheduler = llm._scheduler.step, llm._scheduler

    def step():
        events = real()
        groups = [*scheduler.waiting, *scheduler.reading, *scheduler.running]
        slots = [s.slot for s in (*scheduler.reading, *scheduler.running)]
        assert len(set(map(id, groups))) == len(groups) and len(set(slots)) == len(slots)
        assert all(s.num_cached == len(s.token_ids) - 1 for s in scheduler.running if not s.is_over)
        return events

    scheduler.step = step


def test_the_readme_example_of_a_service(monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code = next(block for block in blocks if "FastAPI" in block)
    assert len([line for line in code.splitlines() if line]) <= 20
    template = ChatTemplate(CHAT_TEMPLATE, "test")

    def small(**options):
        return tiny_llm(config(), chat_template=template, **options)

    monkeypatch.setattr("engine.llm.LLM", small)
    space = {}
    exec(code, space)
    with TestClient(space["app"]) as client:
        found = client.get("/answer", params={"question": "why?"})
        llm = space["app"].state.llm
        params = SamplingParams(max_tokens=200)
        assert found.status_code == 200 and found.text
        greedy = llm.llm.chat([{"role": "user", "content": "why?"}], params)
        assert greedy.stats.reused_tokens == greedy.stats.prompt_tokens - 1
    assert not llm._worker.is_alive()
