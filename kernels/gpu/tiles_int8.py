"""The int8 x int8 path of the matrix kernels: 8-bit weights, activations quantised on the way.

    s_g = max_k |x_k| / 127        q_k = floor(x_k / s_g + 1/2)              for k in group g
    y_n = scale_n * sum_g s_g * sum_k q_k int8_nk

A group is the BLOCK_K activations of one row that a kernel loads at a time, with the norm weight
multiplied in: its scale needs no pass over the row beforehand, no other row has a part in it, and
one large activation spoils one group. The sum over k is exact in int32 and in the float32 that it
becomes; scales, the sum over groups and everything after it are float32. Halves round up, because
Triton has no rounding to even that its interpreter and all targets share.

A row at 8 of weights without an int8 form gets their own one. The host cannot refuse that without
waiting for the device, so not to ask for it is the caller's duty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.blocks import LEVELS
from kernels.gpu.tiles import any_row, load_norm, load_tile, project_rows
from kernels.weight import Weight

SMALLEST = 1e-30  # stands in for the largest activation of a group of zeros; its inverse is finite


def linear_int8_activations_ref(
    x: torch.Tensor,  # [R, K] float32, the norm weight multiplied in
    weight: Weight,  # [N, K]
    group: int,
) -> torch.Tensor:
    """x @ W^T [R, N] in 8 bits: quantised in the kernels' own float32 steps, added in float64."""
    assert weight.draft is not None, "the weights have no int8 form"
    assert x.dtype == torch.float32, x.dtype
    padding = (0, -x.shape[1] % group)
    groups = F.pad(x, padding).unflatten(1, (-1, group))  # [R, groups, group]
    codes = F.pad(weight.draft.codes.double(), padding)
    codes = codes.unflatten(1, (-1, group))  # [N, groups, group]
    largest = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST)
    inverse = torch.full_like(largest, LEVELS) / largest  # 127 / largest would round twice
    # Product and sum round to float32 once, as in a fused multiply-add.
    rounded = (groups.double() * inverse.double() + 0.5).float().floor()
    scale = largest.double() / LEVELS
    y = torch.einsum("rgk,ngk->rn", rounded.double() * scale, codes)
    return y * weight.draft.scale.double()


@triton.jit
def quantise_columns(x32):  # type: ignore[no-untyped-def]
    """x32 [BLOCK_K, BLOCK_R] in 8 bits, and the scale of each column [BLOCK_R].

    Division and multiply-add are the ones that round once: which value an activation becomes must
    not hang on a compiler's choice.
    """
    largest = tl.maximum(tl.max(tl.abs(x32), axis=0), 1e-30)  # SMALLEST
    inverse = tl.div_rn(127.0, largest)
    rounded = tl.floor(tl.fma(x32, inverse[None, :], 0.5))
    return rounded.to(tl.int8), largest * (1 / 127)


@triton.jit
def project_rows_int8(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w_scale_ptr, offs_n, mask_n, offs_r, mask_r, K, first_k, end_k,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What `project_rows` returns, with W [N, K] in 8 bits and its scale [N]."""
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_squares = tl.zeros((BLOCK_R,), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + first_k + offs_k[None, :]
    x_ptrs = x_ptr + offs_r[None, :].to(tl.int64) * K + first_k + offs_k[:, None]
    if HAS_NORM:
        norm = load_norm(norm_ptr, first_k + offs_k, end_k)
    for k in range(first_k, end_k, BLOCK_K):
        mask_k = offs_k < end_k - k
        w = load_tile(w_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        x = load_tile(x_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K, "").to(tl.float32)
        if HAS_NORM:
            sum_squares += tl.sum(x * x, axis=0)
            next_norm = load_norm(norm_ptr, k + BLOCK_K + offs_k, end_k)
            x *= norm.to(tl.float32)[:, None]
            norm = next_norm
        x8, x_scale = quantise_columns(x)
        acc += tl.dot(w, x8, out_dtype=tl.int32).to(tl.float32) * x_scale[None, :]
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    w_scale = tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)
    return acc * w_scale[:, None], sum_squares


@triton.jit
def project_planned(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, is_int8, offs_n, mask_n, offs_r, mask_r,
    K, first_k, end_k, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_INT8: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`project_rows` in the precision of each row; of a row that does not run, anything.

    w8 and w8_scale are looked at if HAS_INT8.
    A loop runs if any row needs it, and computes each row by itself: what a row gets does not
    depend on the precision of the others.
    """
    if not HAS_INT8:
        acc, sum_squares = project_rows(
            x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, K, first_k, end_k,
            BLOCK_N, BLOCK_R, BLOCK_K, HAS_NORM, EVEN_K,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        sum_squares = tl.zeros((BLOCK_R,), tl.float32)
        if any_row(runs & ~is_int8):
            acc, sum_squares = project_rows(
                x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, K, first_k, end_k,
                BLOCK_N, BLOCK_R, BLOCK_K, HAS_NORM, EVEN_K,
            )  # fmt: skip
        if any_row(is_int8):
            acc8, sum_squares8 = project_rows_int8(
                x_ptr, norm_ptr, w8_ptr, w8_scale_ptr, offs_n, mask_n, offs_r, is_int8,
                K, first_k, end_k, BLOCK_N, BLOCK_R, BLOCK_K, HAS_NORM, EVEN_K,
            )  # fmt: skip
            acc = tl.where(is_int8[None, :], acc8, acc)
            sum_squares = tl.where(is_int8, sum_squares8, sum_squares)
    return acc, sum_squares
