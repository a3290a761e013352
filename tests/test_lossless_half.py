"""16-bit checkpoints on a CPU: the tokens of the same checkpoint in float32, however it drafts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from checkpoints import to_hf_state_dict, write_hf_checkpoint, write_safetensors
from forced import force_drafts
from test_lossless import GREEDY, PLANS, PROMPTS, SAMPLED, VOCAB, answers, tokens
from test_lossless import assert_rows_do_not_depend_on_width as assert_rows_alike
from tiny import family_config
from tokenizers_for_tests import write_byte_tokenizer

from engine import LLM
from models.plan import NGRAM, DraftPlan
from models.weights import random_weights, sublayer_bytes

BF16, F16 = torch.bfloat16, torch.float16
CONFIGS = {
    "bfloat16": ("llama2", BF16), "float16": ("qwen3-group4", F16),
    "tied": ("smollm2-group3", BF16), "mixed": ("qwen2-group1", F16),
}  # fmt: skip


def stored(folder, name):
    """A checkpoint of one 16-bit dtype, or with some tensors of others."""
    family, dtype = CONFIGS[name]
    config = family_config(family, vocab_size=VOCAB)
    weights = random_weights(config, seed=1)
    write_hf_checkpoint(folder, config, weights, dtype=dtype)
    if name == "mixed":
        state = {key: t.to(dtype) for key, t in to_hf_state_dict(config, weights).items()}
        first, second = "model.layers.0.", "model.layers.1."
        for key in (first + "self_attn.k", second + "self_attn.o", second + "mlp.down"):
            state[key + "_proj.weight"] = state[key + "_proj.weight"].bfloat16()
        for key in (first + "mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
            state[key] = state[key].double()
        write_safetensors(folder, state)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def engines(request, tmp_path_factory):
    """The same checkpoint with its matrices as stored, and in float32."""
    folder = stored(tmp_path_factory.mktemp(request.param), request.param)
    options = {"device": "cpu", "profile": False, "speculative": "off", "max_sequences": 4}
    return LLM(folder, **options), LLM(folder, weights="float", **options)


def test_matrices_are_kept_and_the_rest_is_float32(engines, request):
    half, wide = engines
    name = request.node.callspec.params["engines"]
    assert half.dtype == {"mixed": "bfloat16+float16+float32", "tied": "bfloat16"}.get(name, name)
    assert (wide.dtype, half.model.dtype, wide.model.dtype) == ("float32", *[torch.float32] * 2)
    assert {part.dtype for part in half._cache} == {torch.float32}
    assert half.model.weights.is_tied == wide.model.weights.is_tied == (name == "tied")
    sizes = [sublayer_bytes(llm.model.weights) for llm in (half, wide)]
    if name != "mixed":
        assert sum(sizes[1]) == 2 * sum(sizes[0])
        return
    layers, F32 = half.model.weights.layers, torch.float32
    kinds = [[weight.own.kind for weight in layer.matrices] for layer in layers]
    assert kinds == [[F32, F16, F32, F16], [F16, BF16, F16, BF16]]
    assert half.model.weights.lm_head.own.kind == F32


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_tokens_are_those_of_float32(engines, params, monkeypatch):
    half, wide = engines
    expected = [tokens(wide.generate(prompt, params)[0]) for prompt in PROMPTS]
    for how in ("off", "auto", "ngram", "int8"):
        drafts = replace(params, speculative=how)
        assert [tokens(half.generate(prompt, drafts)[0]) for prompt in PROMPTS] == expected, how
        assert answers(half, drafts) == expected, how
    for plan, length in itertools.product([*PLANS[:4], NGRAM], (1, 3, 8)):
        force_drafts(monkeypatch, lambda length=length: length)
        output = half.generate(PROMPTS[0], replace(params, speculative=plan))[0]
        assert tokens(output) == expected[0], (plan, length)
        assert plan is NGRAM or output.stats.drafted > 0


def test_four_sequences_with_four_plans(engines, monkeypatch):
    half, wide = engines
    expected = answers(wide, SAMPLED)
    for seed in range(3):
        half.generate("x", replace(GREEDY, speculative=PLANS[seed], max_tokens=1))
        plans = itertools.cycle([PLANS[seed], PLANS[seed + 3], NGRAM, DraftPlan("o", "off")])
        lengths = itertools.cycle([seed + 1, 4, 8, 2, 3])
        force_drafts(monkeypatch, lambda lengths=lengths: next(lengths), plans)
        assert answers(half, replace(SAMPLED, speculative=PLANS[seed])) == expected, seed


def test_log_probabilities_and_long_prompts_have_the_same_bits(engines):
    half, wide = engines
    params = replace(GREEDY, logprobs=3, max_tokens=4)
    for prompt in ("a long prompt, " * 8, "short"):
        got, expected = (llm.generate(prompt, params)[0].outputs[0] for llm in (half, wide))
        assert got.logprobs == expected.logprobs and got.token_ids == expected.token_ids


def test_rows_have_the_same_bits_whatever_shares_the_pass(engines):
    assert_rows_alike(engines[0], engines[0].model.decode_ops)
