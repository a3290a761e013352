"""The weights that the kernels read: a matrix in its stored forms, and a layer's worth of them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """The stored forms of one matrix [N, K]; a plan's precision (16 = `full`) names the form.

    A record and not a bare tensor, so that a further form adds a field and no argument.
    """

    full: torch.Tensor  # [N, K], row-major, in the model's dtype


class LayerWeights(NamedTuple):
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
