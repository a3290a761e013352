"""Prefill attention: FlashAttention-2 (Dao 2023) of a chunk of new tokens over the cache so far.

The law and the shapes are `attention_ref`. A program takes a tile of tokens of one sequence and
one query head, and walks the cache from position 0 to the tile's last. Scores, softmax and sums
are float32; softmax weights are rounded to the cache's dtype for the second dot. 4*D operations a
pair of query and key, half of the pairs skipped by causality; K and V are read once per tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.checks import assert_attention_operands, assert_plain
from kernels.gpu.launch import prefill_launch
from kernels.gpu.launch_table import PrefillLaunch
from kernels.gpu.tiles import softmax_step
from kernels.operands import LayerCache, Rows


@triton.jit
def _attend_blocks(  # type: ignore[no-untyped-def]
    acc, running_max, running_sum, q, k_base, v_base, position, first, end, last, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Fold cache positions first .. end - 1 into the state; a mask only where causality cuts."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    for start in range(first, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offs_kv = offs_n[:, None] * HEAD_DIM + offs_d[None, :]
        # The cache past the last token is uninitialised, and 0 * NaN is NaN.
        mask = mask_d & (offs_n <= last)[:, None] if IS_MASKED else mask_d
        k = tl.load(k_base + offs_kv, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_base + offs_kv, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if IS_MASKED:
            scores = tl.where(offs_n[None, :] <= position[:, None], scores, float("-inf"))
        acc, running_max, running_sum = softmax_step(acc, running_max, running_sum, scores, v)
    return acc, running_max, running_sum


@triton.jit(do_not_specialize=["T", "GROUP", "sublayer", "scale"])
def _attention_prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_cache_ptr, v_cache_ptr, positions_ptr, num_tokens_ptr, slots_ptr, precisions_ptr,
    o_ptr,
    stride_p, T, GROUP, S, sublayer, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Late tiles attend to the most positions: start them first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    H = tl.num_programs(1)
    b = tl.program_id(2)
    offs_t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    num_tokens = tl.load(num_tokens_ptr + b)
    if tl.load(precisions_ptr + b * stride_p + sublayer) == 0:
        num_tokens = 0
    valid = (offs_t < T) & (offs_t < num_tokens)
    offs_o = ((b * T + offs_t).to(tl.int64) * H + head)[:, None] * HEAD_DIM + offs_d[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offs_o, mask=valid[:, None] & mask_d, other=0.0)  # [BLOCK_M, BLOCK_D]
    position = tl.load(positions_ptr + b * T + offs_t, mask=valid, other=-1)
    last = tl.max(position, axis=0)
    # Positions that every valid token of the tile sees, in whole blocks; 0 for an empty tile.
    first_position = tl.min(tl.where(valid, position, last), axis=0)
    num_seen = (first_position + 1) // BLOCK_N * BLOCK_N
    slot = tl.load(slots_ptr + b, mask=last >= 0, other=0).to(tl.int64)
    base = (slot * (H // GROUP) + head // GROUP) * S * HEAD_DIM
    k_base, v_base = k_cache_ptr + base, v_cache_ptr + base
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc, running_max, running_sum = _attend_blocks(
        acc, running_max, running_sum, q, k_base, v_base, position, 0, num_seen, last, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    acc, running_max, running_sum = _attend_blocks(
        acc, running_max, running_sum, q, k_base, v_base, position, num_seen, last + 1, last, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    o = tl.where(valid[:, None], acc / tl.where(valid, running_sum, 1.0)[:, None], 0.0)
    tl.store(o_ptr + offs_o, o.to(o_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & mask_d)


def attention_prefill(
    q: torch.Tensor,  # [R, H, D]
    cache: LayerCache,
    rows: Rows,
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, not needed
    *,
    launch: PrefillLaunch | None = None,
) -> torch.Tensor:
    """Return o [R, H*D]; zero for padding rows and for sequences that skip `sublayer`."""
    batch, width = rows.positions.shape
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, max_positions, _ = cache.k.shape
    group = num_heads // num_kv_heads
    assert_plain(q.dtype, q)
    assert_attention_operands(q, cache, rows, precisions, sublayer)
    o = torch.empty(num_rows, num_heads * head_dim, dtype=q.dtype, device=q.device)
    launch = launch or prefill_launch(q.device, head_dim, q.dtype)
    _attention_prefill_kernel[(triton.cdiv(width, launch.block_m), num_heads, batch)](
        *(q, *cache, rows.positions, rows.num_tokens, rows.slots, precisions, o),
        *(precisions.stride(0), width, group, max_positions, sublayer),
        head_dim**-0.5 * math.log2(math.e),
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return o
