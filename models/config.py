"""Shape and constants of a LLaMA-family model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides low frequencies by
    `factor`, keeps high ones, and blends between the two wavelength bounds
    `original_max_positions / low_freq_factor` and `original_max_positions / high_freq_factor`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """One LLaMA-family model. Letters in brackets are those of the project's shape legend."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"]
    num_layers: int  # [L]
    hidden_size: int  # [C]
    ffn_size: int  # [F]
    num_heads: int  # [H]
    num_kv_heads: int  # [H_kv]
    head_dim: int  # [D]
    vocab_size: int  # [V]
    max_positions: int  # the context the model was made for, in tokens
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
