"""Nearest anchor: from a prompt's pooled state to its draft plan, written as precisions.

    cosine_n   = anchor_n . total / |total|                     n = 0 .. N-1, at most 1
    anchor     = argmax_n cosine_n,  similarity = cosine_anchor
    other      = max of cosine_n over anchors of another plan than the best anchor's
    plan       = default_plan  if  1 - other < min_ratio * (1 - similarity),  else the anchor's
    precisions[b] = plan_precisions[plan]

`total` is the sum over the prompt's tokens of the states after the final RMSNorm: the feature is
their mean, and dividing by the count does not change the direction. The test is the ratio of the
distances (1 - other) / (1 - similarity) against min_ratio, without a division, so that a prompt on
its anchor passes. Without an anchor of another plan `other` is -inf, and the test passes. A total
without a direction (a norm of zero, that is under 2^-63, or a sum of squares that is not finite)
has cosine 0 with every anchor: similarity 0, anchor 0, and always the default plan.

Shapes: total [B, C], anchors [N, C], plan_precisions [P, W], precisions [B, W] -> record [B, 5],
which is all that a host has to copy; `Nearest` names its columns. Everything is float32, indices
included. Moves 4 * B * N * C bytes, less what the sequences of a batch share in the L2 cache. A
program takes BLOCK_ANCHORS anchors of one sequence; the last one of a sequence to arrive reads all
its cosines and decides. Neither B nor the order of arrival changes a bit of a result, and equal
anchors have equal cosines (in the reference up to rounding), of which the first wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain

MAX_ANCHORS = 4096  # the last arriver holds all cosines in registers
BLOCK_ANCHORS = 4  # with BLOCK_CHANNELS: 16 KiB in flight a program, eight 16-byte loads a thread
BLOCK_CHANNELS = 1024
MAX_PLANS = 1 << 24  # float32 holds every index below
MIN_NORM = tl.constexpr(2.0**-63)  # the square of anything less is subnormal, which GPUs may flush


class Nearest(NamedTuple):
    """What was chosen for each sequence, and how clearly: `Nearest(*record.unbind(-1))`."""

    plan: torch.Tensor  # [B]: the plan of the best anchor, or default_plan where rejected
    anchor: torch.Tensor  # [B]: the best anchor, the lowest index among equals
    similarity: torch.Tensor  # [B]: its cosine
    other: torch.Tensor  # [B]: the best cosine among anchors of another plan, or -inf
    is_chosen: torch.Tensor  # [B]: 1, or 0 where rejected, also if default_plan is the anchor's


def nearest_anchor_ref(
    total: torch.Tensor,  # [B, C]
    anchors: torch.Tensor,  # [N, C], unit rows
    anchor_plans: torch.Tensor,  # [N] int32, rows of plan_precisions
    plan_precisions: torch.Tensor,  # [P, W] uint8
    default_plan: int,
    min_ratio: float,
    precisions: torch.Tensor,  # [B, W] uint8
) -> torch.Tensor:
    """Choose a plan for each sequence and write its row into `precisions`."""
    norm = total.square().sum(-1, keepdim=True).sqrt()
    has_direction = (norm >= MIN_NORM.value) & (norm < float("inf"))
    cosines = torch.where(has_direction, (total @ anchors.T) / norm, 0.0).clamp_(max=1.0)  # [B, N]
    similarity, anchor = cosines.max(-1)  # the first maximum
    nearest_plan = anchor_plans.index_select(0, anchor)
    is_same = anchor_plans == nearest_plan[:, None]
    other = cosines.masked_fill(is_same, float("-inf")).amax(-1)
    is_chosen = (1 - other >= min_ratio * (1 - similarity)) & has_direction[:, 0]
    plan = nearest_plan.where(is_chosen, default_plan)
    precisions.copy_(plan_precisions.index_select(0, plan))
    return torch.stack([plan, anchor, similarity, other, is_chosen], -1)


@triton.jit
def _anchor_cosines(total_ptr, anchors_ptr, offs_n, N, C, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the cosines of a block of anchors with `total`, and whether that has a direction."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = (offs_n < N)[:, None]
    anchor_ptrs = anchors_ptr + offs_n[:, None].to(tl.int64) * C + offs_c[None, :]
    dots = tl.zeros((offs_n.shape[0], BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask_c = offs_c < C - start
        total = tl.load(total_ptr + start + offs_c, mask=mask_c, other=0.0)
        anchors = tl.load(anchor_ptrs + start, mask=mask_n & mask_c[None, :], other=0.0)
        dots += anchors * total[None, :]  # [BLOCK_N, BLOCK_C]
        squares += total * total
    norm = tl.sqrt_rn(tl.sum(squares, axis=0))
    has_direction = (norm >= MIN_NORM) & (norm < float("inf"))
    cosines = tl.div_rn(tl.sum(dots, axis=1), norm)
    return tl.where(has_direction, tl.minimum(cosines, 1.0), 0.0), has_direction


# A row of precisions may lie at any byte: its alignment must not make another kernel.
@triton.jit(do_not_specialize=["precisions_ptr", "N", "W", "default_plan", "min_ratio"])
def _nearest_anchor_kernel(  # type: ignore[no-untyped-def]
    total_ptr, anchors_ptr, anchor_plans_ptr, plan_precisions_ptr, cosines_ptr, counter_ptr,
    record_ptr, precisions_ptr,
    N, C, W, default_plan, min_ratio,
    ALL_ANCHORS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cosines, has_direction = _anchor_cosines(total_ptr + b * C, anchors_ptr, offs_n, N, C, BLOCK_C)
    cosines_ptr += b * N
    tl.store(cosines_ptr + offs_n, cosines, mask=offs_n < N)
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    counter_ptr += b
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") < tl.num_programs(1) - 1:
        return
    tl.debug_barrier()
    tl.store(counter_ptr, 0)
    offs_n = tl.arange(0, ALL_ANCHORS)
    mask_n = offs_n < N
    # Written by other programs: past the L1 of this one.
    cosines = tl.load(cosines_ptr + offs_n, mask=mask_n, other=float("-inf"), cache_modifier=".cg")
    plans = tl.load(anchor_plans_ptr + offs_n, mask=mask_n, other=0)
    similarity = tl.max(cosines, axis=0)
    anchor = tl.min(tl.where(cosines == similarity, offs_n, N - 1), axis=0)
    plan = tl.load(anchor_plans_ptr + anchor)
    other = tl.max(tl.where(plans == plan, float("-inf"), cosines), axis=0)
    is_chosen = (1 - other >= min_ratio * (1 - similarity)) & has_direction
    plan = tl.where(is_chosen, plan, default_plan)
    record_ptr += b * 5
    tl.store(record_ptr, plan.to(tl.float32))
    tl.store(record_ptr + 1, anchor.to(tl.float32))
    tl.store(record_ptr + 2, similarity)
    tl.store(record_ptr + 3, other)
    tl.store(record_ptr + 4, is_chosen.to(tl.float32))
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    row = tl.load(plan_precisions_ptr + plan.to(tl.int64) * W + offs_w, mask=mask_w)
    tl.store(precisions_ptr + b * W + offs_w, row, mask=mask_w)


def nearest_anchor_triton(
    total: torch.Tensor,  # [B, C] float32
    anchors: torch.Tensor,  # [N, C] float32, unit rows
    anchor_plans: torch.Tensor,  # [N] int32, rows of plan_precisions: unchecked, on the device
    plan_precisions: torch.Tensor,  # [P, W] uint8
    default_plan: int,
    min_ratio: float,
    precisions: torch.Tensor,  # [B, W] uint8
) -> torch.Tensor:
    """Choose a plan for each sequence and write its row into `precisions`; never waits."""
    (batch, channels), (num_anchors, _), (num_plans, width) = (
        tensor.shape for tensor in (total, anchors, plan_precisions)
    )
    assert 1 <= num_anchors <= MAX_ANCHORS and channels >= 1, anchors.shape
    assert anchors.shape == (num_anchors, channels), (anchors.shape, total.shape)
    assert anchor_plans.shape == (num_anchors,), (anchor_plans.shape, anchors.shape)
    assert precisions.shape == (batch, width), (precisions.shape, batch, width)
    assert 0 <= default_plan < num_plans <= MAX_PLANS, (default_plan, num_plans)
    assert_plain(torch.float32, total, anchors)
    assert_plain(torch.int32, anchor_plans)
    assert_plain(torch.uint8, plan_precisions, precisions)
    device = total.device
    cosines = torch.empty(batch, num_anchors, dtype=torch.float32, device=device)
    counter = torch.zeros(batch, dtype=torch.int32, device=device)
    record = torch.empty(batch, len(Nearest._fields), dtype=torch.float32, device=device)
    # Sequences vary fastest, so that those of a batch find a block of anchors in the L2 cache.
    _nearest_anchor_kernel[(batch, triton.cdiv(num_anchors, BLOCK_ANCHORS))](
        *(total, anchors, anchor_plans, plan_precisions, cosines, counter, record, precisions),
        *(num_anchors, channels, width, default_plan, min_ratio),
        ALL_ANCHORS=triton.next_power_of_2(num_anchors),
        BLOCK_N=BLOCK_ANCHORS,
        BLOCK_C=min(BLOCK_CHANNELS, triton.next_power_of_2(channels)),
        BLOCK_W=triton.next_power_of_2(width),
        num_warps=4,
    )
    return record
