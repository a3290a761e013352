"""Builds small checkpoints on disk, as Hugging Face directories and as GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from models.config import LlamaConfig, RopeScaling
from models.layout import stored_parts
from models.weights import LlamaWeights, part_of, rotary_heads

F32 = gguf.GGMLQuantizationType.F32

_GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(architecture: str = "llama", **changes: Any) -> LlamaConfig:
    """Two layers of a family. Row lengths are multiples of 32, so that GGUF can quantise them."""
    values: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 131,
        "max_positions": 256,
        "norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    if architecture == "qwen2":
        values |= {"has_qkv_bias": True, "rope_theta": 1_000_000.0, "norm_eps": 1e-6}
    if architecture == "qwen3":
        values |= {"has_qk_norm": True, "head_dim": 24, "rope_theta": 1_000_000.0}
    if architecture == "mistral":
        values |= {"head_dim": 8}
    return LlamaConfig(**(values | changes))


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """`config` as the dictionary that a published config.json holds (transformers 4 spelling)."""
    d: dict[str, Any] = {
        "architectures": [f"{config.architecture.capitalize()}ForCausalLM"],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    if config.architecture == "mistral":
        d["sliding_window"] = None
    return d


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    assert scaling.kind == "llama3", scaling
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def to_hf_state_dict(config: LlamaConfig, weights: LlamaWeights) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names and in its row order, as copies.

    With tied embeddings there is no `lm_head.weight`, as in published checkpoints.
    """
    state = {}
    for part in stored_parts(config):
        tensor = part_of(weights, part)
        if part.is_rotary:
            halves = rotary_heads(tensor, config.head_dim // 2, 2).transpose(1, 2)
            tensor = halves.reshape(tensor.shape)
        state[part.name] = tensor.clone()
    return state


def write_hf_checkpoint(
    directory: Path,
    config: LlamaConfig,
    weights: LlamaWeights,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes config.json and the weights, in one file or in `shards` files with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    state = {name: t.to(dtype) for name, t in to_hf_state_dict(config, weights).items()}
    write_safetensors(directory, state, shards)
    return directory


def write_safetensors(directory: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in list(state)[i::shards]}
        save_file(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: LlamaWeights,
    qtype: gguf.GGMLQuantizationType = F32,
    metadata: dict[str, Any] | None = None,
    tensors_per_part: int = 0,
    stored: Mapping[str, tuple[np.ndarray, str]] | None = None,
) -> Path:
    """Writes what llama.cpp's converter would: matrices as `qtype`, vectors as float32.

    `stored`: by the names of matrices, what takes their place, and its type. `metadata` adds string
    and integer values, the tokenizer's for example. With `tensors_per_part` the model is split into
    several files, of which `path` is the stem.
    """
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    _add_metadata(writer, config, metadata or {})
    for name, tensor in to_hf_state_dict(config, weights).items():
        values = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = _interleave(values, config.head_dim)
        if stored and name in stored:
            data, kind = stored[name]
            writer.add_tensor(_gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif values.ndim == 2 and qtype != F32:
            writer.add_tensor(
                _gguf_name(name), gguf.quants.quantize(values, qtype), raw_dtype=qtype
            )
        else:
            writer.add_tensor(_gguf_name(name), values)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, config: LlamaConfig, extra: dict[str, Any]) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    for name, token_id in zip(("eos", "eot", "eom"), config.eos_token_ids, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    for key, value in extra.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)


def _interleave(values: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows: pairs (i, i + D/2) of a head become neighbours."""
    heads = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))


def _gguf_name(name: str) -> str:
    for hf, short in _GGUF_NAMES.items():
        name = name.replace(hf, short)
    return name


def llama3_divisors(config: LlamaConfig) -> np.ndarray:
    """What llama3 scaling divides each of the D/2 rotary frequencies by, as GGUF stores it."""
    scaling = config.rope_scaling
    assert scaling is not None and scaling.kind == "llama3", scaling
    divisors = []
    for i in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * i / config.head_dim)
        ratio = scaling.original_max_positions / wavelength
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = min(max((ratio - scaling.low_freq_factor) / span, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)
