"""The record of functions that a forward pass calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.layer.attention import attention_ref
from kernels.layer.linear_residual import linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head_ref
from kernels.layer.norm_qkv_rope import norm_qkv_rope_append_ref
from kernels.round.accept import accept_ref
from kernels.round.keep_drafted import keep_drafted_ref
from kernels.round.keep_states import keep_states_ref
from kernels.round.rows import PassRows, draft_rows_ref, verify_rows_ref
from kernels.round.sample import SampleParams, sample_ref
from kernels.route.nearest_anchor import nearest_anchor_ref
from kernels.route.pool_states import pool_states_ref


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; the files named after them hold the contracts.

    `attention` and `linear_residual` take `counters` last: int32 in the memory of the device, zero
    between launches. Where several programs share a tile's sum they count themselves there, and the
    last one adds it up; every kernel leaves zeros behind. The other implementations do not look.
    `run_layers` is all layers of a pass in one launch, where an implementation has that.
    `is_row_invariant`: a row has the same bits however many rows share the pass, so that a draft
    cannot change a token; with torch's products that holds only up to rounding.
    """

    name: str
    norm_qkv_rope_append: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    linear_residual: Callable[..., None]
    norm_gated_mlp: Callable[..., torch.Tensor]
    norm_lm_head: Callable[..., torch.Tensor]
    sample: Callable[[torch.Tensor, torch.Tensor, SampleParams], torch.Tensor]
    keep_states: Callable[..., None]
    draft_rows: Callable[..., tuple[PassRows, torch.Tensor]]
    keep_drafted: Callable[..., None]
    verify_rows: Callable[..., PassRows]
    accept: Callable[..., torch.Tensor]
    pool_states: Callable[..., torch.Tensor]
    nearest_anchor: Callable[..., torch.Tensor]
    is_row_invariant: bool
    run_layers: Callable[..., None] | None = None


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
    pool_states=pool_states_ref,
    nearest_anchor=nearest_anchor_ref,
    is_row_invariant=False,
)
