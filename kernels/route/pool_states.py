"""Pooled states: the sum of a prompt's normalised states, whose direction is its feature.

    scale_t  = 1 / sqrt(mean_c(x_tc^2) + eps)                  t = 0 .. n-1
    total_c  = w_c * sum_t(x_tc * scale_t)                     the sum over t of rms_norm(x_t)

x_t is the residual stream after the last layer and w the weight of the final RMSNorm. Nothing is
rounded to the model's dtype on the way. A NaN or an infinity anywhere makes the total not finite,
which has no direction for `nearest_anchor`; no tokens make zeros, which have none either.

Shapes: states [n, C], norm_weight [C] of the same dtype -> total [C] float32. Two launches: scales,
a tile of tokens to a program, then sums over POOL_TOKENS tokens of a few channels; the last program
of a block of channels to arrive adds those sums up. Reads the states twice, the second time from
the L2 cache where they fit there, and moves 4 * C bytes a POOL_TOKENS tokens each way.

A tile's shape comes from C alone and a sum starts at a multiple of POOL_TOKENS, so a total has the
same bits whenever the states have, in whatever order the programs arrive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain

POOL_TOKENS = 256  # of one partial sum
SCALE_TILE = 4096  # states in flight of a program of the first launch; of the second, 128 x 64
BLOCK_TOKENS = 128
BLOCK_CHANNELS = 64  # 128 bytes of a token, a whole line of the cache, where states have 16 bits
BLOCK_PARTIALS = 32  # partial sums that the last arriver reads at a time


def pool_states_ref(
    states: torch.Tensor,  # [n, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
) -> torch.Tensor:
    """Return the total [C], in at least float32."""
    x = states.to(torch.promote_types(states.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale).sum(0) * norm_weight.to(x.dtype)


@triton.jit(do_not_specialize=["n", "eps"])
def _token_scales_kernel(  # type: ignore[no-untyped-def]
    states_ptr, scales_ptr, n, C, eps, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.arange(0, BLOCK_C)
    mask_t = offs_t < n
    x_ptrs = states_ptr + offs_t[:, None] * C + offs_c[None, :]
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask_c = offs_c < C - start
        x = tl.load(x_ptrs + start, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        x32 = x.to(tl.float32)  # [BLOCK_T, BLOCK_C]
        squares += x32 * x32
    scales = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)
    tl.store(scales_ptr + offs_t, scales, mask=mask_t)


@triton.jit(do_not_specialize=["n"])
def _pool_states_kernel(  # type: ignore[no-untyped-def]
    states_ptr, scales_ptr, norm_ptr, partial_ptr, counter_ptr, total_ptr,
    n, C,
    POOL_TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first = tl.program_id(1) * POOL_TOKENS
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(first, tl.minimum(first + POOL_TOKENS, n), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < n
        scales = tl.load(scales_ptr + offs_t, mask=mask_t, other=0.0)
        x_ptrs = states_ptr + offs_t[:, None].to(tl.int64) * C + offs_c[None, :]
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        acc += x.to(tl.float32) * scales[:, None]  # [BLOCK_T, BLOCK_C]
    own_ptrs = partial_ptr + tl.program_id(1).to(tl.int64) * C + offs_c
    tl.store(own_ptrs, tl.sum(acc, axis=0), mask=mask_c)
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    counter_ptr += tl.program_id(0)
    num_partials = tl.num_programs(1)
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") < num_partials - 1:
        return
    tl.debug_barrier()
    tl.store(counter_ptr, 0)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < num_partials)[:, None] & mask_c[None, :]
        partial_ptrs = partial_ptr + offs_p[:, None].to(tl.int64) * C + offs_c[None, :]
        # Written by other programs: past the L1 of this one.
        sums += tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    norm = tl.load(norm_ptr + offs_c, mask=mask_c, other=0.0)
    tl.store(total_ptr + offs_c, tl.sum(sums, axis=0) * norm.to(tl.float32), mask=mask_c)


def pool_states(
    states: torch.Tensor,  # [n, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
) -> torch.Tensor:
    """Return the total [C] float32; never waits."""
    num_tokens, channels = states.shape
    assert channels >= 1 and norm_weight.shape == (channels,), (states.shape, norm_weight.shape)
    assert_plain(states.dtype, states, norm_weight)
    device, f32 = states.device, torch.float32
    block_c = min(SCALE_TILE // 2, triton.next_power_of_2(channels))
    block_t = SCALE_TILE // block_c
    scales = torch.empty(num_tokens, dtype=f32, device=device)
    # A prompt of no tokens, too, has a program that writes its zeros.
    num_partials = max(1, triton.cdiv(num_tokens, POOL_TOKENS))
    num_blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    partial = torch.empty(num_partials, channels, dtype=f32, device=device)
    counter = torch.zeros(num_blocks, dtype=torch.int32, device=device)
    total = torch.empty(channels, dtype=f32, device=device)
    _token_scales_kernel[(max(1, triton.cdiv(num_tokens, block_t)),)](
        *(states, scales, num_tokens, channels, eps),
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=4,
    )
    # Blocks of channels vary fastest, so that programs side by side read whole tokens.
    _pool_states_kernel[(num_blocks, num_partials)](
        *(states, scales, norm_weight, partial, counter, total, num_tokens, channels),
        POOL_TOKENS=POOL_TOKENS,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_C=BLOCK_CHANNELS,
        BLOCK_P=BLOCK_PARTIALS,
        num_warps=8,
    )
    return total
