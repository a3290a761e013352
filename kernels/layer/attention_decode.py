"""Decode attention, flash-decoding style (Dao et al. 2023), for 1 to 16 new tokens a sequence.

The law and the shapes are `attention_ref`. The blocks of `BLOCK_S` cache positions are dealt out to
`NUM_SPLITS` programs in turn; a program takes its blocks for one key/value head and a tile of 16
query rows, row = t * group + g, so that the heads of a group and the tokens of a sequence share the
loads of K and V. Scores, softmax and sums are float32; softmax weights are rounded to the cache's
dtype for the second dot. The last program of a tile to arrive adds the partial results up in their
order. Reads the K and V of each sequence once per tile of rows; partial results cost 4 * (D + 2)
bytes a row, head and program each way.

Which program takes which block is fixed, and a block or a partial result that is masked for a row
leaves it bit for bit unchanged, so a row's result depends neither on T nor on B nor on the other
rows' positions. The number of programs is a model's and not a length's: those that a sequence is
too short for return at once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.checks import assert_attention_operands, assert_counters, assert_plain
from kernels.gpu.launch import BLOCK_ROWS, decode_launch, dependent_launch
from kernels.gpu.launch_table import DecodeLaunch
from kernels.gpu.tiles import allow_next, softmax_step, wait_for_previous
from kernels.operands import LayerCache, Rows


@triton.jit
def _attend_blocks(  # type: ignore[no-untyped-def]
    q, k_base, v_base, position, split, last, scale,
    BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Return unnormalised output, maximum and sum over every NUM_SPLITS-th block from `split`."""
    BLOCK_R: tl.constexpr = q.shape[0]
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(split * BLOCK_S, last + 1, NUM_SPLITS * BLOCK_S):
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
def _repeat(x, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [N] one time after the other, [COUNT * N]."""
    N: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :], (COUNT, N)), (COUNT * N,))


@triton.jit
def _combine_splits(  # type: ignore[no-untyped-def]
    part_ptr, max_ptr, sum_ptr, offs_r, num_rows, num_live, valid,
    BLOCK_D: tl.constexpr, NUM_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return output and sum over the first `num_live` splits, added in their order.

    What lies beyond the live splits, and splits that saw nothing of a row, have weight and sum 0
    and add exactly nothing. The loads of a chunk of splits wait for no other load, and all bypass
    the L1: other programs wrote what they read.
    """
    BLOCK_R: tl.constexpr = offs_r.shape[0]
    offs_split, offs_d = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    num_parts = tl.where(valid, num_live, 0)  # [BLOCK_R]
    mask = offs_split[:, None] < num_parts[None, :]
    offs = offs_split[:, None] * num_rows + offs_r[None, :]  # [NUM_SPLITS, BLOCK_R]
    all_max = tl.load(max_ptr + offs, mask=mask, other=float("-inf"), cache_modifier=".cg")
    all_sum = tl.load(sum_ptr + offs, mask=mask, other=0.0, cache_modifier=".cg")
    row_max = tl.where(valid, tl.max(all_max, axis=0), 0.0)  # finite: split 0 holds position 0
    row_sum = tl.sum(tl.exp2(all_max - row_max[None, :]) * all_sum, axis=0)
    # Rows of a chunk lie one split after the other, so that a thread has all splits of its rows.
    num_parts, row_max, offs_r = (
        _repeat(num_parts, CHUNK), _repeat(row_max, CHUNK), _repeat(offs_r, CHUNK),
    )  # fmt: skip
    chunk = tl.arange(0, CHUNK * BLOCK_R) // BLOCK_R
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for first in range(0, num_live, CHUNK):
        has_part = first + chunk < num_parts
        offs_part = (first + chunk) * num_rows + offs_r
        part_ptrs = part_ptr + offs_part[:, None] * BLOCK_D + offs_d[None, :]
        part = tl.load(part_ptrs, mask=has_part[:, None], other=0.0, cache_modifier=".cg")
        part_max = tl.load(
            max_ptr + offs_part, mask=has_part, other=float("-inf"), cache_modifier=".cg"
        )
        part *= tl.exp2(part_max - row_max)[:, None]
        acc += tl.sum(tl.reshape(part, (CHUNK, BLOCK_R, BLOCK_D)), axis=0)
    return acc, row_sum


@triton.jit(do_not_specialize=["T", "GROUP", "sublayer", "scale"])
def _attention_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_cache_ptr, v_cache_ptr, positions_ptr, num_tokens_ptr, slots_ptr, precisions_ptr,
    part_ptr, max_ptr, sum_ptr, counters_ptr, o_ptr,
    stride_p, T, H_KV, GROUP, S, sublayer, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    NUM_SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    split, max_splits = tl.program_id(0), tl.num_programs(0)
    # Tiles of a key head run side by side: they read the same keys and values.
    num_tiles = tl.num_programs(1) // H_KV
    kv_head = tl.program_id(1) // num_tiles
    b = tl.program_id(2)
    offs_r = tl.program_id(1) % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    t = offs_r // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    num_tokens, slot = tl.load(num_tokens_ptr + b), tl.load(slots_ptr + b).to(tl.int64)
    if tl.load(precisions_ptr + b * stride_p + sublayer) == 0:
        num_tokens = 0
    valid = (t < T) & (t < num_tokens)
    position = tl.load(positions_ptr + b * T + t, mask=valid, other=-1)
    last = tl.max(position, axis=0)
    # A tile without valid rows has one live program, which writes its zeros.
    num_live = tl.maximum(tl.minimum(last // BLOCK_S + 1, NUM_SPLITS), 1)
    if split >= num_live:
        return
    head = kv_head * GROUP + offs_r % GROUP
    offs_o = ((b * T + t).to(tl.int64) * (H_KV * GROUP) + head)[:, None] * HEAD_DIM
    offs_o += offs_d[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offs_o, mask=valid[:, None] & mask_d, other=0.0)  # [BLOCK_R, BLOCK_D]
    base = (slot * H_KV + kv_head) * S * HEAD_DIM
    acc, running_max, running_sum = _attend_blocks(
        q, k_cache_ptr + base, v_cache_ptr + base, position, split, last, scale,
        BLOCK_D, HEAD_DIM, BLOCK_S, NUM_SPLITS,
    )  # fmt: skip
    allow_next(PDL)
    if num_live > 1:
        # The partial results of a key head: [max_splits, num_rows, BLOCK_D] and [.., num_rows].
        num_rows = T * GROUP
        unit = (b * H_KV + kv_head).to(tl.int64) * (max_splits * num_rows)
        part_ptr += unit * BLOCK_D
        max_ptr += unit
        sum_ptr += unit
        offs_part = split * num_rows + offs_r  # [BLOCK_R]
        part_ptrs = part_ptr + offs_part[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(part_ptrs, acc, mask=valid[:, None])
        tl.store(max_ptr + offs_part, running_max, mask=valid)
        tl.store(sum_ptr + offs_part, running_sum, mask=valid)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        counters_ptr += b * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu") < num_live - 1:
            return
        tl.debug_barrier()
        tl.store(counters_ptr, 0)
        acc, running_sum = _combine_splits(
            part_ptr, max_ptr, sum_ptr, offs_r, num_rows, num_live, valid,
            BLOCK_D, NUM_SPLITS, CHUNK,
        )  # fmt: skip
    o = acc / tl.where(valid, running_sum, 1.0)[:, None]  # padding rows: 0 / 1
    tl.store(o_ptr + offs_o, o.to(o_ptr.dtype.element_ty), mask=(t < T)[:, None] & mask_d)


def attention_decode(
    q: torch.Tensor,  # [R, H, D]
    cache: LayerCache,
    rows: Rows,
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, zero before and after
    *,
    launch: DecodeLaunch | None = None,
) -> torch.Tensor:
    """Return o [R, H*D]; zero for padding rows and for sequences that skip `sublayer`."""
    batch, width = rows.positions.shape
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, max_positions, _ = cache.k.shape
    group = num_heads // num_kv_heads
    assert_plain(q.dtype, q)
    assert_attention_operands(q, cache, rows, precisions, sublayer)
    launch = launch or decode_launch(q.device, head_dim, q.dtype)
    block_d, num_splits = max(16, triton.next_power_of_2(head_dim)), launch.num_splits(num_kv_heads)
    max_splits = min(num_splits, triton.cdiv(max_positions, launch.block_s))
    num_tiles = num_kv_heads * triton.cdiv(width * group, BLOCK_ROWS)
    assert_counters(counters, batch * num_tiles)
    num_parts = batch * num_kv_heads * max_splits * width * group
    parts = torch.empty(num_parts, block_d, dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty(num_parts, dtype=torch.float32, device=q.device) for _ in "ms")
    o = torch.empty(num_rows, num_heads * head_dim, dtype=q.dtype, device=q.device)
    _attention_decode_kernel[(max_splits, num_tiles, batch)](
        *(q, *cache, rows.positions, rows.num_tokens, rows.slots, precisions),
        *(parts, maxima, sums, counters, o),
        *(precisions.stride(0), width, num_kv_heads, group, max_positions, sublayer),
        head_dim**-0.5 * math.log2(math.e),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_S=launch.block_s,
        NUM_SPLITS=num_splits,
        CHUNK=min(num_splits, max(1, 512 // block_d)),  # 64 registers a thread hold it
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **dependent_launch(q.device),
    )
    return o
