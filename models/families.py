"""The families of models that the engine runs: to add one, add an entry here.

What a family shares with LLaMA needs no word. A new kind of tensor is a row in `models/layout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# The order of the Q and K rows of a head: pairs (i, i + D/2), or (2i, 2i + 1).
RopeOrder = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Family:
    """What tells a family of models from LLaMA."""

    name: str  # `model_type` in config.json
    hf_class: str  # in `architectures`
    gguf: str | None  # `general.architecture`; None: its GGUF files are those of another family
    gguf_rope_order: RopeOrder = "half"  # what the converter to GGUF makes of Q and K
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    # What transformers takes where config.json lacks a key: otherwise H_kv is H, and D is C / H.
    # Only a family with `sliding_window` here has a window without being asked for one.
    hf_defaults: Mapping[str, int] = field(default_factory=dict)


_ALL = (
    Family("llama", "LlamaForCausalLM", gguf="llama", gguf_rope_order="interleaved"),
    Family(
        "mistral",
        "MistralForCausalLM",
        gguf=None,
        hf_defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        gguf="qwen2",
        has_qkv_bias=True,
        hf_defaults={"num_key_value_heads": 32},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        gguf="qwen3",
        has_qk_norm=True,
        hf_defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
)
FAMILIES = {family.name: family for family in _ALL}
GGUF_FAMILIES = {family.gguf: family for family in _ALL if family.gguf is not None}
