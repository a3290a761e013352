"""Third and fifth launch of a layer: projection back onto the residual stream.

    residual <- residual + x @ W^T

Shapes: x [R, K], W [C, K], residual [R, C], updated in place so that the rows of a sequence that
skips the sub-layer pass through for free. Moves the bytes of W and R * (K + 2*C) elements.
The kernel adds products and residual in float32 and rounds once, the reference rounds twice.
Rows planned at 8: gpu/tiles_int8.py.

Where K is longer than C is, too few tiles keep a GPU busy, and `SPLIT_K` programs share one: each
sums over its part of K, the last to arrive adds the sums up in the order of the parts. The parts
are the same for every number of rows; partial sums cost 4 * C bytes a row and part each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_counters, assert_plain, assert_product
from kernels.gpu.launch import BLOCK_ROWS, dependent_launch, matrix_constants, matrix_launch
from kernels.gpu.launch_table import MatrixLaunch
from kernels.gpu.tiles import allow_next, any_row, load_precisions, wait_for_previous
from kernels.gpu.tiles_int8 import project_planned
from kernels.layer.planned_linear import planned_linear_ref, row_precisions
from kernels.weight import Weight


def linear_residual_ref(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [C, K]
    residual: torch.Tensor,  # [R, C], updated in place
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, for a kernel that splits its work (ops.py)
) -> None:
    """Add x @ W^T to the rows of the sequences that run `sublayer`."""
    runs = row_precisions(precisions, sublayer, x.shape[0])[:, None] > 0
    residual += torch.where(runs, planned_linear_ref(x, weight, precisions, sublayer), 0.0)


@triton.jit
def _part_of_k(split, K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the part of a split begins and ends: whole tiles, but for the end of K."""
    if SPLIT_K == 1:
        first_k = 0
        end_k = K
    else:
        part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        first_k = split * part
        end_k = tl.minimum(first_k + part, K)
    return first_k, end_k


@triton.jit(do_not_specialize=["R", "T", "sublayer"])
def _linear_residual_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, w8_ptr, w8_scale_ptr, residual_ptr, precisions_ptr, part_ptr, counters_ptr,
    stride_p, R, T, N, K, sublayer,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    precision = load_precisions(precisions_ptr, stride_p, sublayer, T, offs_r, mask_r)
    runs = precision != 0
    if not any_row(runs):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    split = tl.program_id(2)
    first_k, end_k = _part_of_k(split, K, BLOCK_K, SPLIT_K)
    acc, _ = project_planned(  # [BLOCK_N, BLOCK_R]
        x_ptr, x_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, precision == 8, offs_n, mask_n, offs_r,
        mask_r, K, first_k, end_k, BLOCK_N, BLOCK_R, BLOCK_K, False, HAS_INT8, EVEN_K,
    )  # fmt: skip
    allow_next(PDL)
    offs = offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
    mask = mask_n[:, None] & runs[None, :]
    if SPLIT_K > 1:
        stride_part = R.to(tl.int64) * N
        tl.store(part_ptr + split * stride_part + offs, acc, mask=mask)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        counters_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu") < SPLIT_K - 1:
            return
        tl.debug_barrier()
        tl.store(counters_ptr, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for i in tl.static_range(SPLIT_K):
            # Written by other programs: past the L1 of this one.
            part_ptrs = part_ptr + i * stride_part + offs
            acc += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
    total = residual.to(tl.float32) + acc
    tl.store(residual_ptr + offs, total.to(residual_ptr.dtype.element_ty), mask=mask)


def linear_residual(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [C, K]
    residual: torch.Tensor,  # [R, C], updated in place
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, zero before and after
    *,
    launch: MatrixLaunch | None = None,
) -> None:
    """Add x @ W^T to the rows of the sequences that run `sublayer`."""
    (num_rows, k), n = x.shape, weight.shape[0]
    assert residual.shape == (num_rows, n), (residual.shape, x.shape, n)
    assert_plain(x.dtype, residual)
    assert_product(x, weight, precisions, sublayer)
    launch = launch or matrix_launch(x.device, "linear_residual", n, k, x.dtype)
    tiles = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    parts = None
    if launch.split_k > 1:
        assert_counters(counters, tiles[0] * tiles[1])
        parts = torch.empty(launch.split_k, num_rows, n, dtype=torch.float32, device=x.device)
    grid = (*tiles, launch.split_k)
    _linear_residual_kernel[grid](
        *(x, *weight.tensors, residual, precisions, parts, counters),
        *(precisions.stride(0), num_rows, num_rows // precisions.shape[0], n, k, sublayer),
        SPLIT_K=launch.split_k,
        **matrix_constants(launch, weight),
        **dependent_launch(x.device),
    )
