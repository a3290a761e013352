"""First launch of a layer: RMSNorm, Q/K/V projection, bias, Q/K norm, RoPE, cache append.

    [q; k; v] = rms_norm(x) @ W_qkv^T + b          q, k = rms_norm per head (Qwen3 only)
    (q_2i, q_2i+1) <- rotation by angle position * f_i of the pair, likewise k

Shapes: x [R, C] with R = B*T rows, W_qkv [(H + 2*H_kv)*D, C] -> q [R, H, D]; k and v are written
into the cache [slots, H_kv, S, D] at each row's position, where that is narrower rounded to its
dtype and cut at the largest finite value. Rotary pairs are neighbours (2i, 2i+1).
Moves the bytes of W_qkv and, per row, C + H*D + 2*H_kv*D elements. The kernel multiplies x by the
norm weight in float32 and rounds to the weights' dtype, adds products and squares in float32,
applies the norm's scale to the sums, and rounds once after the rotation. Rows planned at 8:
gpu/tiles_int8.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_qkv_operands
from kernels.gpu.launch import BLOCK_ROWS, dependent_launch, matrix_constants, qkv_launch
from kernels.gpu.launch_table import MatrixLaunch
from kernels.gpu.tiles import allow_next, any_row, load_precisions, wait_for_previous
from kernels.gpu.tiles_int8 import project_planned
from kernels.layer.planned_linear import planned_linear_ref
from kernels.layer.rms_norm import rms_norm_ref
from kernels.operands import LayerCache, RotaryTable, Rows
from kernels.weight import LayerWeights


def rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of x [R, heads, D] by cos, sin [R, D/2]; computed in float32."""
    acc = x.to(torch.promote_types(x.dtype, cos.dtype))
    even, odd = acc[..., 0::2], acc[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def norm_qkv_rope_append_ref(
    x: torch.Tensor,  # [R, C]
    layer: LayerWeights,
    eps: float,
    rotary: RotaryTable,
    rows: Rows,
    cache: LayerCache,  # written
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return q [R, H, D] and append k, v of the valid rows of the sequences that run `sublayer`."""
    num_kv_heads, head_dim = cache.k.shape[1], cache.k.shape[3]
    normed = rms_norm_ref(x, layer.attn_norm, eps)
    y = planned_linear_ref(normed, layer.qkv, precisions, sublayer)
    if layer.qkv_bias is not None:
        y = y + layer.qkv_bias
    y = y.unflatten(-1, (-1, head_dim))  # [R, H + 2*H_kv, D]
    num_heads = y.shape[1] - 2 * num_kv_heads
    q, k, v = y.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm_ref(q, layer.q_norm, eps), rms_norm_ref(k, layer.k_norm, eps)
    positions, width = rows.positions.flatten().long(), rows.positions.shape[1]
    cos, sin = rotary.cos[positions], rotary.sin[positions]
    q, k = rope_ref(q, cos, sin), rope_ref(k, cos, sin)
    is_valid = torch.arange(width, device=x.device) < rows.num_tokens[:, None]  # [B, T]
    kept = (is_valid & (precisions[:, sublayer, None] > 0)).flatten().nonzero().squeeze(-1)
    slots = rows.slots.long().repeat_interleave(width)
    for part, new in ((cache.k, k), (cache.v, v)):
        if part.dtype != new.dtype:  # beyond its largest, a score would be no number
            largest = torch.finfo(part.dtype).max
            new = new.clamp(-largest, largest).to(part.dtype)
        part[slots[kept], :, positions[kept]] = new[kept]
    return q


@triton.jit
def _norm_heads(  # type: ignore[no-untyped-def]
    y, head, d, mask_n, H, H_KV, q_norm_ptr, k_norm_ptr, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each query and key head of y [BLOCK_N, BLOCK_R]; value heads pass."""
    BLOCK_N: tl.constexpr = y.shape[0]
    BLOCK_R: tl.constexpr = y.shape[1]
    weight = tl.load(q_norm_ptr + d, mask=mask_n & (head < H), other=0.0).to(tl.float32)
    is_key = (head >= H) & (head < H + H_KV)
    weight += tl.load(k_norm_ptr + d, mask=mask_n & is_key, other=0.0).to(tl.float32)
    heads = tl.reshape(y, (BLOCK_N // BLOCK_D, BLOCK_D, BLOCK_R))
    scale = tl.rsqrt(tl.sum(heads * heads, axis=1) / HEAD_DIM + eps)
    normed = tl.reshape(heads * scale[:, None, :], (BLOCK_N, BLOCK_R)) * weight[:, None]
    return tl.where((head < H + H_KV)[:, None], normed, y)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    y, first_pair, position, mask_r, cos_ptr, sin_ptr, num_rotated,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate neighbouring pairs of the rows of y [BLOCK_N, BLOCK_R] in heads below num_rotated."""
    BLOCK_N: tl.constexpr = y.shape[0]
    BLOCK_R: tl.constexpr = y.shape[1]
    pairs = tl.permute(tl.reshape(y, (BLOCK_N // 2, 2, BLOCK_R)), (0, 2, 1))
    even, odd = tl.split(pairs)  # [BLOCK_N // 2, BLOCK_R]
    offs_pair = first_pair + tl.arange(0, BLOCK_N // 2)
    i = offs_pair % (BLOCK_D // 2)
    rotated = (i < HEAD_DIM // 2) & (offs_pair // (BLOCK_D // 2) < num_rotated)
    offsets = position[None, :] * (HEAD_DIM // 2) + i[:, None]
    mask = rotated[:, None] & mask_r[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(tl.permute(pairs, (0, 2, 1)), (BLOCK_N, BLOCK_R))


@triton.jit(do_not_specialize=["R", "T", "sublayer", "eps"])
def _norm_qkv_rope_append_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, cos_ptr,
    sin_ptr, positions_ptr, num_tokens_ptr, slots_ptr, precisions_ptr, q_ptr, k_cache_ptr,
    v_cache_ptr,
    stride_p, R, T, K, H, H_KV, S, sublayer, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, HAS_INT8: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    precision = load_precisions(precisions_ptr, stride_p, sublayer, T, offs_r, mask_r)
    runs = precision != 0
    if not any_row(runs):
        return
    # Before the loop, which hides their latency; padding rows may carry any position and slot.
    seq = offs_r // T
    valid = runs & (offs_r % T < tl.load(num_tokens_ptr + seq, mask=mask_r, other=0))
    position = tl.load(positions_ptr + offs_r, mask=valid, other=0)
    slot = tl.load(slots_ptr + seq, mask=valid, other=0).to(tl.int64)
    # Heads are BLOCK_D columns apart here, whatever HEAD_DIM is.
    first_col = tl.program_id(1) * BLOCK_N
    offs_n = first_col + tl.arange(0, BLOCK_N)
    head, d = offs_n // BLOCK_D, offs_n % BLOCK_D
    mask_n = (d < HEAD_DIM) & (head < H + 2 * H_KV)
    cols = head * HEAD_DIM + d
    acc, sum_squares = project_planned(  # [BLOCK_N, BLOCK_R], [BLOCK_R]
        x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, precision == 8, cols, mask_n,
        offs_r, mask_r, K, 0, K, BLOCK_N, BLOCK_R, BLOCK_K, True, HAS_INT8, EVEN_K,
    )  # fmt: skip
    allow_next(PDL)
    y = acc * tl.rsqrt(sum_squares / K + eps)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if HAS_QK_NORM:
        y = _norm_heads(y, head, d, mask_n, H, H_KV, q_norm_ptr, k_norm_ptr, eps, HEAD_DIM, BLOCK_D)
    y = _rotate(y, first_col // 2, position, valid, cos_ptr, sin_ptr, H + H_KV, HEAD_DIM, BLOCK_D)
    q_ptrs = q_ptr + offs_r[None, :].to(tl.int64) * (H * HEAD_DIM) + cols[:, None]
    is_query = mask_n & (head < H)
    y = y.to(q_ptr.dtype.element_ty)
    tl.store(q_ptrs, y, mask=is_query[:, None] & mask_r[None, :])
    is_key = mask_n & (head >= H) & (head < H + H_KV)
    is_value = mask_n & (head >= H + H_KV)
    kv_head = tl.where(is_value, head - H - H_KV, head - H)
    offs_kv = ((slot * H_KV)[None, :] + kv_head[:, None]) * S + position[None, :]
    offs_kv = offs_kv * HEAD_DIM + d[:, None]
    tl.store(k_cache_ptr + offs_kv, y, mask=is_key[:, None] & valid[None, :])
    tl.store(v_cache_ptr + offs_kv, y, mask=is_value[:, None] & valid[None, :])


def norm_qkv_rope_append(
    x: torch.Tensor,  # [R, C]
    layer: LayerWeights,
    eps: float,
    rotary: RotaryTable,
    rows: Rows,
    cache: LayerCache,  # written
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    *,
    launch: MatrixLaunch | None = None,
) -> torch.Tensor:
    """Return q [R, H, D] and append k, v of the valid rows of the sequences that run `sublayer`.

    q of a padding row, and of a sequence that skips `sublayer`, is undefined.
    """
    (num_rows, k), num_cols, has_norm = x.shape, layer.qkv.shape[0], layer.q_norm is not None
    num_kv_heads, max_positions, head_dim = cache.k.shape[1:]
    num_heads = num_cols // head_dim - 2 * num_kv_heads
    assert head_dim >= 8, head_dim
    assert_qkv_operands(x, layer, rotary, rows, cache, precisions, sublayer)
    q = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype, device=x.device)
    launch = launch or qkv_launch(x.device, head_dim, num_cols, k, x.dtype, has_norm)
    block_d = triton.next_power_of_2(head_dim)
    # A head's norm needs all of its columns in one tile.
    assert launch.split_k == 1 and (launch.block_n % block_d == 0 or not has_norm), launch
    num_tiles = triton.cdiv(num_cols // head_dim * block_d, launch.block_n)
    sizes = (num_rows, rows.positions.shape[1], k, num_heads, num_kv_heads, max_positions)
    _norm_qkv_rope_append_kernel[(triton.cdiv(num_rows, BLOCK_ROWS), num_tiles)](
        *(x, layer.attn_norm, *layer.qkv.tensors, layer.qkv_bias, layer.q_norm, layer.k_norm),
        *(*rotary, rows.positions, rows.num_tokens, rows.slots, precisions, q, *cache),
        *(precisions.stride(0), *sizes, sublayer, eps),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        HAS_BIAS=layer.qkv_bias is not None,
        HAS_QK_NORM=has_norm,
        **matrix_constants(launch, layer.qkv),
        **dependent_launch(x.device),
    )
    return q
