"""The promise under a grammar: every answer is valid, and no draft changes a token."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from forced import force_drafts, random_plan
from grammars import CASES, fits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_engine_passes import CPU_ONLY, record_mixed_drafts, triton_llm
from tiny import family_config, tiny_llm
from tokenizers_for_tests import EOS, byte_tokenizer

from engine import LLM, Grammar, SamplingParams
from kernels.ops import TORCH
from models.plan import NGRAM, DraftPlan

VOCAB = byte_tokenizer().vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=900, speculative="off")
SAMPLED = replace(GREEDY, temperature=0.8, seed=11)
FILTERED = replace(SAMPLED, top_k=30, top_p=0.9, min_p=0.01, frequency_penalty=0.4)
PROMPTS = ["abcabcabcab", "Hello, world", '{"name": "Ann", "kind": "al', "z"]
EVERYTHING = DraftPlan("all-16", "self", (16,) * 4)
WAYS = ("ngram", "int8", "auto", (random_plan(2, 1), NGRAM), (EVERYTHING,))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["alpha", "alphabet", "<eos>"]},
        "numbers": {
            "type": "array", "minItems": 2, "maxItems": 3,
            "items": {"type": "integer", "minimum": -5, "maximum": 500},
        },
    },
    "required": ["name", "kind", "numbers"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS = [
    Grammar.json_schema(SCHEMA),
    Grammar.regex("(foo|foobar)[0-9]{1,3} ?x{1,9}"),
    Grammar.choice(["Hello, world. Hello, there.", "Hello, you", "zzz"]),
]


def make(family="llama2", **options):
    config = family_config(family, vocab_size=VOCAB, max_positions=1024, eos_token_ids=(EOS,))
    return tiny_llm(config, **options)


@pytest.fixture(scope="module")
def llm():
    return make("smollm2-group3", max_sequences=4)


def answer(output):
    return output.outputs[0].token_ids


@given(CASES, st.sampled_from([GREEDY, SAMPLED, FILTERED]), st.sampled_from(PROMPTS))
@settings(max_examples=100, deadline=None)
def test_every_answer_is_valid_and_the_same_however_it_is_drafted(llm, case, params, prompt):
    grammar, is_valid = case
    params = replace(params, grammar=grammar)
    plain = llm.generate(prompt, params)[0]
    assume(plain.outputs[0].finish_reason == "stop")  # and not "length"
    assert is_valid(plain.outputs[0].text), plain.outputs[0].text
    for way in WAYS:
        output = llm.generate(prompt, replace(params, speculative=way))[0]
        assert answer(output) == answer(plain), way
        # A draft step sees the mask that the verified row sees: nothing skipped is all accepted.
        assert way != (EVERYTHING,) or output.stats.accepted == output.stats.drafted


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, FILTERED], ids=["greedy", "0.8", "filtered"])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=["schema", "regex", "choice"])
def test_every_plan_and_length(grammar, params, monkeypatch):
    """Also drafts that the grammar refuses, and those that go beyond its end."""
    llm = make()
    params = replace(params, grammar=grammar)
    expected = answer(llm.generate(PROMPTS[2], params)[0])
    plans = [EVERYTHING, DraftPlan("none", "self", (0,) * 4), random_plan(2, 3), NGRAM]
    for plan, length in itertools.product(plans, (1, 3, 8, 15)):
        force_drafts(monkeypatch, lambda length=length: length)
        output = llm.generate(PROMPTS[2], replace(params, speculative=plan))[0]
        assert answer(output) == expected, (plan, length)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "0.8"])
def test_beside_others_with_and_without_a_grammar(params, monkeypatch):
    llm = make(max_sequences=4)
    free = replace(params, max_tokens=25)
    each = [*(replace(params, grammar=g) for g in GRAMMARS[:2]), free, replace(free, **PENALISED)]
    expected = [answer(llm.generate(p, q)[0]) for p, q in zip(PROMPTS, each, strict=True)]
    assert expected[2] == answer(make().generate(PROMPTS[2], free)[0])
    llm.generate("x", replace(params, speculative="int8", max_tokens=1))
    plans = [random_plan(2, 3), NGRAM, random_plan(2, 6), DraftPlan("o", "off"), EVERYTHING]
    for seed in range(5):
        lengths = itertools.cycle([3, 1, 8, 5, 2, 15][seed:])
        if seed:
            force_drafts(monkeypatch, lambda lengths=lengths: next(lengths), itertools.cycle(plans))
        ways = [replace(q, speculative="auto" if seed else "off") for q in each]
        sequences = [llm.sequence(p, q) for p, q in zip(PROMPTS, ways, strict=True)]
        run(llm, sequences)
        assert [answer(s.output()) for s in sequences] == expected, seed


PENALISED = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}


def run(llm, sequences):
    scheduler = llm.scheduler()
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.is_busy:
        scheduler.step()


def test_penalties_count_before_the_grammar_and_the_noise():
    llm = make()
    params = replace(GREEDY, grammar=Grammar.regex("[ab]{40}"), max_tokens=40)
    free, penalised = (llm.generate("ab", replace(params, **p))[0] for p in ({}, PENALISED))
    assert set(free.outputs[0].text) | set(penalised.outputs[0].text) == {"a", "b"}
    assert abs(penalised.outputs[0].text.count("a") - 20) <= 2  # the one that there is less of
    assert answer(free) != answer(penalised)


@CPU_ONLY
def test_recorded_passes_with_a_grammar_and_without(device, monkeypatch):
    """Each has its own pass, which nothing is baked into, as in a CUDA graph."""
    llm = triton_llm(device, batch=2)
    params = replace(SAMPLED, max_tokens=6, ignore_eos=True)
    each = [params, *(replace(params, grammar=Grammar.regex(r)) for r in ("[ab]+", "[cd]{3}"))]
    expected = [answers(llm, q) for q in each]
    llm.generate("x", replace(GREEDY, speculative="int8", max_tokens=1))
    runner = record_mixed_drafts(llm, monkeypatch)
    assert [answers(llm, replace(q, speculative="auto")) for q in each] == expected
    keys = {key[:1] + key[3:] for key in runner.num_runs}
    assert keys == {("draft",), ("draft", "grammar"), ("verify",), ("verify", "grammar")}


def answers(llm, params):
    return [answer(output) for output in llm.generate(PROMPTS[:2], params)]


def test_with_the_reference_operations(monkeypatch):
    llm = make(prefill_ops=TORCH, decode_ops=TORCH)
    params = replace(SAMPLED, grammar=GRAMMARS[0], top_k=20)
    expected = answer(llm.generate(PROMPTS[1], params)[0])
    for plan in (EVERYTHING, NGRAM):
        force_drafts(monkeypatch, lambda: 5)
        output = llm.generate(PROMPTS[1], replace(params, speculative=plan))[0]
        assert answer(output) == expected


@pytest.mark.model
def test_the_default_model_fills_a_schema_in():
    schema = SCHEMA["properties"] | {"name": {"type": "string", "maxLength": 30}}
    schema = SCHEMA | {"properties": schema}
    with LLM(device="cpu", max_length=512, max_sequences=2) as llm:
        ask = [{"role": "user", "content": "Describe Albert Einstein as JSON."}]
        prompt = llm.encode_chat(ask)
        params = replace(GREEDY, grammar=Grammar.json_schema(schema), max_tokens=200)
        plain = llm.generate([prompt], params)[0]
        assert fits(schema, json.loads(plain.outputs[0].text)), plain.outputs[0].text
        assert "Einstein" in plain.outputs[0].text
        outputs = llm.generate([prompt, prompt], replace(params, speculative="auto"))
        assert [answer(output) for output in outputs] == [answer(plain)] * 2
        assert outputs[0].stats.rounds_by_plan["grammar"] > 0
        assert outputs[0].stats.rounds < plain.stats.rounds
