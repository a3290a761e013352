"""Grammars: what may follow, what is forced, and where an answer ends."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
from forced import force_drafts
from grammars import CASES, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lossless_grammar import EVERYTHING, GREEDY, SAMPLED, make, run
from test_models_tokenizer_spm import trained_spm
from tiny import family_config, tiny_llm
from tokenizers_for_tests import EOS, byte_tokenizer

import engine.grammar
from engine import Grammar, SamplingParams
from engine.costs import PassCosts
from engine.grammar_state import GrammarState, _token_trie
from engine.passes import MAX_WIDTH
from models.tokenizer import load_tokenizer

TOKENIZER = byte_tokenizer()
VOCAB = TOKENIZER.vocab_size


def state_of(grammar, ends=(EOS,), tokenizer=TOKENIZER):
    return GrammarState(grammar, tokenizer, tokenizer.vocab_size, ends)


def follow(state, text):
    for byte in text.encode():
        state.append(byte)
    return state


# What may follow.


@given(st.lists(st.text("abé<", min_size=1, max_size=5), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_choice_allows_exactly_what_continues_one(texts, data):
    wanted = [text.encode() for text in texts]
    state, answer = state_of(Grammar.choice(texts)), b""
    while True:
        next_bytes = {w[len(answer)] for w in wanted if w.startswith(answer) and w != answer}
        if not next_bytes:
            assert state.mask() is None and answer in wanted
            break
        assert tokens_of(state) == next_bytes | ({EOS} if answer in wanted else set())
        assert state.num_allowed([EOS, *next_bytes]) == (answer in wanted)  # nothing after an end
        byte = data.draw(st.sampled_from(sorted(next_bytes)))
        is_complete = state.append(byte)
        answer += bytes([byte])
        assert is_complete == (state.mask() is None)


@given(CASES, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_drafts_leave_no_trace(case, seed):
    """The masks after any answer are those of a state that never saw a draft."""
    draw, (grammar, _) = random.Random(seed), case
    state, answer = state_of(grammar), []
    for _ in range(25):
        for _ in range(draw.randrange(3)):
            drafted = []
            for _ in range(draw.randrange(6)):
                allowed = sorted(tokens_of(state, drafted))
                is_wild = not allowed or draw.random() < 0.2
                drafted.append(draw.randrange(VOCAB) if is_wild else draw.choice(allowed))
            num_allowed = state.num_allowed(drafted)
            for i, token in enumerate(drafted):
                is_allowed = token in tokens_of(state, drafted[:i])
                assert is_allowed == (i < num_allowed), (drafted, i)
        forced = state.forced(draw.randrange(MAX_WIDTH))
        assert not forced or tokens_of(state) == {forced[0]}
        fresh = state_of(grammar)
        for token in answer:
            fresh.append(token)
        allowed = sorted(tokens_of(state))
        assert tokens_of(fresh) == set(allowed) and fresh.forced(5) == state.forced(5)
        token = draw.choice(allowed)
        if token == EOS or state.append(token):
            break
        answer.append(token)


def test_json_is_on_one_line_and_what_must_come_is_forced():
    properties = {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}}
    schema = {"properties": properties, "required": ["name", "age"], "additionalProperties": False}
    state = state_of(Grammar.json_schema({"type": "object"} | schema))
    assert bytes(state.forced(99)) == b'{"name": "'
    assert bytes(state.forced(3)) == b'{"n'
    follow(state, '{"name": "Ann"')
    assert bytes(state.forced(99)) == b', "age": '
    assert follow(state, ', "age": 4').forced(9) == ()
    assert tokens_of(state) == {*b"0123456789}"}
    assert state.append(ord("}"))


def test_a_mask_covers_the_vocabulary_of_the_model_alone():
    grammar = Grammar.regex(r"[\s\S]*")
    assert tokens_of(GrammarState(grammar, TOKENIZER, 100, (3,))) == set(range(100))
    text = {*range(128), *range(0xC2, 0xF5), EOS}  # what UTF-8 begins with
    assert tokens_of(GrammarState(grammar, TOKENIZER, 5000, (EOS,))) == text
    assert len(GrammarState(grammar, TOKENIZER, 5000, (EOS,)).mask()) == 628


@pytest.mark.parametrize("has_space", [True, False])
def test_forced_text_is_tokenised_as_the_tokenizer_does(tmp_path, has_space):
    """From within a text: without the space that SentencePiece puts first, special tokens spelt."""
    (tmp_path / "tokenizer.model").write_bytes(trained_spm(add_dummy_prefix=has_space))
    tokenizer = load_tokenizer(tmp_path)
    text = "The weather today is fine </s> and <s>the quick brown fox"
    state = state_of(Grammar.choice([text]), (), tokenizer)
    made = []
    while forced := state.forced(MAX_WIDTH):
        for token in forced:
            state.append(token)
        made += forced
    assert b"".join(map(tokenizer.token_bytes, made)) == text.encode()
    plain = "The weather today is fine"
    forced = state_of(Grammar.choice([plain]), (), tokenizer).forced(MAX_WIDTH)
    within = tokenizer.encode("\n" + plain, add_special_tokens=False)
    assert len(forced) > 3 and list(forced) == within[-len(forced) :]


def test_the_library_learns_a_tokenizer_once():
    assert _token_trie(TOKENIZER) is _token_trie(TOKENIZER)


# How drafts use it.


def test_known_drafts_end_where_the_grammar_refuses():
    llm = make()
    grammar = Grammar.regex("[abc]{8}X+")
    llm.generate("x", replace(GREEDY, max_tokens=1, speculative="ngram"))
    sequence = llm.sequence("abcabcabc", replace(GREEDY, grammar=grammar, speculative="ngram"))
    controller = sequence.drafting.controller
    controller.start([*sequence.token_ids, ord("a")])
    sequence.append(ord("a"), None)
    free = PassCosts(((1, 1.0), (64, 1.0)))
    choice = controller.choose(free, 1, 15)
    assert choice.name == "ngram" and bytes(choice.token_ids) == b"bcabcab"
    follow(sequence.grammar, "bcabcab")
    choice = controller.choose(free, 1, 15)
    assert choice.name == "grammar" and bytes(choice.token_ids) == b"X"


def test_forced_tokens_are_drafts_that_are_always_right():
    llm = make()
    params = replace(GREEDY, grammar=Grammar.regex("What must be said[0-9]and the end"))
    plain = llm.generate("a", params)[0]
    assert plain.stats.drafted == 0 and plain.stats.plan == "off"
    output = llm.generate("a", replace(params, speculative="ngram"))[0]
    assert output.outputs == plain.outputs
    assert output.stats.plan == "ngram+grammar" and output.stats.rounds_by_plan["grammar"] >= 2
    assert output.stats.accepted == output.stats.drafted >= 24
    assert output.stats.rounds <= 4
    events = list(llm.stream("a", replace(params, speculative="ngram")))
    assert sum(event.from_draft for event in events) == output.stats.accepted
    assert "".join(event.text for event in events) == output.outputs[0].text


def test_a_draft_ends_with_the_grammar(monkeypatch):
    llm = make()
    params = replace(SAMPLED, grammar=Grammar.regex("[a-z]{6}"), speculative=(EVERYTHING,))
    force_drafts(monkeypatch, lambda: 15)
    stats = llm.generate("a", params)[0].stats
    assert stats.generated_tokens == 6 and stats.drafted == stats.accepted == 5


# Where an answer ends.


def answer_of(grammar, params=GREEDY, prompt="Hello", **changes):
    return make().generate(prompt, replace(params, grammar=grammar, **changes))[0].outputs[0]


def test_the_answer_ends_where_nothing_may_follow():
    grammar = Grammar.regex("[a-z]{5}")
    for changes in ({}, {"ignore_eos": True}, {"min_tokens": 20}, {"max_tokens": 5}):
        for speculative in ("off", "ngram", (EVERYTHING,)):
            output = answer_of(grammar, speculative=speculative, **changes)
            assert output.finish_reason == "stop" and re.fullmatch("[a-z]{5}", output.text)
            assert len(output.token_ids) == 5


def test_it_may_end_only_where_it_is_complete():
    llm = make()
    params = replace(SAMPLED, temperature=2.0, grammar=Grammar.regex("([a-z]{3})*!?"))
    lengths = {}
    for least in (0, 20):
        answers = [
            llm.generate("a", replace(params, seed=seed, min_tokens=least))[0].outputs[0]
            for seed in range(25)
        ]
        assert all(re.fullmatch("([a-z]{3})*!?", a.text) for a in answers)
        assert {a.finish_reason for a in answers} == {"stop"}
        lengths[least] = sorted(len(a.token_ids) for a in answers if a.token_ids[-1] == EOS)
    assert lengths[0][0] < 20 < lengths[20][0]  # which may be 21 letters


def test_what_the_caller_ends_it_with_may_leave_it_incomplete():
    grammar = Grammar.choice(["one two} three"])
    for changes, text in (
        ({"stop_token_ids": [ord("}")]}, "one two"),
        ({"stop": "wo"}, "one t"),
        ({"stop_token_ids": [ord("}")], "min_tokens": 12}, "one two"),
    ):
        for speculative in ("off", "ngram"):
            output = answer_of(grammar, speculative=speculative, **changes)
            assert (output.text, output.finish_reason) == (text, "stop"), changes
    assert answer_of(grammar, max_tokens=3).finish_reason == "length"


def test_a_beginning_space_is_part_of_the_text(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained_spm())
    tokenizer = load_tokenizer(tmp_path)
    llm = tiny_llm(family_config("llama2", vocab_size=tokenizer.vocab_size))
    llm._tokenizer = tokenizer
    params = replace(GREEDY, grammar=Grammar.choice([" a fine day"]))
    assert llm.generate([1], params)[0].outputs[0].text == " a fine day"


def test_log_probabilities_are_the_models_own():
    llm = make()
    params = replace(GREEDY, logprobs=4)
    free = llm.generate("Hello", params)[0].outputs[0]
    bound = llm.generate("Hello", replace(params, grammar=Grammar.regex("[0-9]{9}")))[0].outputs[0]
    first = bound.logprobs[0]
    assert free.logprobs[0].items() <= first.items() and len(first) == 5  # and the chosen one
    assert bound.token_ids[0] == max(first.keys() - free.logprobs[0].keys())
    drafted = llm.generate(
        "Hello", replace(params, grammar=Grammar.regex("[0-9]{9}"), speculative=(EVERYTHING,))
    )[0].outputs[0]
    assert drafted == bound


# What goes wrong within an answer.


class Stubborn:
    """A matcher that has met an error: it takes nothing back."""

    def __init__(self, matcher):
        self._matcher = matcher

    def __getattr__(self, name):
        return getattr(self._matcher, name)

    def rollback(self, num_tokens):
        return False


def test_a_draft_that_breaks_the_matcher_breaks_no_answer():
    grammar = Grammar.regex("ab(cd|ce)*[0-9]{3}")
    state = follow(state_of(grammar), "abcd")
    assert state.num_allowed(b"cecdce12x") == 8
    state._matcher = Stubborn(state._matcher)
    assert state.num_allowed(b"ce12cd") == 4
    assert tokens_of(state) == tokens_of(follow(state_of(grammar), "abcd"))
    assert state.append(ord("1")) is state.append(ord("2")) is False and state.append(ord("3"))


@pytest.mark.parametrize("speculative", ["off", "ngram", (EVERYTHING,)])
def test_a_grammar_beyond_the_limits_ends_its_own_request(speculative, monkeypatch):
    llm = make(max_sequences=2)
    free = replace(GREEDY, max_tokens=60, ignore_eos=True)
    expected = llm.generate("Hello", free)[0].outputs[0].token_ids
    monkeypatch.setitem(engine.grammar.LIMITS, "max_lexer_states", 40)
    params = replace(free, grammar=Grammar.regex("[a-z]{1,300}"), speculative=speculative)
    sequences = [llm.sequence("a", params), llm.sequence("Hello", free)]
    run(llm, sequences)
    assert isinstance(sequences[0].error, RuntimeError)
    assert "no token can follow in the grammar" in str(sequences[0].error)
    assert 10 < sequences[0].num_generated < 60
    assert tuple(sequences[1].output().outputs[0].token_ids) == expected


def test_parameters_with_a_grammar_are_values():
    one, two = (SamplingParams(grammar=Grammar.json_object(), seed=1) for _ in range(2))
    assert one == two and hash(one.grammar) == hash(two.grammar)
    assert SamplingParams.from_mapping({"grammar": one.grammar}).grammar == one.grammar
    text = json.dumps({"type": "object"})
    assert Grammar.json_schema(text) == Grammar.json_schema({"type": "object"}) == one.grammar
