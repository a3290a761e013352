"""First operation of a layer in prefill: what norm_qkv_rope.py computes, for a prompt's rows.

The law and the shapes are `norm_qkv_rope_append_ref`. Three launches: the norm, the library's GEMM,
for which a prompt has rows enough, and a kernel for all that follows. A program of that one takes
BLOCK_H heads of a row, so that a row's angles are read once for many heads. It moves
2*(H + 2*H_kv)*D elements a row, and rounds where the reference does: after the bias, after a head's
norm, after the product with the norm's weight, and after the rotation, which is in float32.

The host waits for nothing here, so a prompt's passes queue up. It can therefore not look at the
precisions: 0 skips a row, any other is the own form. Not to ask for 8 is the caller's duty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_qkv_operands
from kernels.layer.rms_norm import rms_norm
from kernels.operands import LayerCache, RotaryTable, Rows
from kernels.weight import LayerWeights

BLOCK_ELEMENTS = 1024  # of the heads of a program: 16 bytes for each thread of four warps


@triton.jit
def _norm_heads(y, is_query, is_rotated, d, q_norm_ptr, k_norm_ptr, eps, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """RMSNorm of each query and key head of y [BLOCK_H, BLOCK_D]; value heads pass."""
    q_weight = tl.load(q_norm_ptr + d, mask=d < HEAD_DIM, other=0.0)
    k_weight = tl.load(k_norm_ptr + d, mask=d < HEAD_DIM, other=0.0)
    weight = tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :]).to(tl.float32)
    y32 = y.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y32 * y32, axis=1) / HEAD_DIM + eps)
    normed = (y32 * scale[:, None]).to(y.dtype).to(tl.float32)
    return tl.where(is_rotated[:, None], (normed * weight).to(y.dtype), y)


@triton.jit
def _rotate(y, is_rotated, position, cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate neighbouring pairs of each query and key head of y [BLOCK_H, BLOCK_D]."""
    BLOCK_H: tl.constexpr = y.shape[0]
    BLOCK_D: tl.constexpr = y.shape[1]
    i = tl.arange(0, BLOCK_D // 2)
    mask_i = i < HEAD_DIM // 2
    offs = position * (HEAD_DIM // 2) + i
    cos = tl.load(cos_ptr + offs, mask=mask_i, other=1.0)[None, :]
    sin = tl.load(sin_ptr + offs, mask=mask_i, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(y.to(tl.float32), (BLOCK_H, BLOCK_D // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    rotated = tl.reshape(pairs, (BLOCK_H, BLOCK_D)).to(y.dtype)
    return tl.where(is_rotated[:, None], rotated, y)


@triton.jit(do_not_specialize=["T", "sublayer", "eps"])
def _norm_qkv_rope_prefill_kernel(  # type: ignore[no-untyped-def]
    y_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, num_tokens_ptr,
    slots_ptr, precisions_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    stride_p, T, H, H_KV, S, sublayer, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    seq = row // T
    runs = tl.load(precisions_ptr + seq * stride_p + sublayer) != 0
    # Padding rows may carry any position and slot: neither is looked at.
    if not (runs & (row % T < tl.load(num_tokens_ptr + seq))):
        return
    position = tl.load(positions_ptr + row)
    slot = tl.load(slots_ptr + seq).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask_d = (d < HEAD_DIM)[None, :]
    is_query = head < H
    is_rotated = head < H + H_KV
    is_head = head < H + 2 * H_KV
    cols = head[:, None] * HEAD_DIM + d[None, :]
    mask = is_head[:, None] & mask_d
    y_ptr += row.to(tl.int64) * ((H + 2 * H_KV) * HEAD_DIM)
    y = tl.load(y_ptr + cols, mask=mask, other=0.0)  # [BLOCK_H, BLOCK_D]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0)
        y = (y.to(tl.float32) + bias.to(tl.float32)).to(y.dtype)
    if HAS_QK_NORM:
        y = _norm_heads(y, is_query, is_rotated, d, q_norm_ptr, k_norm_ptr, eps, HEAD_DIM)
    y = _rotate(y, is_rotated, position, cos_ptr, sin_ptr, HEAD_DIM)
    q_ptr += row.to(tl.int64) * (H * HEAD_DIM)
    tl.store(q_ptr + cols, y, mask=is_query[:, None] & mask_d)
    is_key = is_rotated & ~is_query
    is_value = is_head & ~is_rotated
    kv_head = tl.where(is_value, head - H - H_KV, head - H)
    offs_kv = ((slot * H_KV + kv_head) * S + position)[:, None] * HEAD_DIM + d[None, :]
    tl.store(k_cache_ptr + offs_kv, y, mask=is_key[:, None] & mask_d)
    tl.store(v_cache_ptr + offs_kv, y, mask=is_value[:, None] & mask_d)


def norm_qkv_rope_prefill(
    x: torch.Tensor,  # [R, C]
    layer: LayerWeights,
    eps: float,
    rotary: RotaryTable,
    rows: Rows,
    cache: LayerCache,  # written
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return q [R, H, D] and append k, v of the valid rows of the sequences that run `sublayer`.

    q of a padding row, and of a sequence that skips `sublayer`, is undefined.
    """
    num_rows, width = x.shape[0], rows.positions.shape[1]
    num_kv_heads, max_positions, head_dim = cache.k.shape[1:]
    num_heads = layer.qkv.shape[0] // head_dim - 2 * num_kv_heads
    assert_qkv_operands(x, layer, rotary, rows, cache, precisions, sublayer)
    y = layer.qkv.own.linear(rms_norm(x, layer.attn_norm, eps))
    q = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype, device=x.device)
    block_d = triton.next_power_of_2(head_dim)
    block_h = max(1, BLOCK_ELEMENTS // block_d)
    _norm_qkv_rope_prefill_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_kv_heads, block_h))](
        *(y, layer.qkv_bias, layer.q_norm, layer.k_norm, *rotary),
        *(rows.positions, rows.num_tokens, rows.slots, precisions, q, *cache),
        *(precisions.stride(0), width, num_heads, num_kv_heads, max_positions, sublayer, eps),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_H=block_h,
        HAS_BIAS=layer.qkv_bias is not None,
        HAS_QK_NORM=layer.q_norm is not None,
        num_warps=4,
    )
    return q
