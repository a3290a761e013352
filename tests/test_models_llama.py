"""The forward pass against transformers, in float32, on random models of every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from checkpoints import hf_config, to_hf_state_dict
from tiny import FAMILIES, family_config, rows_of, tiny_llama

from engine.kv_cache import make_kv_cache
from kernels import weight
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from models import plan as plan_module
from models.llama import forward, full_precisions, logits

OPS = {"torch": TORCH, "numba": NUMBA}
PROMPT_TOKENS, NEW_TOKENS = 40, 32


def oracle(model):
    """The same weights in transformers."""
    config = transformers.AutoConfig.for_model(**hf_config(model.config))
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    missing, unexpected = hf.load_state_dict(
        to_hf_state_dict(model.config, model.weights), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    hf.tie_weights()
    return hf.eval()


def run(model, cache, token_ids, start=0):
    """Logits of every token, in one pass."""
    precisions = full_precisions(model.config, 1, model.device)
    x = forward(model, rows_of(token_ids, start), *cache, precisions, model.decode_ops)
    return logits(model, x, precisions, model.decode_ops)


def new_cache(model):
    """Keys and values: all that the forward pass takes."""
    cache = make_kv_cache(model, 1, model.config.max_positions)
    return cache.k, cache.v


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=OPS)
def model(request, family):
    ops = OPS[request.param]
    return tiny_llama(family_config(family), ops, ops)


def test_plans_name_the_forms_as_the_kernels_do():
    ours = (plan_module.SKIP, plan_module.INT8, plan_module.FULL)
    assert ours == (weight.SKIP, weight.INT8, weight.FULL) == (0, 8, 16)


@torch.inference_mode()
def test_logits_match_transformers(model):
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    expected = oracle(model)(torch.tensor([prompt])).logits[0]
    whole = run(model, new_cache(model), prompt)
    assert (whole - expected).abs().max() <= 1e-4 * expected.abs().max()
    cache, chunks = new_cache(model), []
    for start in (0, 1, 8, 21):
        stop = {0: 1, 1: 8, 8: 21, 21: PROMPT_TOKENS}[start]
        chunks.append(run(model, cache, prompt[start:stop], start))
    assert (torch.cat(chunks) - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.inference_mode()
def test_greedy_tokens_match_transformers(model):
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    expected = oracle(model).generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0, PROMPT_TOKENS:].tolist()  # fmt: skip
    cache = new_cache(model)
    token_ids = [*prompt, int(run(model, cache, prompt)[-1].argmax())]
    while len(token_ids) < PROMPT_TOKENS + NEW_TOKENS:
        last = run(model, cache, token_ids[-1:], len(token_ids) - 1)
        token_ids.append(int(last[-1].argmax()))
    assert token_ids[PROMPT_TOKENS:] == expected


@torch.inference_mode()
def test_one_launch_for_all_layers_is_the_five_operations_bit_for_bit(family):
    model = tiny_llama(family_config(family))
    five = replace(NUMBA, run_layers=None)
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    for precisions in (
        full_precisions(model.config, 1, model.device),
        torch.tensor([[16, 0, 0, 16, 16]]),
    ):
        caches = [new_cache(model) for _ in range(2)]
        for cache in caches:
            cache[0].zero_(), cache[1].zero_()
        for start, stop in ((0, 30), (30, 31), (31, 36), (36, 40)):
            rows = rows_of(prompt[start:stop], start)
            one, other = (
                forward(model, rows, *cache, precisions.to(torch.uint8), ops)
                for cache, ops in zip(caches, (NUMBA, five), strict=True)
            )
            assert torch.equal(one, other)
        assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


@torch.inference_mode()
def test_numba_gives_a_token_the_same_bits_however_the_prompt_is_cut(family):
    """Prefill in one go, in chunks, or token by token: logits and cache agree bit for bit."""
    model = tiny_llama(family_config(family))
    prompt = torch.randint(3, model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    whole_cache = new_cache(model)
    whole = run(model, whole_cache, prompt)
    for size in (1, 5, 16):
        cache, parts = new_cache(model), []
        for start in range(0, PROMPT_TOKENS, size):
            parts.append(run(model, cache, prompt[start : start + size], start))
        assert torch.equal(torch.cat(parts), whole), size
        for kept, expected in zip(cache, whole_cache, strict=True):
            assert torch.equal(kept[:, :, :, :PROMPT_TOKENS], expected[:, :, :, :PROMPT_TOKENS])
