"""Slots of the cache: lent, and given back by whoever holds them last, be it the collector."""

from __future__ import annotations

import gc
import threading

import pytest
from tiny import tiny_llm

from engine import LLM, SamplingParams, kv_cache

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, speculative="off")


def drop_a_stream_in_a_cycle(llm: LLM) -> None:
    """Leave a running answer to the garbage collector, and to nobody else."""
    stream = llm.stream("never read to its end", GREEDY)
    next(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)


@pytest.fixture
def llm() -> LLM:
    return tiny_llm(max_sequences=2)


def test_a_stream_collected_while_a_slot_is_looked_for(llm, monkeypatch):
    """The collector closes the stream in the middle of `acquire`, whose lock this thread holds."""
    expected = llm.generate("the next one", GREEDY)[0].outputs
    compare, collected = kv_cache.common_prefix, []

    def collect_and_compare(a, b):
        collected.append(gc.collect())
        return compare(a, b)

    drop_a_stream_in_a_cycle(llm)
    monkeypatch.setattr(kv_cache, "common_prefix", collect_and_compare)
    outputs = []
    thread = threading.Thread(
        target=lambda: outputs.append(llm.generate("the next one", GREEDY)[0].outputs), daemon=True
    )
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the request waits for a lock that its own thread holds"
    assert collected and outputs == [expected]


def test_a_dropped_stream_gives_its_slot_back(llm):
    for _ in range(5):
        drop_a_stream_in_a_cycle(llm)
        gc.collect()
    outputs = llm.generate(["one", "two"], GREEDY)
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)


def test_a_slot_given_back_twice_is_lent_once(llm):
    streams = [llm.stream(prompt, GREEDY) for prompt in ("a", "b")]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
        stream.close()
    first, second = (llm.stream(prompt, GREEDY) for prompt in ("c", "d"))
    next(first), next(second)
    with pytest.raises(RuntimeError, match="slot"):
        next(llm.stream("e", GREEDY))
