"""The tensors of a LLaMA-family model, in the layout that the kernels read.

Q, K and V are one matrix, gate and up another, so that a layer reads its input once. The rows of
Q and K (and the Q/K norm weights) are stored in interleaved-pair order: rotary pairs are rows
(2i, 2i+1) of a head, so that a matrix tile of any even height can rotate its own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.weight import Weight


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. `qkv` rows: H*D of Q, then H_kv*D of K, then H_kv*D of V."""

    attn_norm: torch.Tensor  # [C]
    qkv: Weight  # [(H + 2*H_kv) * D, C]
    qkv_bias: torch.Tensor | None  # [(H + 2*H_kv) * D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    attn_out: Weight  # [C, H*D]
    mlp_norm: torch.Tensor  # [C]
    gate_up: Weight  # [2*F, C]: F rows of gate, then F rows of up
    down: Weight  # [C, F]


@dataclass(frozen=True)
class LlamaWeights:
    """A whole model. With tied embeddings `lm_head.full` is `embedding` itself, not a copy."""

    embedding: torch.Tensor  # [V, C]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [C]
    lm_head: Weight  # [V, C]
