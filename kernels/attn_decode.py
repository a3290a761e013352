"""Decode attention, flash-decoding style (Dao et al. 2023), for 1 to 16 new tokens a sequence.

    o_t = softmax(q_t k_s^T / sqrt(D)  over s <= position_t) v_s

The law and the shapes are `attention_ref`. The cache is cut into splits of `SPLIT_KV` positions; a
program takes one split, one key/value head and a tile of 16 query rows, row = t * group + g, so
that the heads of a group and the tokens of a sequence share the loads of K and V. Scores, softmax
and sums are float32; softmax weights are rounded to the cache's dtype for the second dot. The last
program of a tile to arrive adds the splits up in their order. Reads the K and V of each sequence
once per tile of rows; partial sums cost 4 * (D + 2) bytes a row and split each way.

A split's size is fixed and a split or block masked for a row leaves it bit for bit unchanged, so a
row's result depends neither on T nor on B nor on the other rows' positions. The grid covers the
whole cache, so that it does not depend on lengths: programs past a sequence's end return at once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.launch import (
    BLOCK_ROWS,
    BLOCK_S,
    SPLIT_KV,
    assert_attention_operands,
    assert_counters,
)
from kernels.triton_tiles import softmax_step


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    q, k_base, v_base, position, first, last, scale,
    BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_KV: tl.constexpr,
):  # fmt: skip
    """Return unnormalised output, maximum and sum over SPLIT_KV cache positions from `first`."""
    BLOCK_R: tl.constexpr = q.shape[0]
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(first, tl.minimum(first + SPLIT_KV, last + 1), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        # The cache past the last token is uninitialised, and 0 * NaN is NaN.
        mask = (offs_s <= last)[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs_kv = offs_s[:, None] * HEAD_DIM + offs_d[None, :]
        k = tl.load(k_base + offs_kv, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        v = tl.load(v_base + offs_kv, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_R, BLOCK_S]
        scores = tl.where(offs_s[None, :] <= position[:, None], scores, float("-inf"))
        acc, running_max, running_sum = softmax_step(acc, running_max, running_sum, scores, v)
    return acc, running_max, running_sum


@triton.jit
def _combine_splits(  # type: ignore[no-untyped-def]
    partial_ptr, stats_ptr, offs_part, stride_split, num_splits, valid, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Fold the partial results of all splits together, in the order of the splits."""
    BLOCK_R: tl.constexpr = offs_part.shape[0]
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    for _ in range(num_splits):
        # Written by other programs: past the L1 of this one.
        stats_ptrs = stats_ptr + offs_part * 2
        split_max = tl.load(stats_ptrs, mask=valid, other=0.0, cache_modifier=".cg")
        split_sum = tl.load(stats_ptrs + 1, mask=valid, other=1.0, cache_modifier=".cg")
        part_ptrs = partial_ptr + offs_part[:, None] * BLOCK_D + offs_d[None, :]
        part = tl.load(part_ptrs, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(running_max, split_max)  # finite: split 0 holds position 0
        old_scale = tl.exp2(running_max - new_max)
        new_scale = tl.exp2(split_max - new_max)
        acc = acc * old_scale[:, None] + part * new_scale[:, None]
        running_sum = running_sum * old_scale + split_sum * new_scale
        running_max = new_max
        offs_part += stride_split
    return acc, running_sum


@triton.jit(do_not_specialize=["T", "GROUP", "sublayer", "scale"])
def _attn_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    positions_ptr,
    num_tokens_ptr,
    slots_ptr,
    plan_ptr,
    partial_ptr,
    stats_ptr,
    counter_ptr,
    o_ptr,
    stride_plan_b,
    T,
    H_KV,
    GROUP,
    S,
    sublayer,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT_KV: tl.constexpr,
):
    split, max_splits = tl.program_id(0), tl.num_programs(0)
    kv_head = tl.program_id(1) % H_KV
    b = tl.program_id(2)
    offs_r = tl.program_id(1) // H_KV * BLOCK_R + tl.arange(0, BLOCK_R)
    t = offs_r // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    num_tokens = tl.load(num_tokens_ptr + b)
    if tl.load(plan_ptr + b * stride_plan_b + sublayer) == 0:
        num_tokens = 0
    valid = (t < T) & (t < num_tokens)
    position = tl.load(positions_ptr + b * T + t, mask=valid, other=-1)
    last = tl.max(position, axis=0)
    num_splits = tl.maximum(last // SPLIT_KV + 1, 1)  # a tile without valid rows writes its zeros
    if split >= num_splits:
        return
    head = kv_head * GROUP + offs_r % GROUP
    offs_o = ((b * T + t).to(tl.int64) * (H_KV * GROUP) + head)[:, None] * HEAD_DIM + offs_d[
        None, :
    ]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offs_o, mask=valid[:, None] & mask_d, other=0.0)  # [BLOCK_R, BLOCK_D]
    slot = tl.load(slots_ptr + b).to(tl.int64)
    base = (slot * H_KV + kv_head) * S * HEAD_DIM
    acc, running_max, running_sum = _attend_split(
        q, k_cache_ptr + base, v_cache_ptr + base, position, split * SPLIT_KV, last, scale,
        BLOCK_D, HEAD_DIM, BLOCK_S, SPLIT_KV,
    )  # fmt: skip
    if num_splits > 1:
        unit = (b * H_KV + kv_head).to(tl.int64) * max_splits
        stride_split = T * GROUP
        offs_part = (unit + split) * stride_split + offs_r  # [BLOCK_R]
        part_ptrs = partial_ptr + offs_part[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(part_ptrs, acc, mask=valid[:, None])
        tl.store(stats_ptr + offs_part * 2, running_max, mask=valid)
        tl.store(stats_ptr + offs_part * 2 + 1, running_sum, mask=valid)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        counter_ptr += b * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") < num_splits - 1:
            return
        tl.debug_barrier()
        tl.store(counter_ptr, 0)
        acc, running_sum = _combine_splits(
            partial_ptr, stats_ptr, unit * stride_split + offs_r, stride_split, num_splits, valid,
            BLOCK_D,
        )  # fmt: skip
    o = acc / tl.where(valid, running_sum, 1.0)[:, None]  # padding rows: 0 / 1
    tl.store(o_ptr + offs_o, o.to(o_ptr.dtype.element_ty), mask=(t < T)[:, None] & mask_d)


def attn_decode(
    q: torch.Tensor,  # [R, H, D]
    k_cache: torch.Tensor,  # [slots, H_kv, S, D]
    v_cache: torch.Tensor,  # [slots, H_kv, S, D]
    positions: torch.Tensor,  # [B, T] int32, consecutive in a sequence
    num_tokens: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    plan: torch.Tensor,  # [B, 2L] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, zero before and after
) -> torch.Tensor:
    """Return o [R, H*D]; zero for padding rows and for sequences that skip `sublayer`."""
    batch, width = positions.shape
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, max_positions, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert_attention_operands(q, k_cache, v_cache, positions, num_tokens, slots, plan)
    block_d = max(16, triton.next_power_of_2(head_dim))
    max_splits = triton.cdiv(max_positions, SPLIT_KV)
    num_tiles = num_kv_heads * triton.cdiv(width * group, BLOCK_ROWS)
    assert_counters(counters, batch * num_tiles)
    num_partials = batch * num_kv_heads * max_splits * width * group
    partial = torch.empty(num_partials, block_d, dtype=torch.float32, device=q.device)
    stats = torch.empty(num_partials, 2, dtype=torch.float32, device=q.device)
    o = torch.empty(num_rows, num_heads * head_dim, dtype=q.dtype, device=q.device)
    _attn_decode_kernel[(max_splits, num_tiles, batch)](
        *(q, k_cache, v_cache, positions, num_tokens, slots, plan, partial, stats, counters, o),
        *(plan.stride(0), width, num_kv_heads, group, max_positions, sublayer),
        head_dim**-0.5 * math.log2(math.e),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_S=BLOCK_S,
        SPLIT_KV=SPLIT_KV,
        num_warps=4,
        num_stages=2,
    )
    return o
