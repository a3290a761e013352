"""The text of an answer: what continues a prompt, what begins a message, what ends it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sentencepiece
from forced import force_drafts
from test_models_tokenizer_spm import llama2_json, trained_spm
from tiny import family_config, tiny_llama, tiny_llm
from tokenizers_for_tests import EOS, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from engine import LLM, SamplingParams
from engine.loading import Loaded
from models.plan import DraftPlan
from models.tokenizer import load_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, speculative="off")
EVERYTHING = DraftPlan("all-16", "self", (16,) * 4)
FREE = replace(GREEDY, temperature=1.4)


@pytest.fixture(scope="module")
def spm():
    return trained_spm()


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def spaced(request, spm, tmp_path_factory):
    """A model whose tokenizer is Llama 2's kind, from either file, and transformers' tokenizer."""
    directory = tmp_path_factory.mktemp("spaced")
    spec = llama2_json(sentencepiece.SentencePieceProcessor(model_proto=spm))
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(spec))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(path))
    if request.param == "tokenizer.model":
        path.unlink()
        (directory / request.param).write_bytes(spm)
    tokenizer = load_tokenizer(directory)
    model = tiny_llama(family_config("llama2", vocab_size=tokenizer.vocab_size))
    loaded = Loaded("spaced", model, tokenizer, None, {})
    return LLM.from_loaded(loaded, profile=False), tokenizer, reference


def answers(llm, prompt):
    """Answers that begin with a space and answers that do not."""
    outputs = [llm.generate(prompt, replace(FREE, seed=seed))[0] for seed in range(30)]
    first = {llm._tokenizer.token_bytes(o.outputs[0].token_ids[0])[:1] == b" " for o in outputs}
    assert first == {True, False}
    return outputs


@pytest.mark.parametrize("prompt", ["The quick brown fox", "The weather\n", "fox "])
def test_prompt_and_answer_are_the_text(spaced, prompt):
    llm, tokenizer, reference = spaced
    for output in answers(llm, prompt):
        token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        text = prompt + output.outputs[0].text
        assert text == tokenizer.decode(token_ids)
        if "\ufffd" not in text:  # how broken characters show is not the library's way
            assert text == reference.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["", "The fox</s>", "<s>The weather</s><s>"])
def test_an_answer_after_a_special_token_is_a_text_of_its_own(spaced, prompt):
    """What SentencePiece puts before it is no part of it: the tokenizer puts it there again."""
    llm, tokenizer, reference = spaced
    for output in answers(llm, prompt):
        token_ids, text = output.outputs[0].token_ids, output.outputs[0].text
        assert text == tokenizer.decode(token_ids)
        if "\ufffd" not in text:
            assert text == reference.decode(token_ids, skip_special_tokens=True)
        spelled = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) + text
        begin = len(output.prompt_token_ids)
        if tokenizer.token_bytes(token_ids[0]) == b" fox":
            assert tokenizer.encode(spelled)[begin] == token_ids[0]


def test_a_special_token_as_stop_string_ends_an_answer():
    llm = tiny_llm()
    free = replace(FREE, temperature=5.0, max_tokens=60)
    drawn = (llm.generate("x", replace(free, seed=seed))[0].outputs[0] for seed in range(200))
    seed, token_ids = next((s, o.token_ids) for s, o in enumerate(drawn) if EOS in o.token_ids[5:])
    end = token_ids.index(EOS)
    for min_tokens in (0, end):
        params = replace(free, seed=seed, stop=["<eos>"], min_tokens=min_tokens)
        output = llm.generate("x", params)[0].outputs[0]
        assert output.token_ids == token_ids[: end + 1] and output.finish_reason == "stop"
        assert output.text == byte_tokenizer().decode(token_ids[:end])


@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "sampled"])
def test_min_tokens_and_a_stop_string_with_and_without_drafts(seed, monkeypatch):
    params = GREEDY if seed is None else replace(FREE, seed=seed, max_tokens=20)
    llm = tiny_llm()
    free = llm.generate("minimum", params)[0].outputs[0]
    text = byte_tokenizer().decode(free.token_ids)
    stop = next(text[i : i + 2] for i in range(4, 12) if text[i : i + 2].isascii())
    ends = set()
    for min_tokens in range(21):
        case = replace(params, min_tokens=min_tokens, stop=[stop, "never there"])
        expected = llm.generate("minimum", case)[0]
        ends.add(len(expected.outputs[0].token_ids))
        assert len(expected.outputs[0].token_ids) >= min(min_tokens + 1, 20)
        for plan, length in ((EVERYTHING, 8), (EVERYTHING, 3), ("int8", 5)):
            force_drafts(monkeypatch, lambda length=length: length)
            output = llm.generate("minimum", replace(case, speculative=plan))[0]
            assert output.outputs == expected.outputs, (min_tokens, plan, length)
    assert len(ends) > 1
