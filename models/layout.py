"""The layout of a checkpoint: one row of a table for each tensor that a model stores.

Safetensors and GGUF files store the same tensors under other names. `LlamaWeights` keeps some of
them in one matrix, one under the other in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from models.config import LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
GGUF_ROPE_FACTORS = "rope_freqs.weight"  # part of the configuration, see `RopeScaling`


class _Row(NamedTuple):
    hf: str  # in a layer what follows `model.layers.{i}.`
    gguf: str  # in a layer what follows `blk.{i}.`
    field: str  # of `LlamaWeights` or `LayerWeights`
    shape: str  # one letter of the project's shape legend for each axis; Q is H * D, K is H_kv * D
    is_rotary: bool = False
    is_stored: Callable[[LlamaConfig], Any] = lambda _: True  # whether a model has it


_BIAS, _NORM = attrgetter("has_qkv_bias"), attrgetter("has_qk_norm")
# `random_weights` draws in this order: another one is another model for the same seed.
_FIRST = (_Row(EMBEDDING, "token_embd.weight", "embedding", "VC"),)
_LAYER = (
    _Row("input_layernorm.weight", "attn_norm.weight", "attn_norm", "C"),
    _Row("self_attn.q_proj.weight", "attn_q.weight", "qkv", "QC", True),
    _Row("self_attn.k_proj.weight", "attn_k.weight", "qkv", "KC", True),
    _Row("self_attn.v_proj.weight", "attn_v.weight", "qkv", "KC"),
    _Row("self_attn.o_proj.weight", "attn_output.weight", "attn_out", "CQ"),
    _Row("post_attention_layernorm.weight", "ffn_norm.weight", "mlp_norm", "C"),
    _Row("mlp.gate_proj.weight", "ffn_gate.weight", "gate_up", "FC"),
    _Row("mlp.up_proj.weight", "ffn_up.weight", "gate_up", "FC"),
    _Row("mlp.down_proj.weight", "ffn_down.weight", "down", "CF"),
    _Row("self_attn.q_proj.bias", "attn_q.bias", "qkv_bias", "Q", True, _BIAS),
    _Row("self_attn.k_proj.bias", "attn_k.bias", "qkv_bias", "K", True, _BIAS),
    _Row("self_attn.v_proj.bias", "attn_v.bias", "qkv_bias", "K", False, _BIAS),
    _Row("self_attn.q_norm.weight", "attn_q_norm.weight", "q_norm", "D", True, _NORM),
    _Row("self_attn.k_norm.weight", "attn_k_norm.weight", "k_norm", "D", True, _NORM),
)
_LAST = (
    _Row("model.norm.weight", "output_norm.weight", "final_norm", "C"),
    _Row(LM_HEAD, "output.weight", "lm_head", "VC", False, lambda c: not c.tie_embeddings),
)


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a model, and where it lies in `LlamaWeights`."""

    name: str  # of Hugging Face
    gguf: str  # the name in GGUF
    shape: tuple[int, ...]
    is_rotary: bool  # whether the order of rotary pairs applies to the first axis
    layer: int | None  # None: the model itself has the field
    field: str
    start: int  # in the first axis of the field's tensor


def stored_parts(config: LlamaConfig) -> list[StoredPart]:
    """Every tensor that a checkpoint of `config` must hold, layer by layer."""
    layers = (part for i in range(config.num_layers) for part in _parts(config, _LAYER, i))
    return [*_parts(config, _FIRST, None), *layers, *_parts(config, _LAST, None)]


def _parts(config: LlamaConfig, rows: tuple[_Row, ...], layer: int | None) -> Iterator[StoredPart]:
    D = config.head_dim
    sizes = {
        "C": config.hidden_size, "F": config.ffn_size, "V": config.vocab_size, "D": D,
        "Q": config.num_heads * D, "K": config.num_kv_heads * D,
    }  # fmt: skip
    hf, gguf = ("", "") if layer is None else (f"model.layers.{layer}.", f"blk.{layer}.")
    ends: dict[str, int] = {}
    for row in rows:
        if row.is_stored(config):
            shape = tuple(sizes[letter] for letter in row.shape)
            start = ends.get(row.field, 0)
            ends[row.field] = start + shape[0]
            names = hf + row.hf, gguf + row.gguf
            yield StoredPart(*names, shape, row.is_rotary, layer, row.field, start)
