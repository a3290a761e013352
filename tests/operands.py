"""The records that the operations of a layer read, made of bare tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.operands import Rows
from kernels.weight import Dense, LayerWeights, Weight


def qkv_layer(
    norm: torch.Tensor,
    qkv: Weight,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
) -> LayerWeights:
    """As much of a layer as its first operation reads."""
    nothing = Weight(Dense(torch.empty(0, 0)))
    return LayerWeights(norm, qkv, bias, q_norm, k_norm, nothing, torch.empty(0), nothing, nothing)


def rows_at(positions: torch.Tensor, num_tokens: torch.Tensor, slots: torch.Tensor) -> Rows:
    """The rows of a pass, of tokens that no operation of a layer looks at."""
    return Rows(torch.empty_like(positions, dtype=torch.int64), positions, num_tokens, slots)


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A record, or anything that may be in one, with all of its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if hasattr(value, "_fields"):
        return type(value)(*(with_tensors(part, change) for part in value))
    return value
