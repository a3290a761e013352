"""LlamaConfig: every supported family is read, every unsupported feature is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import transformers
from checkpoints import hf_config, tiny_config
from refusals import refusal

from models import families
from models.config import RopeScaling
from models.config_files import config_from_gguf, config_from_hf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def gguf_metadata(**changes: Any) -> dict[str, object]:
    values: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 256,
        "tokenizer.ggml.tokens": ["a"] * 131,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), LLAMA3])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_families(family: str, scaling: RopeScaling | None, tied: bool) -> None:
    config = tiny_config(family, rope_scaling=scaling, tie_embeddings=tied)
    assert config_from_hf(hf_config(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), LLAMA3])
def test_config_saved_by_transformers(
    family: str, scaling: RopeScaling | None, tmp_path: Any
) -> None:
    config = tiny_config(family, rope_scaling=scaling, eos_token_ids=(2, 5))
    hf = transformers.AutoConfig.for_model(**hf_config(config))
    hf.save_pretrained(tmp_path)
    saved = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    assert "rope_parameters" in saved
    assert config_from_hf(saved) == config


def test_old_spelling_of_rope_scaling_and_llama2_defaults() -> None:
    d = hf_config(tiny_config())
    for key in ("rope_theta", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        del d[key]
    d |= {"rope_scaling": {"type": "linear", "factor": 4}, "eos_token_id": 2, "auto_map": {"A": 1}}
    expected = tiny_config(num_kv_heads=4, rope_scaling=RopeScaling("linear", 4.0))
    assert config_from_hf(d) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "absent", ["head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"]
)
def test_absent_keys_mean_what_they_mean_to_transformers(family: str, absent: str) -> None:
    d = hf_config(tiny_config(family, num_heads=32, num_kv_heads=4, hidden_size=256))
    del d[absent]
    hf = transformers.AutoConfig.for_model(**d)
    config = config_from_hf(d)
    split = hf.hidden_size // hf.num_attention_heads
    assert config.head_dim == (getattr(hf, "head_dim", None) or split)
    assert config.num_kv_heads == hf.num_key_value_heads
    assert config.norm_eps == hf.rms_norm_eps
    assert config.rope_theta == hf.rope_parameters["rope_theta"]


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3_RULES = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        (LINEAR, LINEAR),
        (LINEAR, {"type": "linear", "factor": 4}),
        ({"type": "linear", "factor": 4, "rope_theta": 10_000}, LINEAR),
        (LINEAR, LINEAR | {"rope_theta": 10_000.0, "type": "linear"}),
        (LLAMA3_RULES | {"rope_theta": 10_000.0}, LLAMA3_RULES),
        ({"rope_type": "default", "rope_theta": 10_000.0}, {"type": "default"}),
        ({"rope_theta": 10_000.0}, None),
        (LINEAR, {}),
    ],
)
def test_two_sets_of_rope_rules_that_mean_the_same(
    parameters: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    d = hf_config(tiny_config()) | {"rope_parameters": parameters, "rope_scaling": scaling}
    expected = {"linear": RopeScaling("linear", 4.0), "llama3": LLAMA3}
    kind = parameters.get("rope_type", parameters.get("type"))
    assert config_from_hf(d) == tiny_config(rope_scaling=expected.get(kind))


@pytest.mark.parametrize(
    ("parameters", "scaling", "word"),
    [
        (LINEAR, LINEAR | {"factor": 2.0}, "rope_scaling is"),
        (LINEAR, {"type": "default"}, "rope_scaling is"),
        (LLAMA3_RULES, LLAMA3_RULES | {"low_freq_factor": 2.0}, "rope_scaling is"),
        (LINEAR, LINEAR | {"rope_theta": 5e5}, "rope_theta of rope_scaling is 500000.0"),
        (LINEAR | {"rope_theta": 10**300}, LINEAR, "rope_theta of rope_parameters is 1000"),
        (LINEAR, LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LINEAR, {"type": "yarn", "factor": 4.0}, "yarn"),
    ],
)
def test_two_sets_of_rope_rules_that_differ(
    parameters: dict[str, Any], scaling: dict[str, Any], word: str
) -> None:
    d = hf_config(tiny_config()) | {"rope_parameters": parameters, "rope_scaling": scaling}
    assert word in refusal(config_from_hf, d)


def test_llama3_scaling_without_its_original_length() -> None:
    rules = {k: v for k, v in LLAMA3_RULES.items() if not k.startswith("original")}
    d = hf_config(tiny_config()) | {"rope_scaling": rules}
    hf = transformers.AutoConfig.for_model(**d)
    scaling = config_from_hf(d).rope_scaling
    assert scaling is not None and scaling.original_max_positions == 256
    assert hf.rope_parameters["original_max_position_embeddings"] == 256


@pytest.mark.parametrize("window", [None, 256, 4096])
def test_mistral_without_an_effective_window(window: int | None) -> None:
    d = hf_config(tiny_config("mistral")) | {"sliding_window": window}
    assert config_from_hf(d) == tiny_config("mistral")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": None}, "missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": False}, "rope_scaling is False"),
        ({"rope_scaling": {"type": ["linear"]}}, "type is "),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": [[64] * 99]}, "hidden_size"),
        ({"max_position_embeddings": 1}, "max_positions is 1; expected a whole number from 2"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"intermediate_size": -1}, "ffn_size"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": math.nan}, "norm_eps"),
        ({"rms_norm_eps": 0}, "norm_eps"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 10**4000}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta is nan; expected a number from"),
        ({"rms_norm_eps": 1e-320}, "norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "factor"),
        ({"architectures": [[["LlamaForCausalLM"]]]}, "architectures"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"eos_token_id": 131}, "eos token id"),
        ({"bos_token_id": -1}, "bos"),
    ],
)
def test_hf_refusals(change: dict[str, Any], word: str) -> None:
    message = refusal(config_from_hf, hf_config(tiny_config()) | change)
    assert re.search(word, message) and len(message) < 300, message


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ],
)
def test_family_refusals(family: str, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config_from_hf(hf_config(tiny_config(family)) | change)


def test_mistral_without_the_window_key_has_the_window_of_transformers() -> None:
    d = hf_config(tiny_config("mistral", max_positions=8192))
    del d["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        config_from_hf(d)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "gemma"},
        {"rope_scaling": RopeScaling("factors", 1.0, factors=(1.0,) * 7)},
        {"has_qk_norm": 1},
        {"eos_token_ids": [2]},
        {"norm_eps": True},
        {"num_layers": 10**6},
        {"max_positions": 1},
        {"rope_theta": 0.5},
    ],
)
def test_direct_construction_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(tiny_config(), **change)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ntk", 2.0),
        ("linear", 0.0),
        ("factors", 1.0),
        ("linear", 2.0, 1.0, 4.0, 8192, (1.0,)),
        ("factors", 1.0, 1.0, 4.0, 8192, (1.0, math.nan)),
        ("llama3", 8.0, 4.0, 4.0),
    ],
)
def test_rope_scaling_is_checked(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        RopeScaling(*arguments)


def test_gguf_defaults() -> None:
    config = config_from_gguf(gguf_metadata())
    assert config == tiny_config(num_kv_heads=4, bos_token_id=None, eos_token_ids=())


def test_gguf_values() -> None:
    config = config_from_gguf(
        gguf_metadata(
            llama__attention__head_count_kv=2,
            llama__attention__key_length=8,
            llama__attention__value_length=8,
            llama__rope__dimension_count=8,
            llama__rope__scaling__type="linear",
            llama__rope__scaling__factor=4.0,
            tokenizer__ggml__bos_token_id=1,
            tokenizer__ggml__eos_token_id=2,
            tokenizer__ggml__eot_token_id=5,
        )
    )
    scaling = RopeScaling("linear", 4.0)
    assert config == tiny_config(head_dim=8, rope_scaling=scaling, eos_token_ids=(2, 5))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"general__architecture": "gemma"}, "general.architecture"),
        ({"general__architecture": None}, "missing"),
        ({"general__architecture": np.array([1, 2])}, "general.architecture"),
        ({"llama__rope__scaling__type": np.array([1, 2])}, "rope.scaling.type"),
        ({"llama__context_length": 1}, "max_positions is 1; expected a whole number from 2"),
        ({"llama__block_count": None}, "block_count is missing"),
        ({"llama__attention__head_count": [4, 4]}, "head_count"),
        ({"llama__embedding_length": 10**12}, "hidden_size"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"llama__rope__dimension_count": 8}, "dimension_count"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__scaling__type": "linear"}, "factor is missing"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__sliding_window": 128}, "sliding_window"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, "norm_eps"),
        ({"tokenizer__ggml__tokens": None}, "vocab_size is missing"),
    ],
)
def test_gguf_refusals(change: dict[str, Any], word: str) -> None:
    message = refusal(config_from_gguf, gguf_metadata(**change))
    assert re.search(word, message), message


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.Family(
        "new", "NewForCausalLM", gguf="new", has_qkv_bias=True, hf_defaults={"head_dim": 8}
    )
    monkeypatch.setitem(families.FAMILIES, "new", family)
    monkeypatch.setitem(families.GGUF_FAMILIES, "new", family)
    d = hf_config(tiny_config()) | {"model_type": "new", "architectures": ["NewForCausalLM"]}
    del d["head_dim"]
    expected = dataclasses.replace(tiny_config(), architecture="new", has_qkv_bias=True, head_dim=8)
    assert config_from_hf(d) == expected
    metadata = {key.replace("llama.", "new."): v for key, v in gguf_metadata().items()}
    config = config_from_gguf(metadata | {"general.architecture": "new"})
    assert (config.architecture, config.has_qkv_bias, config.head_dim) == ("new", True, 16)
