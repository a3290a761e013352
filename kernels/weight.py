"""The weights that the kernels read: a matrix in its stored forms, and a layer's worth of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Weight(NamedTuple):
    """The stored forms of one matrix [N, K]; a plan's precision names the form: 16 or 8.

    A record and not a bare tensor, so that a further form adds a field and no argument.
    """

    full: torch.Tensor  # [N, K], row-major, in the model's dtype
    int8: torch.Tensor | None = None  # [N, K]: full is about int8 * scale[:, None]
    scale: torch.Tensor | None = None  # [N] float32


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


def form_addresses(weight: Weight) -> list[int]:
    """Where the forms of a weight lie in memory, 0 for one that there is not."""
    return [0 if form is None else form.data_ptr() for form in weight]


def layer_table(layers: Sequence[LayerWeights]) -> np.ndarray:
    """[L, 17] int64 addresses: a row is a layer's tensors, in order, three for each Weight."""
    rows = []
    for layer in layers:
        row: list[int] = []
        for tensor in layer:
            if isinstance(tensor, Weight):
                row += form_addresses(tensor)
            else:
                row.append(0 if tensor is None else tensor.data_ptr())
        rows.append(row)
    return np.array(rows, np.int64)
