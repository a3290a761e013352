"""The forward pass of a LLaMA-family model.

x = embedding[token]
per layer:  x += W_o attention(rope(W_qkv norm(x)))      sub-layer 2l
            x += W_down (silu(W_gate norm(x)) * W_up norm(x))      sub-layer 2l + 1
logits = W_head norm(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.gpu.launch import NUM_COUNTERS
from kernels.ops import Ops
from models.config import LlamaConfig
from models.plan import FULL, DraftPlan
from models.rope import rope_table
from models.weights import LlamaWeights


class Rows(NamedTuple):
    """The rows of one pass: T new tokens of each of B sequences, some of them padding."""

    token_ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [B, T] int32, consecutive in a sequence
    num_tokens: torch.Tensor  # [B] int32: valid tokens of each sequence
    slots: torch.Tensor  # [B] int32: cache slot of each sequence


@dataclass(frozen=True)
class Llama:
    """A model ready to run: weights, rotary table, and the operations of either kind of pass."""

    config: LlamaConfig
    weights: LlamaWeights
    cos: torch.Tensor  # [S, D/2] float32
    sin: torch.Tensor  # [S, D/2] float32
    counters: torch.Tensor  # [n] int32, zero between launches: see `Ops`
    prefill_ops: Ops
    decode_ops: Ops

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype


def make_llama(
    config: LlamaConfig,
    weights: LlamaWeights,
    num_positions: int,
    prefill_ops: Ops,
    decode_ops: Ops,
) -> Llama:
    """Put a model together for sequences of up to `num_positions` tokens."""
    cos, sin = (table.to(weights.embedding.device) for table in rope_table(config, num_positions))
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=weights.embedding.device)
    return Llama(config, weights, cos, sin, counters, prefill_ops, decode_ops)


def full_plan(config: LlamaConfig, batch: int, device: torch.device) -> torch.Tensor:
    """The plan table [B, 2L + 1] uint8 of the model itself: everything at full precision.

    Columns 0 to 2L - 1 are the sub-layers, column 2L is the LM head.
    """
    return torch.full((batch, 2 * config.num_layers + 1), FULL, dtype=torch.uint8, device=device)


def plan_table(plans: Sequence[DraftPlan], device: torch.device) -> torch.Tensor:
    """The plan table [B, 2L + 1] uint8 of a pass in which every sequence has its own plan."""
    rows = [(*plan.sublayers, plan.head_precision) for plan in plans]
    return torch.tensor(rows, dtype=torch.uint8, device=device)


def forward(
    model: Llama,
    rows: Rows,
    k_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    plan: torch.Tensor,  # [B, 2L + 1] uint8
    ops: Ops,
) -> torch.Tensor:
    """Return the residual stream after the last layer, [B*T, C]; see `logits` for the rest."""
    config, counters = model.config, model.counters
    x = model.weights.embedding[rows.token_ids.flatten()]
    if ops.run_layers is not None:
        ops.run_layers(
            x, model.weights.layers, model.weights.layer_table, config.norm_eps, model.cos,
            model.sin, rows.positions, rows.num_tokens, rows.slots, k_cache, v_cache, plan,
        )  # fmt: skip
        return x
    layers = zip(model.weights.layers, k_cache.unbind(0), v_cache.unbind(0), strict=True)
    for i, (layer, k, v) in enumerate(layers):
        q = ops.norm_qkv_rope_append(
            x, layer.attn_norm, config.norm_eps, layer.qkv, layer.qkv_bias, layer.q_norm,
            layer.k_norm, model.cos, model.sin, rows.positions, rows.num_tokens, rows.slots,
            k, v, plan, 2 * i,
        )  # fmt: skip
        o = ops.attention(
            q, k, v, rows.positions, rows.num_tokens, rows.slots, plan, 2 * i, counters
        )
        ops.linear_residual(o, layer.attn_out, x, plan, 2 * i, counters)
        h = ops.norm_gated_mlp(x, layer.mlp_norm, config.norm_eps, layer.gate_up, plan, 2 * i + 1)
        ops.linear_residual(h, layer.down, x, plan, 2 * i + 1, counters)
    return x


def logits(model: Llama, x: torch.Tensor, plan: torch.Tensor, ops: Ops) -> torch.Tensor:
    """x [R, C], as many rows of the residual stream for each sequence -> logits [R, V] float32."""
    weights, head = model.weights, 2 * model.config.num_layers
    return ops.norm_lm_head(
        x, weights.final_norm, model.config.norm_eps, weights.lm_head, plan, head
    )
