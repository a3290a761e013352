"""Models of quantised weights: drafts change no token, in either arithmetic, whatever the type."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gguf
import numpy as np
import pytest
from blocks_for_tests import random_blocks
from checkpoints import to_hf_state_dict, write_gguf
from forced import force_drafts
from refusals import check_words, refusal
from test_lossless import GREEDY, PROMPTS, SAMPLED, VOCAB, answers, tokens
from test_lossless import assert_rows_do_not_depend_on_width as assert_rows_alike
from tiny import family_config
from tokenizers_for_tests import byte_alphabet

from engine import LLM, SamplingParams
from engine.prepare import resolve_plans
from kernels.blocks import BLOCK_TYPES
from models.gguf_file import read_gguf
from models.plan import NGRAM, DraftPlan
from models.weights import random_weights

SKIPS = [DraftPlan.skipping("one", 2, (0,), ()), DraftPlan.skipping("two", 2, (), (1,))]
# One type for all matrices, and what files mix: types inside a layer, and floats.
MIXES = {name: (name,) for name in BLOCK_TYPES} | {
    "mixed": ("Q4_K", "Q6_K", "Q5_0"), "with floats": ("Q8_0", "F16", "Q4_1"),
}  # fmt: skip


def blocks_of(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blocks whose values are of the size of a model's weights."""
    kind, blocks = BLOCK_TYPES[name], random_blocks(name, *shape, seed)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    scale = shape[1] ** -0.5 / values.std()
    for at in (kind.factor, kind.offset_factor):
        if at >= 0:
            parts = blocks.reshape(shape[0], -1, kind.num_bytes)[..., at : at + 2]
            parts[:] = (np.ascontiguousarray(parts).view(np.float16) * np.float16(scale)).view(
                np.uint8
            )
    return blocks


def stored(folder, mix: str, **sizes: int):
    """A GGUF file whose matrices have those types in turn."""
    family = "qwen2-group1" if mix == "mixed" else "smollm2-group3"
    config = family_config(family, hidden_size=256, ffn_size=256, head_dim=64, num_heads=4,
                           num_kv_heads=2, vocab_size=VOCAB, **sizes)  # fmt: skip
    weights, matrices, kinds = random_weights(config, seed=1), {}, itertools.cycle(MIXES[mix])
    for seed, (name, tensor) in enumerate(to_hf_state_dict(config, weights).items()):
        if tensor.ndim == 2:
            kind = next(kinds)
            half = tensor.half().numpy()
            matrices[name] = (half if kind == "F16" else blocks_of(kind, half.shape, seed)), kind
    alphabet = {
        "model": "gpt2",
        "pre": "default",
        "merges": ["a b"],
        "eos_token_id": 257,
        "tokens": [*byte_alphabet(), "ab", "<eos>"],
        "token_type": [1] * 257 + [3],
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in alphabet.items()}
    metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
    path = folder / "model.gguf"
    return write_gguf(path, config, weights, metadata=metadata, stored=matrices)


OPTIONS = {"device": "cpu", "profile": False, "speculative": "off", "max_sequences": 4}


@pytest.fixture(scope="module", params=MIXES)
def path(request, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("blocks"), request.param)


def test_float_activations_give_the_tokens_of_float32(path):
    blocks = LLM(path, activations="float", **OPTIONS)
    wide = LLM(path, weights="float", **OPTIONS)
    assert "activations" not in blocks.dtype and wide.dtype == "float32"
    assert "cache" not in blocks.dtype
    chosen = [
        LLM(path, weights=weights, kv_dtype=kv_dtype, **OPTIONS)._cache.k.dtype
        for weights, kv_dtype in (("stored", "float32"), ("float", "float16"))
    ]
    assert [str(dtype) for dtype in chosen] == ["torch.float32", "torch.float16"]
    for params in (GREEDY, SAMPLED):
        expected = [tokens(wide.generate(prompt, params)[0]) for prompt in PROMPTS]
        assert [tokens(blocks.generate(prompt, params)[0]) for prompt in PROMPTS] == expected
        for plan in (*SKIPS, NGRAM):
            drafts = replace(params, speculative=plan)
            assert answers(blocks, drafts) == expected, plan


@pytest.mark.parametrize(
    ("path", "activations"),
    [(mix, "auto") for mix in MIXES] + [("Q4_1", "int8"), ("mixed", "int8")],
    indirect=["path"],
)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rounded_activations_draft_losslessly(path, params, activations, monkeypatch):
    llm = LLM(path, activations=activations, **OPTIONS)
    expected_name = "int16" if activations == "auto" else activations
    assert f"{expected_name} activations" in llm.dtype and "float16 cache" in llm.dtype
    expected = [tokens(llm.generate(prompt, params)[0]) for prompt in PROMPTS]
    assert answers(llm, replace(params, speculative="auto")) == expected
    for plan, length in itertools.product([*SKIPS, NGRAM], (1, 3, 8)):
        force_drafts(monkeypatch, lambda length=length: length)
        drafts = replace(params, speculative=plan)
        assert [tokens(llm.generate(prompt, drafts)[0]) for prompt in PROMPTS] == expected, plan
        assert answers(llm, drafts) == expected, (plan, length)
    assert_rows_alike(llm, llm.model.decode_ops)  # writes over what the cache is known to hold


def test_8_bit_drafts_are_not_offered(tmp_path):
    llm = LLM(stored(tmp_path, "Q4_K"), **OPTIONS)
    assert resolve_plans("auto", llm.model) == (NGRAM,)
    message = refusal(llm.generate, "x", SamplingParams(speculative="int8"))
    check_words(message, "speculative: got 'int8'", "expected 'auto'", "weights='float'")
    floats = LLM(stored(tmp_path, "Q4_K"), weights="float", **OPTIONS)
    assert len(resolve_plans("auto", floats.model)) == 2


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = stored(tmp_path, "Q6_K")
    data = bytearray(path.read_bytes())
    at = read_gguf(path).tensors["blk.1.attn_k.weight"].offset + BLOCK_TYPES["Q6_K"].factor
    data[at : at + 2] = b"\x00\x7c"
    path.write_bytes(data)
    check_words(refusal(LLM, path, **OPTIONS), "k_proj.weight has scales that are not finite")


def test_an_unknown_arithmetic_is_refused(tmp_path):
    message = refusal(LLM, stored(tmp_path, "Q4_0"), activations="int4")
    check_words(message, "activations: got 'int4', expected 'auto', 'int8', 'int16', 'float'")
