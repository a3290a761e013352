"""What the operations of a layer read beside its weights, as records of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:  # which import what is here
    from kernels.blocks import Blocks
    from kernels.round.sample import SampleParams
    from kernels.weight import LayerWeights, Weight


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


class ModelOperands(NamedTuple):
    """All that a pass reads of a model and its cache, for what runs a pass in one launch."""

    embedding: torch.Tensor | Blocks  # [V, C]
    layers: Sequence[LayerWeights]
    table: np.ndarray  # of the layers, see cpu/table.py
    final_norm: torch.Tensor  # [C]
    lm_head: Weight  # [V, C]
    eps: float
    rotary: RotaryTable
    k_cache: torch.Tensor  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor  # [L, slots, H_kv, S, D], written
    states: torch.Tensor  # [slots, S, C], written


class RoundBuffers(NamedTuple):
    """What the passes of a round read and write, one row a sequence, those that draft most first.

    num_drafted is -1 in a row without a sequence. slot_precisions is no input of a round: a slot's
    row is written when its sequence changes its plan, by the router on the device or by the host.
    """

    token_ids: torch.Tensor  # [B, W] int64: the newest token, then the draft
    first: torch.Tensor  # [B] int32: position of the newest token
    slots: torch.Tensor  # [B] int32: cache slot
    num_drafted: torch.Tensor  # [B] int32
    num_wanted: torch.Tensor  # [B] int32
    stop_probability: torch.Tensor  # [B] float32
    sampling: SampleParams
    slot_precisions: torch.Tensor  # [slots, 2L + 1] uint8

    def rows(self, batch: int) -> RoundBuffers:
        """The first `batch` rows: views at the same addresses."""
        sampling = type(self.sampling)(*(column[:batch] for column in self.sampling))
        columns = {name: getattr(self, name)[:batch] for name in self._fields[:6]}
        return self._replace(**columns, sampling=sampling)
