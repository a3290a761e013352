"""The record of functions that a forward pass calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from kernels.layer.attention import attention_ref
from kernels.layer.linear_residual import linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head_ref
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append_ref
from kernels.operands import LayerCache, ModelOperands, RotaryTable, RoundBuffers, Rows
from kernels.round.accept import accept_ref
from kernels.round.allow import TokenMasks, allow_ref
from kernels.round.keep_drafted import keep_drafted_ref
from kernels.round.keep_states import keep_states_ref
from kernels.round.rows import draft_rows_ref, verify_rows_ref
from kernels.round.sample import SampleParams, sample_ref
from kernels.route.nearest_anchor import nearest_anchor_ref
from kernels.route.pool_states import pool_states_ref
from kernels.weight import LayerWeights, Weight

if TYPE_CHECKING:
    from kernels.cpu.threads import ThreadPool


class RunLayers(Protocol):
    """All layers of a pass in one launch; x [R, C] is updated, the caches [L, ...] are written."""

    def __call__(
        self, x: Tensor, layers: Sequence[LayerWeights], table: np.ndarray, eps: float,
        rotary: RotaryTable, rows: Rows, k_cache: Tensor, v_cache: Tensor, precisions: Tensor,
    ) -> None: ...  # fmt: skip


class VerifyRound(Protocol):
    """A verify pass of a round over T = `width` columns, in one launch.

    Returns logits [B*T, V] float32, those of the sequences' rows one after the other and without
    padding, and what accept.py does.
    """

    def __call__(
        self, model: ModelOperands, buffers: RoundBuffers, width: int, precisions: Tensor
    ) -> tuple[Tensor, Tensor]: ...


# Of both operations that norm and project: x, norm weight, eps, matrix, precisions, sub-layer.
NormLinear = Callable[[Tensor, Tensor, float, Weight, Tensor, int], Tensor]


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; the files named after them hold the contracts.

    `attention` and `linear_residual` take `counters` last: int32 in the memory of the device, zero
    between launches. Where several programs share a tile's sum they count themselves there, and the
    last one adds it up; every kernel leaves zeros behind. The other implementations do not look.
    `run_layers` is all layers of a pass in one launch, where an implementation has that. So are
    `verify_round` and `draft_round`, of a whole draft, without penalties and grammars.
    `pool` are the threads that it runs on, where it has its own.
    """

    name: str
    norm_qkv_rope_append: Callable[
        [Tensor, LayerWeights, float, RotaryTable, Rows, LayerCache, Tensor, int], Tensor
    ]
    attention: Callable[[Tensor, LayerCache, Rows, Tensor, int, Tensor], Tensor]
    linear_residual: Callable[[Tensor, Weight, Tensor, Tensor, int, Tensor], None]
    norm_gated_mlp: NormLinear
    norm_lm_head: NormLinear
    sample: Callable[[Tensor, Tensor, SampleParams], Tensor]
    keep_states: Callable[[Tensor, Rows, Tensor], None]
    draft_rows: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Rows, Tensor]]
    keep_drafted: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    verify_rows: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Rows]
    accept: Callable[[Tensor, Tensor, Tensor], Tensor]
    allow: Callable[[Tensor, TokenMasks, Tensor], Tensor]
    pool_states: Callable[[Tensor, Tensor, float], Tensor]
    nearest_anchor: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, Tensor], Tensor]
    run_layers: RunLayers | None = None
    verify_round: VerifyRound | None = None
    draft_round: Callable[[ModelOperands, RoundBuffers], None] | None = None
    pool: ThreadPool | None = None


TORCH = Ops(
    name="torch",
    norm_qkv_rope_append=norm_qkv_rope_append_ref,
    attention=attention_ref,
    linear_residual=linear_residual_ref,
    norm_gated_mlp=norm_gated_mlp_ref,
    norm_lm_head=norm_lm_head_ref,
    sample=sample_ref,
    keep_states=keep_states_ref,
    draft_rows=draft_rows_ref,
    keep_drafted=keep_drafted_ref,
    verify_rows=verify_rows_ref,
    accept=accept_ref,
    allow=allow_ref,
    pool_states=pool_states_ref,
    nearest_anchor=nearest_anchor_ref,
)
