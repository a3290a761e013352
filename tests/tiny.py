"""Tiny random models, ready to run, for the tests of the forward pass and the engine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from checkpoints import tiny_config
from operands import with_tensors
from tokenizers_for_tests import byte_tokenizer

from engine import LLM
from engine.loading import Loaded
from kernels.operands import Rows
from kernels.ops import Ops
from kernels.ops_cpu import NUMBA
from kernels.weight import Dense, Weight
from models.config import LlamaConfig, RopeScaling
from models.llama import Llama, make_llama
from models.weights import LlamaWeights, random_weights

# Operation by operation: with what is put in the place of one, or with a record of each.
IN_TURN = replace(NUMBA, verify_round=None, draft_round=None)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_positions=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"architecture": "llama"},
    "llama3": {"architecture": "llama", "rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "llama-linear-tied": {
        "architecture": "llama",
        "rope_scaling": RopeScaling("linear", 4.0),
        "tie_embeddings": True,
    },
    "smollm2-group3": {
        "architecture": "llama", "num_heads": 9, "num_kv_heads": 3, "head_dim": 12,
        "hidden_size": 108, "ffn_size": 77, "tie_embeddings": True,
    },
    "mistral-group4": {"architecture": "mistral", "num_heads": 8, "head_dim": 10},
    "qwen2-group1": {"architecture": "qwen2", "num_kv_heads": 4, "ffn_size": 123},
    "qwen3-group4": {"architecture": "qwen3", "num_heads": 8, "hidden_size": 60},
}  # fmt: skip


def family_config(family: str, **changes: Any) -> LlamaConfig:
    values = FAMILIES[family] | changes
    return tiny_config(**values)


def to_device(weights: LlamaWeights, device: torch.device) -> LlamaWeights:
    """Weights drawn on the CPU, so that a seed means the same model everywhere."""
    if device.type == "cpu":
        return weights
    move = partial(with_tensors, change=lambda tensor: tensor.to(device))
    layers = tuple(map(move, weights.layers))
    ends = move(weights.final_norm), move(weights.lm_head)
    return LlamaWeights(move(weights.embedding), layers, *ends)


def with_matrices(weights: LlamaWeights, dtype: torch.dtype) -> LlamaWeights:
    """Every matrix rounded to `dtype`; norms and biases as they are."""
    change = partial(
        with_tensors, change=lambda tensor: tensor.to(dtype) if tensor.ndim == 2 else tensor
    )
    embedding, layers = change(weights.embedding), tuple(map(change, weights.layers))
    head = Weight(Dense(embedding)) if weights.is_tied else change(weights.lm_head)
    return LlamaWeights(embedding, layers, weights.final_norm, head)


def tiny_llama(
    config: LlamaConfig,
    prefill_ops: Ops = NUMBA,
    decode_ops: Ops = NUMBA,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    matrix_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Llama:
    weights = to_device(random_weights(config, seed=seed, dtype=dtype), torch.device(device))
    if matrix_dtype is not None:
        weights = with_matrices(weights, matrix_dtype)
    return make_llama(config, weights, config.max_positions, prefill_ops, decode_ops, kv_dtype)


def tiny_llm(config: LlamaConfig | None = None, **options: Any) -> LLM:
    """An LLM around a tiny random model whose tokens are bytes."""
    tokenizer = byte_tokenizer()
    config = config or family_config("llama2", vocab_size=tokenizer.vocab_size)
    names = ("prefill_ops", "decode_ops", "device", "dtype", "matrix_dtype", "kv_dtype")
    ops = {name: options.pop(name) for name in names if name in options}
    model = tiny_llama(config, **ops)
    loaded = Loaded("tiny", model, tokenizer, options.pop("chat_template", None), {})
    return LLM.from_loaded(loaded, **{"profile": False} | options)


def rows_of(token_ids: list[int], start: int = 0, slot: int = 0) -> Rows:
    """One sequence's tokens as a pass."""
    return Rows(
        torch.tensor([token_ids]),
        torch.arange(start, start + len(token_ids), dtype=torch.int32)[None],
        torch.tensor([len(token_ids)], dtype=torch.int32),
        torch.tensor([slot], dtype=torch.int32),
    )
