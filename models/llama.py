"""The forward pass of a LLaMA-family model.

x = embedding[token]
per layer:  x += W_o attention(rope(W_qkv norm(x)))      sub-layer 2l
            x += W_down (silu(W_gate norm(x)) * W_up norm(x))      sub-layer 2l + 1
logits = W_head norm(x)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.gpu.launch import NUM_COUNTERS
from kernels.operands import LayerCache, ModelOperands, RotaryTable, Rows
from kernels.ops import Ops
from models.config import LlamaConfig
from models.plan import FULL, DraftPlan
from models.rope import rope_table
from models.weights import LlamaWeights


@dataclass(frozen=True)
class Llama:
    """A model ready to run: weights, rotary table, and the operations of either kind of pass.

    kv_dtype: of keys and values in the cache.
    """

    config: LlamaConfig
    weights: LlamaWeights
    rotary: RotaryTable  # of S positions
    counters: torch.Tensor  # [n] int32, zero between launches: see `Ops`
    prefill_ops: Ops
    decode_ops: Ops
    kv_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; matrices, keys and values may be narrower on a CPU."""
        return self.weights.dtype

    @property
    def num_positions(self) -> int:
        return len(self.rotary.cos)


def make_llama(
    config: LlamaConfig,
    weights: LlamaWeights,
    num_positions: int,
    prefill_ops: Ops,
    decode_ops: Ops,
    kv_dtype: torch.dtype | None = None,
) -> Llama:
    """Put a model together for sequences of up to `num_positions` tokens.

    kv_dtype: None is that of activations.
    """
    device = weights.final_norm.device
    rotary = RotaryTable(*(table.to(device) for table in rope_table(config, num_positions)))
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    kept = kv_dtype or weights.dtype
    return Llama(config, weights, rotary, counters, prefill_ops, decode_ops, kept)


def full_precisions(config: LlamaConfig, batch: int, device: torch.device) -> torch.Tensor:
    """The precisions [B, 2L + 1] uint8 of the model itself: every matrix in its own form.

    Columns 0 to 2L - 1 are the sub-layers, column 2L is the LM head.
    """
    return torch.full((batch, 2 * config.num_layers + 1), FULL, dtype=torch.uint8, device=device)


def precision_table(plans: Sequence[DraftPlan], device: torch.device) -> torch.Tensor:
    """The precisions [B, 2L + 1] uint8 of a pass in which every sequence has its own plan."""
    rows = [(*plan.sublayers, plan.head_precision) for plan in plans]
    return torch.tensor(rows, dtype=torch.uint8, device=device)


def forward(
    model: Llama,
    rows: Rows,
    k_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    precisions: torch.Tensor,  # [B, 2L + 1] uint8
    ops: Ops,
) -> torch.Tensor:
    """Return the residual stream after the last layer, [B*T, C]; see `logits` for the rest."""
    eps, counters = model.config.norm_eps, model.counters
    x = model.weights.embed(rows.token_ids.flatten())
    if ops.run_layers is not None:
        layers, table = model.weights.layers, model.weights.layer_table
        ops.run_layers(x, layers, table, eps, model.rotary, rows, k_cache, v_cache, precisions)
        return x
    caches = zip(k_cache.unbind(0), v_cache.unbind(0), strict=True)
    for i, (layer, (k, v)) in enumerate(zip(model.weights.layers, caches, strict=True)):
        cache, attn, mlp = LayerCache(k, v), 2 * i, 2 * i + 1
        q = ops.norm_qkv_rope_append(x, layer, eps, model.rotary, rows, cache, precisions, attn)
        o = ops.attention(q, cache, rows, precisions, attn, counters)
        ops.linear_residual(o, layer.attn_out, x, precisions, attn, counters)
        h = ops.norm_gated_mlp(x, layer.mlp_norm, eps, layer.gate_up, precisions, mlp)
        ops.linear_residual(h, layer.down, x, precisions, mlp, counters)
    return x


def operands(
    model: Llama, k_cache: torch.Tensor, v_cache: torch.Tensor, states: torch.Tensor
) -> ModelOperands:
    """The model and a cache, for operations that run a pass in one launch."""
    weights = model.weights
    return ModelOperands(
        weights.embedding, weights.layers, weights.layer_table, weights.final_norm,
        weights.lm_head, model.config.norm_eps, model.rotary, k_cache, v_cache, states,
    )  # fmt: skip


def logits(model: Llama, x: torch.Tensor, precisions: torch.Tensor, ops: Ops) -> torch.Tensor:
    """x [R, C], as many rows of the residual stream for each sequence -> logits [R, V] float32."""
    weights, eps, head = model.weights, model.config.norm_eps, 2 * model.config.num_layers
    return ops.norm_lm_head(x, weights.final_norm, eps, weights.lm_head, precisions, head)
