"""Penalties in the engine: what is drawn, with drafts and without, alone and among others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from forced import force_drafts, random_plan
from test_engine_passes import CPU_ONLY, record_mixed_drafts, triton_llm
from tiny import family_config, rows_of, tiny_llm
from tokenizers_for_tests import byte_tokenizer

from engine import SamplingParams
from kernels.ops import TORCH
from models.llama import forward, full_precisions, logits
from models.plan import NGRAM, DraftPlan

VOCAB = byte_tokenizer().vocab_size
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, speculative="off")
SAMPLED = replace(GREEDY, temperature=0.8, top_k=40, seed=11)
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.3}
FAVOURED = {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": -0.5}
PROMPTS = ["abcabcabcab", "Hello, world", "The quick brown fox", "z"]


def tokens(output):
    return output.outputs[0].token_ids


@torch.inference_mode()
def greedy_answer(llm, prompt, count, repetition, presence, frequency):
    """Greedy decoding as it is written down, each token by a pass over all that came before."""
    model, answer = llm.model, []
    precisions = full_precisions(model.config, 1, model.device)
    for _ in range(count):
        x = forward(
            model, rows_of([*prompt, *answer]), llm._cache.k, llm._cache.v, precisions, TORCH
        )
        scores = logits(model, x[-1:], precisions, TORCH)[0].tolist()
        for v in {*prompt, *answer}:
            scores[v] = scores[v] / repetition if scores[v] > 0 else scores[v] * repetition
        for v in set(answer):
            scores[v] -= presence + frequency * answer.count(v)
        answer.append(max(range(len(scores)), key=scores.__getitem__))
    return tuple(answer)


@pytest.mark.parametrize("values", [PENALTIES, FAVOURED], ids=["discouraged", "favoured"])
def test_greedy_answers_are_those_of_the_formula(values):
    llm = tiny_llm()
    free = tokens(llm.generate(PROMPTS[0], GREEDY)[0])
    output = llm.generate(PROMPTS[0], replace(GREEDY, **values))[0]
    expected = greedy_answer(tiny_llm(), output.prompt_token_ids, 20, *values.values())
    assert tokens(output) == expected != free


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("values", [PENALTIES, FAVOURED], ids=["discouraged", "favoured"])
def test_no_draft_changes_a_token(params, values, monkeypatch):
    llm = tiny_llm(family_config("smollm2-group3", vocab_size=VOCAB))
    params = replace(params, **values)
    expected = tokens(llm.generate(PROMPTS[0], params)[0])
    for name in ("auto", "int8", "ngram"):  # as the controller drafts
        output = llm.generate(PROMPTS[0], replace(params, speculative=name))[0]
        assert tokens(output) == expected, name
    everything = DraftPlan("all-16", "self", (16,) * 4)
    plans = [everything, *(random_plan(2, seed) for seed in range(4)), NGRAM]
    for plan, length in itertools.product(plans, (1, 3, 8)):
        force_drafts(monkeypatch, lambda length=length: length)
        output = llm.generate(PROMPTS[0], replace(params, speculative=plan))[0]
        assert tokens(output) == expected, (plan, length)
        # A draft step sees the tokens that the verified row sees: nothing skipped is all accepted.
        assert plan is not everything or output.stats.acceptance_rate == 1.0, length


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_four_sequences_each_with_its_own(params, monkeypatch):
    """Also without any, beside those with: everyone gets what it gets alone, drafted or not."""
    llm = tiny_llm(max_sequences=4)
    each = [replace(params, **values) for values in (PENALTIES, {}, FAVOURED, PENALTIES)]
    expected = [tokens(llm.generate(p, q)[0]) for p, q in zip(PROMPTS, each, strict=True)]
    assert expected[1] == tokens(tiny_llm().generate(PROMPTS[1], params)[0])
    plans = itertools.cycle([random_plan(2, 3), NGRAM, random_plan(2, 6), DraftPlan("o", "off")])
    lengths = itertools.cycle([3, 1, 8, 5, 2])
    for is_drafting in (False, True):
        if is_drafting:
            llm.generate("x", replace(GREEDY, speculative="int8", max_tokens=1))
            force_drafts(monkeypatch, lambda: next(lengths), plans)
        how = "auto" if is_drafting else "off"
        sequences = [
            llm.sequence(prompt, replace(each[i], speculative=how))
            for i, prompt in enumerate(PROMPTS)
        ]
        for _ in llm._generate(sequences):
            pass
        assert [tokens(sequence.output()) for sequence in sequences] == expected, how


def test_a_slot_begins_anew():
    """With the tokens of a prompt that is cached already, and none of the last request's."""
    llm = tiny_llm()
    params = replace(GREEDY, **PENALTIES)
    first = llm.generate(PROMPTS[2], params)[0]
    llm.generate([*first.prompt_token_ids, *tokens(first)], replace(params, max_tokens=3))
    again = llm.generate(PROMPTS[2], params)[0]
    assert again.stats.reused_tokens > 0 and tokens(again) == tokens(first)


def test_log_probabilities_are_the_models_own():
    llm = tiny_llm()
    plain, penalised = (
        llm.generate(PROMPTS[0], replace(GREEDY, logprobs=20, **values))[0].outputs[0]
        for values in ({}, PENALTIES)
    )
    first = penalised.logprobs[0]
    assert plain.logprobs[0].items() <= first.items()  # and the chosen one, if not among them
    assert penalised.token_ids != plain.token_ids


def test_a_models_own_repetition_penalty_is_a_default():
    llm = tiny_llm()
    free = tokens(llm.generate(PROMPTS[0], GREEDY)[0])
    expected = tokens(llm.generate(PROMPTS[0], replace(GREEDY, repetition_penalty=1.4))[0])
    llm.generation = {"repetition_penalty": 1.4}
    assert tokens(llm.generate(PROMPTS[0], GREEDY)[0]) == expected != free
    assert tokens(llm.generate(PROMPTS[0], replace(GREEDY, repetition_penalty=1.0))[0]) == free


@CPU_ONLY
def test_recorded_passes_with_penalties_and_without(device, monkeypatch):
    """Each has its own pass, which nothing is baked into; a pass without them stays as it was."""
    llm = triton_llm(device, batch=2)
    each = [replace(SAMPLED, max_tokens=6, **values) for values in ({}, PENALTIES)]
    expected = [answers_of(llm, params) for params in each]
    llm.generate("x", replace(GREEDY, speculative="int8", max_tokens=1))
    runner = record_mixed_drafts(llm, monkeypatch)
    for _ in range(2):
        got = [answers_of(llm, replace(params, speculative="auto")) for params in each]
        assert got == expected
    keys = {key[:1] + key[3:] for key in runner.num_runs}
    assert keys == {("draft",), ("draft", "penalties"), ("verify",), ("verify", "penalties")}


def answers_of(llm, params):
    return [tokens(output) for output in llm.generate(PROMPTS[:2], params)]
