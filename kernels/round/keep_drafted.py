"""Taking the token of a draft step, on the device.

    token_ids[b, num_drafted + 1] = drawn,  num_drafted += 1         where num_drafted < num_wanted
    num_wanted = num_drafted    after an end token, or where max softmax(logits) < stop_probability

Shapes: drawn [B], token_ids [B, W] (the newest token, then the draft), logits [B, V]. The token
that ends a draft is part of it: it will be verified. Moves a few bytes a sequence, and reads its
logits, 4*V bytes twice, where the plan has a stop_probability.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain
from kernels.gpu.launch import SAMPLE_BLOCK_V
from kernels.round.sample import top_probability_ref


def keep_drafted_ref(
    logits: torch.Tensor,  # [B, V] float32
    drawn: torch.Tensor,  # [B] int64
    token_ids: torch.Tensor,  # [B, W] int64, written
    num_drafted: torch.Tensor,  # [B] int32, written
    num_wanted: torch.Tensor,  # [B] int32, written
    end_ids: torch.Tensor,  # [B, E] int32, -1 is none
    stop_probability: torch.Tensor,  # [B] float32
) -> None:
    """Take the tokens of a draft step."""
    is_drafting = num_drafted < num_wanted
    column = (num_drafted + 1).clamp(max=token_ids.shape[1] - 1)[:, None].long()
    old = token_ids.gather(1, column)
    token_ids.scatter_(1, column, torch.where(is_drafting[:, None], drawn[:, None], old))
    num_drafted += is_drafting
    stops = (end_ids == drawn[:, None]).any(1)
    if stop_probability.any():
        stops |= top_probability_ref(logits) < stop_probability
    num_wanted.copy_(torch.where(is_drafting & stops, num_drafted, num_wanted))


@triton.jit
def _top_probability(row_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / sum exp(logit - max) of a row."""
    running_max = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
        running_max = tl.maximum(running_max, logits)
    row_max = tl.max(running_max, axis=0)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        logits = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
        total += tl.exp(logits - row_max)
    return 1 / tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["W"])
def _keep_drafted_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, drawn_ptr, token_ids_ptr, num_drafted_ptr, num_wanted_ptr, end_ids_ptr,
    stop_probability_ptr,
    V, W, E,
    BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    num_drafted = tl.load(num_drafted_ptr + b)
    num_wanted = tl.load(num_wanted_ptr + b)
    # All threads have read the counts before one of them writes.
    tl.debug_barrier()
    if num_drafted >= num_wanted:
        return
    drawn = tl.load(drawn_ptr + b)
    num_drafted += 1
    tl.store(token_ids_ptr + b * W + num_drafted, drawn, mask=num_drafted < W)
    tl.store(num_drafted_ptr + b, num_drafted)
    offs_e = tl.arange(0, BLOCK_E)
    end_ids = tl.load(end_ids_ptr + b * E + offs_e, mask=offs_e < E, other=-1)
    stops = tl.max((end_ids == drawn).to(tl.int32), axis=0) != 0
    stop_probability = tl.load(stop_probability_ptr + b)
    if stop_probability > 0:
        stops = stops | (_top_probability(logits_ptr + b * V, V, BLOCK_V) < stop_probability)
    if stops:
        tl.store(num_wanted_ptr + b, num_drafted)


def keep_drafted(
    logits: torch.Tensor,  # [B, V] float32
    drawn: torch.Tensor,  # [B] int64
    token_ids: torch.Tensor,  # [B, W] int64, written
    num_drafted: torch.Tensor,  # [B] int32, written
    num_wanted: torch.Tensor,  # [B] int32, written
    end_ids: torch.Tensor,  # [B, E] int32, -1 is none
    stop_probability: torch.Tensor,  # [B] float32
) -> None:
    """Take the tokens of a draft step."""
    (batch, vocab_size), columns, num_ends = logits.shape, token_ids.shape[1], end_ids.shape[1]
    assert drawn.shape == num_drafted.shape == num_wanted.shape == (batch,), (drawn.shape, batch)
    assert_plain(torch.int64, drawn, token_ids)
    assert_plain(torch.int32, num_drafted, num_wanted, end_ids)
    assert_plain(torch.float32, logits, stop_probability)
    _keep_drafted_kernel[(batch,)](
        *(logits, drawn, token_ids, num_drafted, num_wanted, end_ids, stop_probability),
        *(vocab_size, columns, num_ends),
        BLOCK_E=triton.next_power_of_2(num_ends),
        BLOCK_V=min(SAMPLE_BLOCK_V, max(128, triton.next_power_of_2(vocab_size))),
        num_warps=16,
    )
