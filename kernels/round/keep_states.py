"""Keeping what the last layer made: the router pools it, however much of a prompt was cached.

    states[slot_b, position_bt] = x_bt

Shapes: x [R, C] with R = B*T rows -> states [slots, S, C]. Moves 2*R*C elements. Padding rows are
written as well: the caller gives them positions that nobody reads, behind a sequence's valid length
or the last of the cache, which no prompt reaches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain
from kernels.operands import Rows

BLOCK_C = 1024


def keep_states_ref(
    x: torch.Tensor,  # [R, C]
    rows: Rows,
    states: torch.Tensor,  # [slots, S, C], written
) -> None:
    """Store the residual stream of a pass at its rows' positions."""
    states[rows.slots.long()[:, None], rows.positions.long()] = x.view(*rows.positions.shape, -1)


@triton.jit(do_not_specialize=["T"])
def _keep_states_kernel(  # type: ignore[no-untyped-def]
    x_ptr, positions_ptr, slots_ptr, states_ptr, T, S, C, BLOCK_C: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    slot = tl.load(slots_ptr + row // T).to(tl.int64)
    position = tl.load(positions_ptr + row)
    x = tl.load(x_ptr + row.to(tl.int64) * C + offs_c, mask=mask_c)
    tl.store(states_ptr + (slot * S + position) * C + offs_c, x, mask=mask_c)


def keep_states(
    x: torch.Tensor,  # [R, C]
    rows: Rows,
    states: torch.Tensor,  # [slots, S, C], written
) -> None:
    """Store the residual stream of a pass at its rows' positions."""
    (num_rows, channels), (_, max_positions, _) = x.shape, states.shape
    positions, slots = rows.positions, rows.slots
    assert positions.numel() == num_rows and slots.shape == positions.shape[:1], positions.shape
    assert states.shape[2] == channels, (states.shape, channels)
    assert_plain(x.dtype, x, states)
    assert_plain(torch.int32, positions, slots)
    _keep_states_kernel[(num_rows, triton.cdiv(channels, BLOCK_C))](
        *(x, positions, slots, states),
        *(positions.shape[1], max_positions, channels),
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
