"""Slots of the cache: lent, and given back by whoever holds them last, be it the collector."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from tiny import tiny_llm

from engine import LLM, SamplingParams, kv_cache
from engine.pages import give_back

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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_of_forgotten_positions_goes_back_to_the_system():
    part = torch.ones(4, 3, 8192, 64, dtype=torch.float16)  # layers, heads, positions, dimension
    before = resident_bytes()
    give_back(part[:, 1:], 100, 8192)
    freed = before - resident_bytes()
    assert 0.9 < freed / (4 * 2 * 8092 * 128) < 1.1
    assert (part[:, 0] == 1).all() and (part[:, :, :100] == 1).all()
    assert (part[:, 1:, 128:8160] == 0).all()
    part[:, 1:] = 2  # the addresses are still good
    assert (part[:, 1:] == 2).all()


def test_nothing_is_forgotten_for_what_does_not_fit_even_so(llm):
    pool = llm.slots
    stream = llm.stream("x" * 60, GREEDY)
    next(stream)
    llm.generate("y" * 50, GREEDY)
    pool.capacity, held = pool.num_tokens, pool.num_tokens
    assert not pool.make_room(80) and pool.num_tokens == held
    assert pool.make_room(40) and pool.num_tokens < held


def test_a_slot_that_is_forgotten_gives_its_memory_back(llm, monkeypatch):
    given = []
    monkeypatch.setattr(
        kv_cache.KVCache, "give_back", lambda cache, slot, first, end: given.append((first, end))
    )
    llm.generate(["x" * 50, "y" * 60], GREEDY)
    assert llm.slots.num_tokens > 110 and not given
    llm.slots.capacity = llm.slots.num_tokens
    assert llm.slots.make_room(llm.slots.capacity)
    assert llm.slots.num_tokens == 0 and len(given) == 2
    assert all(first == 0 and end > 50 for first, end in given)
