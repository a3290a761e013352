"""Rounds of draft, verify, accept: the cache after each, lengths, and where an answer ends."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from forced import force_drafts, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import family_config, tiny_llm
from tokenizers_for_tests import byte_tokenizer

from engine import SamplingParams
from engine.controller import Choice
from engine.prefill import read_chunk
from engine.round import decode_round, take
from engine.sequence import RunningSequence
from engine.stream import TextStream
from engine.types import Verdict
from models.plan import MAX_DRAFT, DraftPlan

VOCAB = byte_tokenizer().vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, speculative="off")
EVERYTHING = DraftPlan("all-16", "self", (16,) * 4)
CANARY = 777.0


def tokens(output):
    return output.outputs[0].token_ids


def small_llm(**options):
    changes = {
        name: options.pop(name) for name in ("max_positions", "eos_token_ids") if name in options
    }
    return tiny_llm(family_config("llama2", vocab_size=VOCAB, **changes), **options)


def valid(cache, slot, length):
    """Keys, values and last states of the valid positions."""
    parts = [part[:, slot, :, :length] for part in (cache.k, cache.v)]
    return torch.cat([part.flatten() for part in (*parts, cache.states[slot, :length])])


@pytest.mark.parametrize("lengths", [[4], [0, 3], [8, 0, 0, 1], [1, 2, 3, 4, 5, 6, 7, 8]], ids=str)
def test_the_cache_after_each_round_is_that_of_plain_decoding(lengths, monkeypatch):
    plain, llm = small_llm(), small_llm()
    prompt = [5, 6, 7, 8, 9, 10]
    final = tokens(plain.generate(prompt, replace(GREEDY, max_tokens=40))[0])
    for plan in (EVERYTHING, random_plan(2, 4), random_plan(2, 7)):
        turns = itertools.cycle(lengths)
        force_drafts(monkeypatch, lambda turns=turns: next(turns))
        params = replace(GREEDY, max_tokens=40, speculative=plan).with_defaults({})
        text = TextStream(byte_tokenizer())
        plans = llm._preparer.prepare(plan)
        sequence = RunningSequence(prompt, params, 0, text, frozenset(), 256, plans)
        sequence.slot = 0
        read_chunk(llm._passes, sequence)
        while sequence.finish_reason is None:
            decode_round(llm._passes, llm.costs, [sequence])
            length = sequence.num_cached
            assert length == len(sequence.token_ids) - 1
            assert torch.equal(valid(llm._cache, 0, length), valid(plain._cache, 0, length))
        assert tuple(sequence.token_ids[6:]) == final


@pytest.mark.parametrize("length", range(1, 9))
def test_a_draft_is_clipped_at_the_end_of_the_context(length, monkeypatch):
    """To the last position and not beyond: neighbouring slots and unused positions stay as set."""
    llm = small_llm(max_positions=32, max_sequences=3)
    prompt = list(range(10, 30))
    params = replace(GREEDY, max_tokens=None)
    expected = tokens(llm.generate(prompt, params)[0])
    assert len(expected) == 12
    for plan in (EVERYTHING, random_plan(2, 4)):
        for max_tokens in (None, 7):
            for part in llm._cache:
                part.fill_(CANARY)
            llm._pool = type(llm._pool)(llm._cache)
            force_drafts(monkeypatch, lambda: length)
            limited = replace(params, max_tokens=max_tokens, speculative=plan)
            output = llm.generate(prompt, limited)[0]
            assert tokens(output) == expected[:max_tokens]
            assert output.outputs[0].finish_reason == "length"
            # The last token of all is never run, so its position is not written either.
            end = 32 - 1 if max_tokens is None else 20 + 7 - 1
            cache = llm._cache
            # The heads of a position beside each other, so that all three have the same axes.
            for part in (*(p.transpose(2, 3) for p in (cache.k, cache.v)), cache.states[None]):
                assert (part[:, 0, :end] != CANARY).all()
                assert (part[:, 0, end:] == CANARY).all()
                assert (part[:, 1:] == CANARY).all()


class Silent(TextStream):
    def push(self, token_id):
        return ""


@settings(max_examples=200, deadline=None)
@given(
    max_tokens=st.integers(1, 60),
    rounds=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=60),
)
def test_lengths_add_up_whatever_is_drafted_and_accepted(max_tokens, rounds):
    params = replace(GREEDY, max_tokens=max_tokens).with_defaults({})
    text = Silent(byte_tokenizer())
    sequence = RunningSequence([1, 2, 3], params, 0, text, frozenset(), 64, (EVERYTHING,))
    sequence.num_cached = 3
    sequence.append(7, None)
    made = 1
    for drafted, accepted in rounds:
        if sequence.finish_reason is not None:
            break
        room = sequence.max_tokens - sequence.num_generated - 1
        num_drafted = min(drafted, room, MAX_DRAFT)
        num_accepted = min(accepted, num_drafted)
        # The last row of the verify pass is written within the sequence's own positions.
        assert len(sequence.token_ids) - 1 + num_drafted < 3 + sequence.max_tokens <= 64
        verdict = Verdict([9] * (num_accepted + 1), num_accepted, num_drafted)
        choice = Choice(EVERYTHING if num_drafted else None, num_drafted)
        sequence.drafting.observe(choice, verdict)
        events = []
        take(sequence, verdict, torch.zeros(num_accepted + 1, VOCAB), events)
        made += len(events)
        assert [event.from_draft for _, event in events] == [
            i < num_accepted for i in range(len(events))
        ]
        assert sequence.num_generated == made <= sequence.max_tokens
        assert sequence.num_cached == len(sequence.token_ids) - 1
        assert (sequence.finish_reason == "length") == (made == sequence.max_tokens)
    stats = sequence.stats()
    assert stats.accepted <= stats.drafted and stats.generated_tokens == made
    assert stats.accepted + stats.rounds == made - 1  # never more drafted than there is room for


def same_but_speed(a, b):
    return a.outputs == b.outputs and a.prompt_token_ids == b.prompt_token_ids


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
def test_an_answer_ends_at_every_offset_of_an_accepted_run(seed, monkeypatch):
    """EOS, stop tokens, stop strings, max_tokens: all that plain decoding says, to the letter."""
    params = replace(GREEDY, logprobs=2, max_tokens=12)
    if seed is not None:
        params = replace(params, temperature=1.1, seed=seed)
    llm = small_llm()
    free = tokens(llm.generate("offsets", params)[0])
    text = llm.generate("offsets", params)[0].outputs[0].text
    cases = [replace(params, max_tokens=n) for n in range(1, 13)]
    cases += [replace(params, stop_token_ids=(token,)) for token in free]
    cases += [replace(params, stop=text[i : i + 2]) for i in range(len(text) - 1)]
    cases += [replace(params, stop=(text[3:6], text[4:5]), min_tokens=3)]
    cases += [replace(params, stop_token_ids=(free[2], free[5]), min_tokens=n) for n in range(9)]
    for case in cases:
        expected = llm.generate("offsets", case)[0]
        for plan, length in ((EVERYTHING, 8), (EVERYTHING, 3), ("int8", 5)):
            force_drafts(monkeypatch, lambda length=length: length)
            output = llm.generate("offsets", replace(case, speculative=plan))[0]
            assert same_but_speed(output, expected), (case, plan)
    for token in free:
        config = family_config("llama2", vocab_size=VOCAB, eos_token_ids=(token,))
        with_eos = tiny_llm(config)
        stopping = replace(params, ignore_eos=False)
        expected = with_eos.generate("offsets", stopping)[0]
        assert tokens(expected)[-1] == token and token not in tokens(expected)[:-1]
        events = list(with_eos.stream("offsets", replace(stopping, speculative=EVERYTHING)))
        assert tuple(event.token_id for event in events) == tokens(expected)
        assert events[-1].finish_reason == "stop"


def test_events_say_which_tokens_were_drafted(monkeypatch):
    llm = small_llm()
    force_drafts(monkeypatch, lambda: 4)
    stream = llm.stream("from draft", replace(GREEDY, max_tokens=11, speculative=EVERYTHING))
    events = list(stream)
    pattern = [False] + [True] * 4 + [False] + [True] * 4 + [False]
    assert [event.from_draft for event in events] == pattern
    stats = stream.stats
    assert events[-1].stats == stats and not any(event.stats for event in events[:-1])
    assert (stats.rounds, stats.drafted, stats.accepted) == (2, 8, 8)
    assert stats.tokens_per_round == 5.0 and stats.acceptance_by_position == (1.0,) * 4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_draft_stops_where_the_model_is_unsure(batch, monkeypatch):
    """The unsure token is still verified; a limit of 1 stops after the first, 0 never."""
    llm = small_llm(max_sequences=batch)
    force_drafts(monkeypatch, lambda: 6)
    prompts = ["unsure", "sure", "x"][:batch]
    expected = [tokens(output) for output in llm.generate(prompts, GREEDY)]
    lengths = {}
    for limit in (0.0, 0.08, 1.0):
        plan = replace(EVERYTHING, stop_probability=limit, name=f"stop-{limit}")
        outputs = llm.generate(prompts, replace(GREEDY, speculative=plan))
        assert [tokens(output) for output in outputs] == expected
        lengths[limit] = [len(output.stats.drafted_by_position) for output in outputs]
        assert all(output.stats.acceptance_rate == 1.0 for output in outputs)
    assert lengths[0.0] == [6] * batch and lengths[1.0] == [1] * batch
    drafted = [
        llm.generate(prompts[0], replace(GREEDY, speculative=plan))[0].stats
        for plan in (replace(EVERYTHING, stop_probability=s) for s in (0.0, 0.08, 1.0))
    ]  # fmt: skip
    rounds = [stats.rounds for stats in drafted]
    assert rounds[0] < rounds[1] <= rounds[2]


def test_nothing_is_drafted_after_what_ends_the_answer(monkeypatch):
    llm = small_llm()
    free = tokens(llm.generate("ends here", GREEDY)[0])
    force_drafts(monkeypatch, lambda: 8)
    first = {token: i for i, token in reversed([*enumerate(free)])}
    for end, at in first.items():
        # Room for whole drafts, wherever it ends.
        params = replace(GREEDY, max_tokens=60, speculative=EVERYTHING, stop_token_ids=(end,))
        output = llm.generate("ends here", params)[0]
        assert tokens(output) == free[: at + 1]
        # Of whole rounds of 9 tokens all 8 drafted ones count, of the last those up to the end.
        later = output.stats.generated_tokens - 1
        assert output.stats.drafted == output.stats.accepted
        assert output.stats.drafted == later - later // 9


@pytest.mark.parametrize("taken", range(1, 14))
def test_a_stream_closed_in_mid_round_leaves_what_plain_decoding_leaves(taken, monkeypatch):
    """Tokens of the round that nobody took are neither counted nor kept in the cache."""
    force_drafts(monkeypatch, lambda: 4)
    held, stats = [], []
    for plan in ("off", EVERYTHING):
        llm = small_llm()
        stream = llm.stream("closed early", replace(GREEDY, speculative=plan, logprobs=0))
        for _ in range(taken):
            next(stream)
        stream.close()
        llm._pool._take_back()
        held.append(next(iter(llm._pool._free.values())))
        stats.append(stream.stats)
    assert held[0] == held[1] and len(held[0]) == stats[0].prompt_tokens + taken - 1
    assert stats[0].generated_tokens == stats[1].generated_tokens == taken
