"""Launchers of the CPU kernels, and their `NUMBA` record: float32 tensors in, addresses down.

Addresses and sizes are passed instead of arrays: unpacking an array costs about a microsecond.
The engine calls `run_layers` and `norm_lm_head`; the single operations serve tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels import numba_attention, numba_layers, numba_matmul
from kernels.ops import Ops
from kernels.sample import sample_ref
from kernels.weight import LayerWeights, Weight


def _check(x: torch.Tensor, weight: Weight) -> None:
    full = weight.full
    assert x.dtype == full.dtype == torch.float32, (x.dtype, full.dtype)
    assert x.is_contiguous() and full.is_contiguous(), (x.stride(), full.stride())


def _address(tensor: torch.Tensor | Weight | None) -> int:
    if tensor is None:
        return 0
    return (tensor.full if isinstance(tensor, Weight) else tensor).data_ptr()


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
    _check(x, qkv)
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), (k_cache.stride(),)
    (batch, width), (rows, hidden) = positions.shape, x.shape
    _, kv_heads, cache_len, head_dim = k_cache.shape
    num_out = qkv.full.shape[0]
    heads = num_out // head_dim - 2 * kv_heads
    assert rows == batch * width and cos.shape[1] * 2 == head_dim, (x.shape, positions.shape)
    y = x.new_empty(rows, num_out)
    numba_matmul.norm_qkv_rope_append(
        x.data_ptr(), norm_weight.data_ptr(), eps, qkv.full.data_ptr(), _address(qkv_bias),
        _address(q_norm), _address(k_norm), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
        num_tokens.data_ptr(), slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        plan.data_ptr() + sublayer, plan.shape[1], batch, width, hidden, heads, kv_heads, head_dim,
        cache_len, y.data_ptr(),
    )  # fmt: skip
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
) -> torch.Tensor:
    """See attention.py; q may have any row stride."""
    (batch, width), (rows, heads, head_dim) = positions.shape, q.shape
    assert q.stride()[1:] == (head_dim, 1) and rows == batch * width, (q.shape, q.stride())
    out = q.new_empty(rows, heads * head_dim)
    numba_attention.attention(
        q.data_ptr(), q.stride(0) * 4, k_cache.data_ptr(), v_cache.data_ptr(),
        positions.data_ptr(), num_tokens.data_ptr(), slots.data_ptr(), plan.data_ptr() + sublayer,
        plan.shape[1], batch, width, heads, k_cache.shape[1], head_dim, k_cache.shape[2],
        out.data_ptr(),
    )  # fmt: skip
    return out


def linear_residual(
    x: torch.Tensor, weight: Weight, residual: torch.Tensor, plan: torch.Tensor, sublayer: int
) -> None:
    """See linear_residual.py."""
    _check(x, weight)
    assert residual.is_contiguous(), residual.stride()
    (rows, num_k), num_out = x.shape, weight.full.shape[0]
    numba_matmul.linear_residual(
        x.data_ptr(), weight.full.data_ptr(), residual.data_ptr(), plan.data_ptr() + sublayer,
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
    _check(x, gate_up)
    (rows, hidden), ffn = x.shape, gate_up.full.shape[0] // 2
    h = x.new_empty(rows, ffn)
    numba_matmul.norm_gated_mlp(
        x.data_ptr(), norm_weight.data_ptr(), eps, gate_up.full.data_ptr(),
        plan.data_ptr() + sublayer, plan.shape[1], plan.shape[0], rows, hidden, ffn,
        h.data_ptr(),
    )  # fmt: skip
    return h


def norm_lm_head(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, lm_head: Weight
) -> torch.Tensor:
    """See norm_lm_head.py."""
    _check(x, lm_head)
    (rows, hidden), vocab = x.shape, lm_head.full.shape[0]
    logits = x.new_empty(rows, vocab)
    numba_matmul.norm_lm_head(
        x.data_ptr(), norm_weight.data_ptr(), eps, lm_head.full.data_ptr(), rows, hidden, vocab,
        logits.data_ptr(),
    )  # fmt: skip
    return logits


def run_layers(
    x: torch.Tensor,  # [R, C], updated in place
    layers: Sequence[LayerWeights],
    eps: float,
    cos: torch.Tensor,  # [S, D/2]
    sin: torch.Tensor,  # [S, D/2]
    positions: torch.Tensor,  # [B, T] int32
    num_tokens: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    k_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    v_cache: torch.Tensor,  # [L, slots, H_kv, S, D], written
    plan: torch.Tensor,  # [B, 2L] uint8
) -> None:
    """The residual stream through every layer: what the five operations do in turn, bit for bit."""
    _check(x, layers[0].qkv)
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), (k_cache.stride(),)
    (batch, width), hidden = positions.shape, x.shape[1]
    assert x.shape[0] == batch * width and plan.shape == (batch, 2 * len(layers)), plan.shape
    assert plan.dtype == torch.uint8 and plan.is_contiguous(), (plan.dtype, plan.stride())
    for index in (positions, num_tokens, slots):
        assert index.dtype == torch.int32 and index.is_contiguous(), (index.dtype, index.stride())
    num_layers, _, kv_heads, cache_len, head_dim = k_cache.shape
    heads = layers[0].qkv.full.shape[0] // head_dim - 2 * kv_heads
    table = np.array([[_address(t) for t in layer] for layer in layers], np.int64)
    numba_layers.run_layers(
        table.ctypes.data, num_layers, x.data_ptr(), eps, cos.data_ptr(), sin.data_ptr(),
        positions.data_ptr(), num_tokens.data_ptr(), slots.data_ptr(), k_cache.data_ptr(),
        v_cache.data_ptr(), k_cache.stride(0) * 4, plan.data_ptr(), plan.shape[1], batch, width,
        hidden, heads, kv_heads, head_dim, cache_len, layers[0].down.full.shape[1],
    )  # fmt: skip


NUMBA = Ops(
    name="numba",
    norm_qkv_rope_append=norm_qkv_rope_append,
    attention=attention,
    linear_residual=linear_residual,
    norm_gated_mlp=norm_gated_mlp,
    norm_lm_head=norm_lm_head,
    sample=sample_ref,
    run_layers=run_layers,
)
