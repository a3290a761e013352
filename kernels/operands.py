"""What the operations of a layer read beside its weights, as records of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """The rows of one pass: T new tokens of each of B sequences, some of them padding."""

    token_ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [B, T] int32, consecutive in a sequence
    num_tokens: torch.Tensor  # [B] int32: valid tokens of each sequence
    slots: torch.Tensor  # [B] int32: cache slot of each sequence
    next_position: torch.Tensor | None = None  # [B*T] int64: of each row's own token, if drawn


class RotaryTable(NamedTuple):
    """Of each position the angle of each rotary pair."""

    cos: torch.Tensor  # [S, D/2] float32
    sin: torch.Tensor  # [S, D/2] float32


class LayerCache(NamedTuple):
    """Keys, after RoPE, and values of one layer."""

    k: torch.Tensor  # [slots, H_kv, S, D]
    v: torch.Tensor  # [slots, H_kv, S, D]
