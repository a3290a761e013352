"""The rows of a round's passes, made on the device: the host need not look at drafted tokens.

A round's buffers hold, for each sequence, its newest token and then the draft in `token_ids`
[B, W], the position of the first of these, how many tokens are drafted so far, and how many are
wanted (keep_drafted.py counts them):

    draft_rows      column num_drafted of the sequences that want more, and the slot's precisions
    verify_rows     columns 0 .. T-1, of which 1 + num_drafted are valid

A row that holds no sequence has num_drafted = -1: it is padding in every pass. The precisions of a
row that does not draft are all zeros, so that kernels pass it by. Each moves a few bytes per
sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain
from kernels.operands import Rows


def draft_rows_ref(
    token_ids: torch.Tensor,  # [B, W] int64
    first: torch.Tensor,  # [B] int32: position of column 0
    num_drafted: torch.Tensor,  # [B] int32
    num_wanted: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    slot_precisions: torch.Tensor,  # [slots, P] uint8
) -> tuple[Rows, torch.Tensor]:
    """The rows of the next draft step, T = 1, and their precisions [B, P] uint8."""
    is_drafting = num_drafted < num_wanted
    column = num_drafted.clamp(0, token_ids.shape[1] - 1)
    positions = first + column
    precisions = torch.where(is_drafting[:, None], slot_precisions.index_select(0, slots), 0)
    newest = token_ids.gather(1, column[:, None].long())
    next_position = positions.long() + 1
    rows = Rows(newest, positions[:, None], is_drafting.int(), slots, next_position)
    return rows, precisions


def verify_rows_ref(
    token_ids: torch.Tensor,  # [B, W] int64
    first: torch.Tensor,  # [B] int32: position of column 0
    num_drafted: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    width: int,
    max_positions: int,
) -> Rows:
    """The rows of a verify pass over T = `width` columns; padding ends at the cache's last place.

    Padding rows are computed and never looked at; their positions must exist all the same.
    """
    steps = torch.arange(width, dtype=torch.int32, device=first.device)
    positions = (first[:, None] + steps).clamp(max=max_positions - 1)
    newest = token_ids[:, :width].contiguous()
    next_position = (first[:, None] + steps + 1).long().flatten()
    return Rows(newest, positions, num_drafted + 1, slots, next_position)


@triton.jit(do_not_specialize=["W"])
def _draft_rows_kernel(  # type: ignore[no-untyped-def]
    token_ids_ptr, first_ptr, num_drafted_ptr, num_wanted_ptr, slots_ptr, slot_precisions_ptr,
    newest_ptr, position_ptr, num_tokens_ptr, next_position_ptr, precisions_ptr,
    W, P,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    num_drafted = tl.load(num_drafted_ptr + b)
    is_drafting = num_drafted < tl.load(num_wanted_ptr + b)
    column = tl.minimum(tl.maximum(num_drafted, 0), W - 1)
    position = tl.load(first_ptr + b) + column
    tl.store(newest_ptr + b, tl.load(token_ids_ptr + b.to(tl.int64) * W + column))
    tl.store(position_ptr + b, position)
    tl.store(num_tokens_ptr + b, is_drafting.to(tl.int32))
    tl.store(next_position_ptr + b, position.to(tl.int64) + 1)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    precisions_ptrs = slot_precisions_ptr + tl.load(slots_ptr + b).to(tl.int64) * P + offs_p
    precisions = tl.where(is_drafting, tl.load(precisions_ptrs, mask=mask_p, other=0), 0)
    tl.store(precisions_ptr + b.to(tl.int64) * P + offs_p, precisions, mask=mask_p)


@triton.jit(do_not_specialize=["W", "T", "S"])
def _verify_rows_kernel(  # type: ignore[no-untyped-def]
    token_ids_ptr, first_ptr, num_drafted_ptr, newest_ptr, position_ptr, num_tokens_ptr,
    next_position_ptr,
    W, T, S,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    position = tl.load(first_ptr + b) + offs_t
    tokens = tl.load(token_ids_ptr + b * W + offs_t, mask=mask_t)
    tl.store(newest_ptr + b * T + offs_t, tokens, mask=mask_t)
    tl.store(position_ptr + b * T + offs_t, tl.minimum(position, S - 1), mask=mask_t)
    tl.store(next_position_ptr + b * T + offs_t, position.to(tl.int64) + 1, mask=mask_t)
    tl.store(num_tokens_ptr + b, tl.load(num_drafted_ptr + b) + 1)


def draft_rows(
    token_ids: torch.Tensor,  # [B, W] int64
    first: torch.Tensor,  # [B] int32: position of column 0
    num_drafted: torch.Tensor,  # [B] int32
    num_wanted: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    slot_precisions: torch.Tensor,  # [slots, P] uint8
) -> tuple[Rows, torch.Tensor]:
    """The rows of the next draft step, T = 1, and their precisions [B, P] uint8."""
    (batch, columns), num_precisions = token_ids.shape, slot_precisions.shape[1]
    assert_plain(torch.int64, token_ids)
    assert_plain(torch.int32, first, num_drafted, num_wanted, slots)
    assert_plain(torch.uint8, slot_precisions)
    rows = _empty_rows(token_ids, slots, 1)
    precisions = torch.empty(batch, num_precisions, dtype=torch.uint8, device=token_ids.device)
    _draft_rows_kernel[(batch,)](
        *(token_ids, first, num_drafted, num_wanted, slots, slot_precisions),
        *(rows.token_ids, rows.positions, rows.num_tokens, rows.next_position, precisions),
        *(columns, num_precisions),
        BLOCK_P=triton.next_power_of_2(num_precisions),
        num_warps=1,
    )
    return rows, precisions


def verify_rows(
    token_ids: torch.Tensor,  # [B, W] int64
    first: torch.Tensor,  # [B] int32: position of column 0
    num_drafted: torch.Tensor,  # [B] int32
    slots: torch.Tensor,  # [B] int32
    width: int,
    max_positions: int,
) -> Rows:
    """The rows of a verify pass over T = `width` columns, positions clipped to the cache."""
    batch, columns = token_ids.shape
    assert 1 <= width <= columns, (width, columns)
    assert_plain(torch.int64, token_ids)
    assert_plain(torch.int32, first, num_drafted, slots)
    rows = _empty_rows(token_ids, slots, width)
    _verify_rows_kernel[(batch,)](
        *(token_ids, first, num_drafted),
        *(rows.token_ids, rows.positions, rows.num_tokens, rows.next_position),
        *(columns, width, max_positions),
        BLOCK_T=triton.next_power_of_2(width),
        num_warps=1,
    )
    return rows


def _empty_rows(token_ids: torch.Tensor, slots: torch.Tensor, width: int) -> Rows:
    """The rows of a pass of T = `width` over token_ids [B, W], to be filled in."""
    batch = token_ids.shape[0]

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=token_ids.device)

    newest, next_position = empty(torch.int64, batch, width), empty(torch.int64, batch * width)
    return Rows(
        newest, empty(torch.int32, batch, width), empty(torch.int32, batch), slots, next_position
    )
