"""Launchers of the CPU kernels, and their `NUMBA` record: float32 tensors in, addresses down.

Addresses and sizes are passed instead of arrays: unpacking an array costs about a microsecond.
The engine calls `run_layers` and `norm_lm_head`; the single operations serve tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.cpu import attention as cpu_attention
from kernels.cpu import layers as cpu_layers
from kernels.cpu import matmul
from kernels.cpu.sample import sample, top_probability
from kernels.gpu.launch import assert_plain, assert_qkv_operands
from kernels.ops import Ops
from kernels.round.keep_states import keep_states_ref
from kernels.round.rows import draft_rows_ref, verify_rows_ref
from kernels.route.nearest_anchor import nearest_anchor_ref
from kernels.route.pool_states import pool_states_ref
from kernels.weight import INT8, LayerWeights, Weight, addresses

OUTSIDE = "slots or positions outside the cache, or tokens that are not in a row"


def _check(x: torch.Tensor, weight: Weight, shape: tuple[int, int], plan: torch.Tensor) -> None:
    """x [R, K] and a weight [N, K] of this shape are plain float32; so many rows a sequence."""
    assert_plain(torch.float32, x)
    weight.check(shape, torch.float32)
    assert_plain(torch.uint8, plan)
    assert x.shape[1] == shape[1] and x.shape[0] % plan.shape[0] == 0, (x.shape, shape, plan.shape)


def _check_vector(vector: torch.Tensor | None, size: int) -> None:
    assert vector is None or vector.shape == (size,), (vector.shape, size)
    assert_plain(torch.float32, vector)


def _forms(weight: Weight) -> np.ndarray:
    """A weight's forms as planned_matmul reads them; the caller keeps it until that is done."""
    return addresses(*weight.tensors)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_forms(weight: Weight, plan: torch.Tensor, sublayer: int | slice) -> None:
    """The plan has that column, and asks for 8 bits only where there are any, not at address 0."""
    assert isinstance(sublayer, slice) or 0 <= sublayer < plan.shape[1], (sublayer, plan.shape)
    if weight.draft is None:
        assert not (plan[:, sublayer] == INT8).any(), "the weights have no int8 form"


def norm_qkv_rope_append(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: Weight,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_tokens: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_qkv_rope.py; q comes back as a view [R, H, D] with the row stride of Q, K and V."""
    assert_qkv_operands(
        x, norm_weight, qkv, (q_norm, k_norm), (cos, sin), (positions, num_tokens, slots),
        (k_cache, v_cache), plan,
    )  # fmt: skip
    _check_forms(qkv, plan, sublayer)
    (batch, width), (rows, hidden) = positions.shape, x.shape
    num_slots, kv_heads, cache_len, head_dim = k_cache.shape
    num_out = qkv.shape[0]
    heads = num_out // head_dim - 2 * kv_heads
    assert heads > 0 and heads % kv_heads == 0, (heads, kv_heads)
    assert x.dtype == torch.float32 and plan.shape[0] == batch, (x.dtype, plan.shape, batch)
    assert num_tokens.shape == slots.shape == (batch,), (num_tokens.shape, slots.shape, batch)
    _check_vector(qkv_bias, num_out)
    for norm in (q_norm, k_norm):
        _check_vector(norm, head_dim)
    y, record = x.new_empty(rows, num_out), _forms(qkv)
    fits = matmul.norm_qkv_rope_append(
        x.data_ptr(), norm_weight.data_ptr(), eps, record.ctypes.data, _address(qkv_bias),
        _address(q_norm), _address(k_norm), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
        num_tokens.data_ptr(), slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        plan.data_ptr() + sublayer, plan.shape[1], batch, width, hidden, heads, kv_heads, head_dim,
        cache_len, min(cache_len, cos.shape[0]), num_slots, y.data_ptr(),
    )  # fmt: skip
    assert fits, OUTSIDE
    return y.view(rows, -1, head_dim)[:, :heads]


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    num_tokens: torch.Tensor,
    slots: torch.Tensor,
    plan: torch.Tensor,
    sublayer: int,
    counters: torch.Tensor,
) -> torch.Tensor:
    """See attention.py; q may have any row stride."""
    (batch, width), (rows, heads, head_dim) = positions.shape, q.shape
    assert q.stride()[1:] == (head_dim, 1) and rows == batch * width, (q.shape, q.stride())
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim, k_cache.shape
    assert heads % k_cache.shape[1] == 0 and plan.shape[0] == batch, (q.shape, plan.shape)
    assert num_tokens.shape == slots.shape == (batch,), (num_tokens.shape, slots.shape, batch)
    assert 0 <= sublayer < plan.shape[1] and q.dtype == torch.float32, (sublayer, q.dtype)
    assert_plain(torch.float32, k_cache, v_cache)
    assert_plain(torch.int32, positions, num_tokens, slots)
    assert_plain(torch.uint8, plan)
    out = q.new_empty(rows, heads * head_dim)
    fits = cpu_attention.attention(
        q.data_ptr(), q.stride(0) * 4, k_cache.data_ptr(), v_cache.data_ptr(),
        positions.data_ptr(), num_tokens.data_ptr(), slots.data_ptr(), plan.data_ptr() + sublayer,
        plan.shape[1], batch, width, heads, k_cache.shape[1], head_dim, k_cache.shape[2],
        k_cache.shape[0], out.data_ptr(),
    )  # fmt: skip
    assert fits, OUTSIDE
    return out


def linear_residual(
    x: torch.Tensor,
    weight: Weight,
    residual: torch.Tensor,
    plan: torch.Tensor,
    sublayer: int,
    counters: torch.Tensor,
) -> None:
    """See linear_residual.py."""
    (rows, num_k), num_out, record = x.shape, residual.shape[1], _forms(weight)
    _check(x, weight, (num_out, num_k), plan)
    _check_forms(weight, plan, sublayer)
    assert residual.shape[0] == rows, (residual.shape, x.shape)
    assert_plain(torch.float32, residual)
    matmul.linear_residual(
        x.data_ptr(), record.ctypes.data, residual.data_ptr(), plan.data_ptr() + sublayer,
        plan.shape[1], plan.shape[0], rows, num_k, num_out,
    )  # fmt: skip


def norm_gated_mlp(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: Weight,
    plan: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_gated_mlp.py."""
    (rows, hidden), ffn = x.shape, gate_up.shape[0] // 2
    _check(x, gate_up, (2 * ffn, hidden), plan)
    _check_forms(gate_up, plan, sublayer)
    _check_vector(norm_weight, hidden)
    h, record = x.new_empty(rows, ffn), _forms(gate_up)
    matmul.norm_gated_mlp(
        x.data_ptr(), norm_weight.data_ptr(), eps, record.ctypes.data,
        plan.data_ptr() + sublayer, plan.shape[1], plan.shape[0], rows, hidden, ffn,
        h.data_ptr(),
    )  # fmt: skip
    return h


def norm_lm_head(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    lm_head: Weight,
    plan: torch.Tensor,
    sublayer: int,
) -> torch.Tensor:
    """See norm_lm_head.py."""
    (rows, hidden), vocab = x.shape, lm_head.shape[0]
    _check(x, lm_head, (vocab, hidden), plan)
    _check_forms(lm_head, plan, sublayer)
    _check_vector(norm_weight, hidden)
    logits, record = x.new_empty(rows, vocab), _forms(lm_head)
    matmul.norm_lm_head(
        x.data_ptr(), norm_weight.data_ptr(), eps, record.ctypes.data, plan.data_ptr() + sublayer,
        plan.shape[1], plan.shape[0], rows, hidden, vocab, logits.data_ptr(),
    )  # fmt: skip
    return logits


def accept(
    target: torch.Tensor, token_ids: torch.Tensor, num_drafted: torch.Tensor
) -> torch.Tensor:
    """See accept.py; a few tokens on a CPU are compared in less time than one torch operation."""
    width, rows = target.shape[1], []
    drafts = zip(target.tolist(), token_ids.tolist(), num_drafted.tolist(), strict=True)
    for tokens, drafted, length in drafts:
        count = 0
        while count < min(length, width - 1) and drafted[count + 1] == tokens[count]:
            count += 1
        rows.append([count, length, *tokens[: count + 1], *[-1] * (width - count - 1)])
    return torch.tensor(rows)


def keep_drafted(
    logits: torch.Tensor,
    drawn: torch.Tensor,
    token_ids: torch.Tensor,
    num_drafted: torch.Tensor,
    num_wanted: torch.Tensor,
    end_ids: torch.Tensor,
    stop_probability: torch.Tensor,
) -> None:
    """See keep_drafted.py; likewise."""
    limits = stop_probability.tolist()
    sure = top_probability(logits).tolist() if any(limits) else [1.0] * len(limits)
    rows = zip(drawn.tolist(), num_drafted.tolist(), num_wanted.tolist(), sure, limits, strict=True)
    for b, (token, drafted, wanted, probability, limit) in enumerate(rows):
        if drafted < wanted:
            token_ids[b, drafted + 1] = token
            num_drafted[b] = drafted + 1
            if probability < limit or token in end_ids[b].tolist():
                num_wanted[b] = drafted + 1


def run_layers(
    x: torch.Tensor,  # [R, C], updated in place
    layers: Sequence[LayerWeights],
    table: np.ndarray,  # layer_table(layers): making it takes as long as a layer
    eps: float,
    cos: torch.Tensor,  # [S, D/2]
    sin: torch.Tensor,  # [S, D/2]
    positions: torch.Tensor,  # [B, T] int32
    num_tokens: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    k_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    plan: torch.Tensor,  # [B, 2L + 1] uint8
) -> None:
    """The residual stream through every layer: what the five operations do in turn, bit for bit."""
    (batch, width), (rows, hidden) = positions.shape, x.shape
    num_layers, num_slots, kv_heads, cache_len, head_dim = k_cache.shape
    first = layers[0]
    heads, ffn = first.attn_out.shape[1] // head_dim, first.down.shape[1]
    # The layers agree with each other: layer_table has seen to it.
    assert len(layers) == len(table) == num_layers, (len(layers), len(table), num_layers)
    num_out = (heads + 2 * kv_heads) * head_dim
    assert first.qkv.shape == (num_out, hidden), (first.qkv.shape, num_out, hidden)
    assert heads % kv_heads == 0 and rows == batch * width, (heads, kv_heads, x.shape)
    assert k_cache.shape == v_cache.shape and cos.shape == sin.shape, (v_cache.shape, sin.shape)
    assert cos.shape[1] * 2 == head_dim, (cos.shape, head_dim)
    assert plan.shape == (batch, 2 * num_layers + 1), (plan.shape, batch, num_layers)
    assert num_tokens.shape == slots.shape == (batch,), (num_tokens.shape, slots.shape, batch)
    assert_plain(torch.float32, x, cos, sin, k_cache, v_cache)
    assert_plain(torch.int32, positions, num_tokens, slots)
    assert_plain(torch.uint8, plan)
    # That a layer is of one dtype, and all of its weights have the same forms, likewise.
    assert first.attn_norm.dtype == torch.float32, first.attn_norm.dtype
    for norm in (first.q_norm, first.k_norm):
        _check_vector(norm, head_dim)
    _check_forms(first.qkv, plan, slice(0, -1))
    fits = cpu_layers.run_layers(
        table.ctypes.data, num_layers, x.data_ptr(), eps, cos.data_ptr(), sin.data_ptr(),
        positions.data_ptr(), num_tokens.data_ptr(), slots.data_ptr(), k_cache.data_ptr(),
        v_cache.data_ptr(), k_cache.stride(0) * 4, plan.data_ptr(), plan.shape[1], batch, width,
        hidden, heads, kv_heads, head_dim, cache_len, ffn, min(cache_len, cos.shape[0]), num_slots,
    )  # fmt: skip
    assert fits, OUTSIDE


NUMBA = Ops(
    name="numba",
    norm_qkv_rope_append=norm_qkv_rope_append,
    attention=attention,
    linear_residual=linear_residual,
    norm_gated_mlp=norm_gated_mlp,
    norm_lm_head=norm_lm_head,
    sample=sample,
    keep_states=keep_states_ref,
    draft_rows=draft_rows_ref,
    keep_drafted=keep_drafted,
    verify_rows=verify_rows_ref,
    accept=accept,
    pool_states=pool_states_ref,
    nearest_anchor=nearest_anchor_ref,
    is_row_invariant=True,
    run_layers=run_layers,
)
