"""Accept: how much of a draft the model itself would have said.

    n      = length of the longest prefix of the draft that equals target[b, :]
    result = n, num_drafted[b], then target[b, 0..n] followed by -1

The draft is columns 1 to num_drafted[b] of token_ids[b]. target[b, t] is the model's own token
after the t-th verified row: the drafted tokens that agree are its tokens, and the row after the
last of them gives one more, which is the next input. A row without a sequence has num_drafted = -1
and accepts nothing.
Shapes: target [B, T], token_ids [B, W] with W >= T -> result [B, T + 2]. Moves B * (24*T + 12)
bytes. The result is one tensor so that the host learns all about a round in one copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain


def accept_ref(
    target: torch.Tensor,  # [B, T] int64: the model's token after each verified row
    token_ids: torch.Tensor,  # [B, W] int64: the verified tokens
    num_drafted: torch.Tensor,  # [B] int32, < T: the rest is padding
) -> torch.Tensor:
    """Return [B, T + 2] int64: number accepted, number drafted, the tokens of the round, -1."""
    width = target.shape[1]
    steps = torch.arange(width, device=target.device)
    agrees = (token_ids[:, 1:width] == target[:, :-1]) & (steps[:-1] < num_drafted[:, None])
    num_accepted = agrees.long().cumprod(-1).sum(-1, keepdim=True)
    tokens = torch.where(steps <= num_accepted, target, -1)
    return torch.cat((num_accepted, num_drafted[:, None].long(), tokens), dim=1)


@triton.jit(do_not_specialize=["T", "W"])
def _accept_kernel(  # type: ignore[no-untyped-def]
    target_ptr, token_ids_ptr, num_drafted_ptr, result_ptr,
    T, W,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    num_drafted = tl.load(num_drafted_ptr + b)
    # The host cannot check a count on the device without waiting: T keeps a wrong one in bounds.
    is_drafted = (offs_t < num_drafted) & (offs_t < T - 1)
    target = tl.load(target_ptr + b * T + offs_t, mask=mask_t, other=-1)
    draft = tl.load(token_ids_ptr + b * W + 1 + offs_t, mask=is_drafted, other=-1)
    agrees = is_drafted & (draft == target)
    # The last verified row has no drafted token after it, so there is always one to find.
    num_accepted = tl.min(tl.where(agrees, BLOCK_T, offs_t), axis=0)
    tokens = tl.where(offs_t <= num_accepted, target, -1)
    out_ptr = result_ptr + b * (T + 2)
    tl.store(out_ptr, num_accepted.to(tl.int64))
    tl.store(out_ptr + 1, num_drafted.to(tl.int64))
    tl.store(out_ptr + 2 + offs_t, tokens, mask=mask_t)


def accept(
    target: torch.Tensor,  # [B, T] int64: the model's token after each verified row
    token_ids: torch.Tensor,  # [B, W] int64: the verified tokens
    num_drafted: torch.Tensor,  # [B] int32, < T: the rest is padding
) -> torch.Tensor:
    """Return [B, T + 2] int64: number accepted, number drafted, the tokens of the round, -1."""
    (batch, width), columns = target.shape, token_ids.shape[1]
    assert 1 <= width <= columns and token_ids.shape[0] == batch, (target.shape, token_ids.shape)
    assert num_drafted.shape == (batch,), (num_drafted.shape, batch)
    assert_plain(torch.int64, target, token_ids)
    assert_plain(torch.int32, num_drafted)
    result = torch.empty(batch, width + 2, dtype=torch.int64, device=target.device)
    _accept_kernel[(batch,)](
        *(target, token_ids, num_drafted, result),
        *(width, columns),
        BLOCK_T=triton.next_power_of_2(width),
        num_warps=1,
    )
    return result
