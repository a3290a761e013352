"""The scheduler: who runs when, what neighbours cost, and that they never change an answer."""

from __future__ import annotations

import time
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny import family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

import engine.round
from engine import SamplingParams
from engine.order import ORDERS, Pace, first_come, least_slack
from engine.round_buffers import MAX_WIDTH

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WAYS = ("off", "ngram", "int8", "auto")


def config(**changes):
    return family_config("llama2", vocab_size=byte_tokenizer().vocab_size, **changes)


def request(llm, prompt, params=GREEDY, timeout=None):
    sequence = llm.sequence(prompt, params)
    if timeout is not None:
        sequence.deadline = time.perf_counter() + timeout
    return sequence


def run(scheduler):
    """Steps until nothing is left; the events of each."""
    steps = []
    while scheduler.is_busy:
        steps.append(scheduler.step())
        assert len(steps) < 5000, "the scheduler makes no progress"
    return steps


def answer(sequence):
    return tuple(sequence.token_ids[sequence.num_prompt :])


def alone(prompt, params=GREEDY, **changes):
    return tiny_llm(config(**changes)).generate(prompt, params)[0].outputs[0].token_ids


def test_sequences_join_and_leave_between_rounds():
    llm = tiny_llm(config(), max_sequences=3)
    scheduler = llm.scheduler()
    first = request(llm, "the first one", replace(GREEDY, speculative="off"))
    scheduler.submit(first)
    for _ in range(8):
        scheduler.step()
    assert scheduler.running == [first] and 4 < first.num_generated < 12
    second = request(llm, "a second one", replace(GREEDY, max_tokens=3, speculative="off"))
    scheduler.submit(second)
    while not second.is_over:
        scheduler.step()
    assert not first.is_over
    run(scheduler)
    assert answer(first) == alone("the first one")
    assert answer(second) == alone("a second one")[:3]


@pytest.mark.parametrize("order", ORDERS)
def test_a_long_prompt_holds_others_up_by_one_chunk(order):
    llm = tiny_llm(config(), max_sequences=3)
    scheduler = llm.scheduler(ORDERS[order], chunk_tokens=8, is_shared=True)
    runner = request(llm, "runs", replace(GREEDY, max_tokens=60, speculative="off"))
    scheduler.submit(runner)
    while not runner.num_generated:
        scheduler.step()
    long = request(llm, "x" * 100)
    scheduler.submit(long)
    while long.num_unread:
        made, read = runner.num_generated, long.num_cached
        scheduler.step()
        assert runner.num_generated >= made + (long.num_generated == 0)
        assert long.num_cached - read <= 8
    assert runner.num_generated > 10


def test_a_short_prompt_passes_a_long_one_by_slack_and_not_by_first_come():
    finished = {}
    for order in ORDERS:
        llm = tiny_llm(config(), max_sequences=3)
        scheduler = llm.scheduler(ORDERS[order], chunk_tokens=8, is_shared=True)
        long = request(llm, "y" * 120, replace(GREEDY, max_tokens=2))
        short = request(llm, "z", replace(GREEDY, max_tokens=2))
        scheduler.submit(long)
        scheduler.step()
        scheduler.submit(short)
        steps = run(scheduler)
        firsts = [event[0] for events in steps for event in events]
        finished[order] = firsts.index(short) < firsts.index(long)
    assert finished == {"fcfs": False, "slack": True}


def test_what_waits_longest_has_its_turn_at_last():
    llm, pace, now = tiny_llm(config()), Pace(), 1000.0
    old, new = request(llm, "w" * 200), request(llm, "v")
    old.submitted, new.submitted = now - 600, now
    assert least_slack(old, now, pace) < least_slack(new, now, pace)
    old.submitted = now
    assert least_slack(new, now, pace) < least_slack(old, now, pace)
    urgent = request(llm, "w" * 200)
    urgent.submitted, urgent.deadline = now, now + 1
    assert least_slack(urgent, now, pace) < least_slack(old, now, pace)
    assert first_come(old, now, pace) == first_come(new, now, pace)


def test_more_tokens_a_round_mean_less_that_remains():
    llm, pace = tiny_llm(config()), Pace()
    slow, fast = request(llm, "a", GREEDY), request(llm, "b", GREEDY)
    for sequence, rounds in ((slow, 10), (fast, 3)):
        sequence.token_ids += [1] * 10
        sequence.drafting.rounds_by_plan["off"] = rounds
    assert pace.remaining_seconds(fast) < pace.remaining_seconds(slow)


def test_a_deadline_ends_what_waits_reads_and_runs():
    llm = tiny_llm(config(), max_sequences=2)
    scheduler = llm.scheduler(chunk_tokens=4, is_shared=True)
    running = request(llm, "runs", replace(GREEDY, max_tokens=200))
    scheduler.submit(running)
    while running.num_generated < 5:
        scheduler.step()
    reading, waiting = request(llm, "r" * 40), request(llm, "w")
    scheduler.submit(reading)
    scheduler.step()
    scheduler.submit(waiting)
    assert (scheduler.reading, scheduler.waiting) == ([reading], [waiting])
    had = answer(running)
    for sequence in (running, reading, waiting):
        sequence.deadline = time.perf_counter()
    ends = dict(scheduler.step())
    assert {event.finish_reason for event in ends.values()} == {"timeout"}
    assert all(event.token_id is None for event in ends.values()) and len(ends) == 3
    assert answer(running) == had and running.output().outputs[0].finish_reason == "timeout"
    assert ends[waiting].stats.generated_tokens == 0
    run(scheduler)
    assert alone("again") == llm.generate("again", GREEDY)[0].outputs[0].token_ids


def test_text_held_for_a_stop_string_comes_with_a_deadline():
    llm = tiny_llm(config())
    whole = llm.generate("held", replace(GREEDY, max_tokens=40))[0].outputs[0].text
    stop = whole[-3:] + "never"
    scheduler, pieces = llm.scheduler(), []
    sequence = request(llm, "held", replace(GREEDY, max_tokens=41, stop=stop))
    scheduler.submit(sequence)
    while sequence.num_generated < 40:
        pieces += [event.text for _, event in scheduler.step()]
    sequence.deadline = 0.0
    pieces += [event.text for _, event in scheduler.step()]
    assert "".join(pieces) == sequence.text.text and sequence.text.text.startswith(whole[:-3])


def break_by_error(llm, sequence, monkeypatch):
    sequence.drafting.controller.choose = Mock(side_effect=LookupError("injected"))
    return LookupError


def break_by_memory(llm, sequence, monkeypatch):
    real = engine.round.run_round

    def run_round(passes, sequences, choices):
        if sequence in sequences:
            raise torch.OutOfMemoryError("injected")
        return real(passes, sequences, choices)

    monkeypatch.setattr(engine.round, "run_round", run_round)
    return torch.OutOfMemoryError


def break_by_nan(llm, sequence, monkeypatch):
    llm._cache.k[:, sequence.slot, :, : sequence.num_cached] = torch.nan
    return RuntimeError


@pytest.mark.parametrize("break_it", [break_by_error, break_by_memory, break_by_nan])
def test_a_request_that_fails_leaves_the_others_alone(break_it, monkeypatch):
    llm = tiny_llm(config(), max_sequences=4)
    scheduler = llm.scheduler()
    prompts = ["one of four", "two of four", "three of four", "four of four"]
    sequences = [request(llm, prompt) for prompt in prompts]
    for sequence in sequences:
        scheduler.submit(sequence)
    while len(scheduler.running) < 4:
        scheduler.step()
    kind = break_it(llm, sequences[1], monkeypatch)
    failures = [event for events in run(scheduler) for event in events if event[0].error]
    assert [sequence for sequence, _ in failures[-1:]] == [sequences[1]]
    assert isinstance(sequences[1].error, kind) and isinstance(failures[-1][1], kind)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        if sequence is not sequences[1]:
            assert answer(sequence) == alone(prompt)
    monkeypatch.undo()
    # A slot with NaN in it is no prefix of anything.
    assert llm.generate(prompts[1], GREEDY)[0].outputs[0].token_ids == alone(prompts[1])


def test_short_conversations_share_the_room_of_few_long_ones():
    llm = tiny_llm(config(max_positions=256), max_sequences=16, cache_tokens=4 * 256)
    scheduler = llm.scheduler()
    sequences = [
        request(llm, f"{i:02d}", replace(GREEDY, max_tokens=40, speculative="off"))
        for i in range(16)
    ]
    for sequence in sequences:
        scheduler.submit(sequence)
    most = 0
    while scheduler.is_busy:
        scheduler.step()
        most = max(most, len(scheduler.running))
        assert llm.slots.num_tokens <= 4 * 256
    assert most == 16 and scheduler.num_preempted == 0
    assert all(
        answer(s) == alone(f"{i:02d}", replace(GREEDY, max_tokens=40))
        for i, s in enumerate(sequences)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_what_outgrows_the_room_waits_and_keeps_its_tokens(order):
    llm = tiny_llm(config(max_positions=128), max_sequences=4, cache_tokens=160)
    scheduler = llm.scheduler(ORDERS[order], chunk_tokens=8, is_shared=True)
    prompts = ["a" * 10, "b" * 11, "c" * 12]
    params = [
        replace(GREEDY, max_tokens=90, temperature=0.9, seed=i, frequency_penalty=0.3 * i)
        for i in range(3)
    ]
    sequences = [request(llm, p, each) for p, each in zip(prompts, params, strict=True)]
    for sequence in sequences:
        scheduler.submit(sequence)
    run(scheduler)
    assert scheduler.num_preempted > 0
    for sequence, prompt, each in zip(sequences, prompts, params, strict=True):
        assert answer(sequence) == alone(prompt, each, max_positions=128)


def test_a_prefix_that_another_request_has_is_copied(monkeypatch):
    system = "s" * 60
    llm = tiny_llm(config(), max_sequences=3)
    scheduler = llm.scheduler()
    first = request(llm, system + "first", replace(GREEDY, max_tokens=60))
    scheduler.submit(first)
    while first.num_generated < 3:
        scheduler.step()
    second = request(llm, system + "second")  # while the first one runs
    scheduler.submit(second)
    run(scheduler)
    assert second.num_reused == 61  # and the token that begins a text
    assert llm.slots.num_hits == 1 and llm.slots.num_hit_tokens == 61
    assert answer(second) == alone(system + "second")
    third = llm.generate(system + "first, again", GREEDY)[0]
    assert third.stats.reused_tokens == 61 + len("first")
    # The conversations that the prefix came from are still whole.
    for sequence in (first, second):
        again = llm.generate([*sequence.token_ids[:-1], 65], GREEDY)[0]
        assert again.stats.reused_tokens >= len(sequence.token_ids) - 2
    assert third.outputs[0].token_ids == alone(system + "first, again")


class Requests(RuleBasedStateMachine):
    """Submit, cancel, time out, fail and finish in any order; every step keeps the accounts."""

    @initialize(order=st.sampled_from(sorted(ORDERS)), capacity=st.integers(96, 300))
    def begin(self, order, capacity):
        self.llm = tiny_llm(config(max_positions=96), max_sequences=3, cache_tokens=capacity)
        self.scheduler = self.llm.scheduler(ORDERS[order], chunk_tokens=8, is_shared=True)
        self.requests, self.broken, self.cut = {}, set(), set()

    @property
    def alive(self):
        return [s for s in self.requests if not s.is_over and s not in self.cut]

    @rule(
        size=st.integers(1, 60),
        kind=st.sampled_from("abc"),
        max_tokens=st.integers(1, 30),
        seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 0.8]),
        way=st.sampled_from(WAYS),
    )
    def submit(self, size, kind, max_tokens, seed, temperature, way):
        params = replace(
            GREEDY, max_tokens=max_tokens, seed=seed, temperature=temperature, speculative=way
        )
        prompt = "shared system prompt " * (size > 20) + kind * size
        sequence = request(self.llm, prompt[:80], params)
        self.requests[sequence] = (prompt[:80], params)
        self.scheduler.submit(sequence)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.check(self.scheduler.step())

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(self.alive))
        self.cut.add(sequence)
        self.scheduler.drop(sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def time_out(self, data):
        sequence = data.draw(st.sampled_from(self.alive))
        sequence.deadline = 0.0
        self.check(self.scheduler.step())
        assert sequence.finish_reason == "timeout"

    @precondition(lambda self: any(s.num_generated for s in self.alive))
    @rule(data=st.data())
    def fail(self, data):
        sequence = data.draw(st.sampled_from([s for s in self.alive if s.num_generated]))
        sequence.drafting.controller.choose = Mock(side_effect=ArithmeticError("injected"))
        self.broken.add(sequence)

    def check(self, events):
        for sequence, event in events:
            assert sequence not in self.cut
            assert not isinstance(event, Exception) or sequence in self.broken
        for sequence in [s for s in self.requests if s.is_over]:
            prompt, params = self.requests.pop(sequence)
            expected = alone(prompt, params, max_positions=96)
            if sequence.finish_reason in ("stop", "length"):
                assert answer(sequence) == expected
            else:
                assert answer(sequence) == expected[: sequence.num_generated]

    @invariant()
    def accounts_are_right(self):
        scheduler, pool = self.scheduler, self.llm.slots
        groups = [*scheduler.waiting, *scheduler.reading, *scheduler.running]
        assert len({id(s) for s in groups}) == len(groups)
        held = [*scheduler.reading, *scheduler.running]
        slots = [s.slot for s in held]
        assert len(set(slots)) == len(slots) and all(0 <= slot < 3 for slot in slots)
        assert all(s.num_unread >= 0 for s in held if not s.is_over)
        assert pool.num_tokens <= pool.capacity + MAX_WIDTH * (len(held) + 1)

    def teardown(self):
        if hasattr(self, "scheduler"):
            for events in run(self.scheduler):
                self.check(events)
            assert not [s for s in self.requests if s not in self.cut]
            assert self.llm.slots.make_room(0) and not self.llm.slots._lent


Requests.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestRequests = Requests.TestCase
