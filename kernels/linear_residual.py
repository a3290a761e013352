"""Third and fifth launch of a layer: projection back onto the residual stream.

    residual <- residual + x @ W^T

Shapes: x [R, K], W [C, K], residual [R, C], updated in place so that the rows of a sequence that
skips the sub-layer pass through for free. Moves the bytes of W and R * (K + 2*C) elements.
The kernel adds products and residual in float32 and rounds once, the reference rounds twice.
Rows planned at 8: triton_int8.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import BLOCK_ROWS, assert_plain, assert_weight, linear_residual_launch
from kernels.linear_int8 import planned_linear_ref, row_precisions
from kernels.triton_int8 import project_planned
from kernels.triton_tiles import any_row, load_precisions
from kernels.weight import Weight


def linear_residual_ref(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [C, K]
    residual: torch.Tensor,  # [R, C], updated in place
    plan: torch.Tensor,  # [B, 2L] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, for a kernel that splits its work (ops.py)
) -> None:
    """Add x @ W^T to the rows of the sequences that run `sublayer`."""
    runs = row_precisions(plan, sublayer, x.shape[0])[:, None] > 0
    residual += torch.where(runs, planned_linear_ref(x, weight, plan, sublayer), 0.0)


@triton.jit(do_not_specialize=["R", "T", "sublayer"])
def _linear_residual_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    w8_ptr,
    w8_scale_ptr,
    residual_ptr,
    plan_ptr,
    stride_plan_b,
    R,
    T,
    N,
    K,
    sublayer,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_INT8: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    precision = load_precisions(plan_ptr, stride_plan_b, sublayer, T, offs_r, mask_r)
    runs = precision != 0
    if not any_row(runs):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc, _ = project_planned(  # [BLOCK_N, BLOCK_R]
        x_ptr, x_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, precision == 8, offs_n, mask_n,
        offs_r, mask_r, K, BLOCK_N, BLOCK_R, BLOCK_K, False, HAS_INT8, EVEN_K,
    )  # fmt: skip
    residual_ptrs = residual_ptr + offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
    mask = mask_n[:, None] & runs[None, :]
    residual = tl.load(residual_ptrs, mask=mask, other=0.0)
    total = residual.to(tl.float32) + acc
    tl.store(residual_ptrs, total.to(residual_ptr.dtype.element_ty), mask=mask)


def linear_residual(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [C, K]
    residual: torch.Tensor,  # [R, C], updated in place
    plan: torch.Tensor,  # [B, 2L] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, for a kernel that splits its work (ops.py)
) -> None:
    """Add x @ W^T to the rows of the sequences that run `sublayer`."""
    (num_rows, k), n = x.shape, weight.full.shape[0]
    assert residual.shape == (num_rows, n), (residual.shape, x.shape, n)
    assert_plain(x.dtype, x, residual)
    assert_weight(weight, (n, k), x.dtype)
    assert_plain(torch.uint8, plan)
    launch = linear_residual_launch(n, k, x.dtype)
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    _linear_residual_kernel[grid](
        x,
        *weight,
        residual,
        plan,
        plan.stride(0),
        num_rows,
        num_rows // plan.shape[0],
        n,
        k,
        sublayer,
        **launch.constants(weight),
    )
