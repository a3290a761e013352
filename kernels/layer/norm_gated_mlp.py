"""Fourth launch of a layer: RMSNorm, gate and up projections, SwiGLU (Shazeer 2020).

    h = silu(rms_norm(x) @ W_gate^T) * (rms_norm(x) @ W_up^T)

Shapes: x [R, C], W_gate_up [2*F, C] (gate rows, then up rows) -> h [R, F]. Moves the bytes of
W_gate_up and R * (C + F) elements. The kernel multiplies x by the norm weight in float32 and
rounds to the weights' dtype, adds products and squares in float32 and applies the norm's scale to
the sums; h is rounded once. Rows planned at 8: gpu/tiles_int8.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.checks import assert_product, assert_vectors
from kernels.gpu.launch import BLOCK_ROWS, dependent_launch, matrix_constants, matrix_launch
from kernels.gpu.launch_table import MatrixLaunch
from kernels.gpu.tiles import (
    allow_next,
    any_row,
    load_norm,
    load_precisions,
    load_tile,
    wait_for_previous,
    weigh_columns,
)
from kernels.gpu.tiles_int8 import quantise_columns
from kernels.layer.planned_linear import planned_linear_ref
from kernels.layer.rms_norm import rms_norm_ref
from kernels.weight import Weight


def norm_gated_mlp_ref(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    gate_up: Weight,  # [2*F, C]
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return h [R, F]; rows of a sequence that skips `sublayer` are undefined."""
    normed = rms_norm_ref(x, norm_weight, eps)
    gate, up = planned_linear_ref(normed, gate_up, precisions, sublayer).chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _gate_and_up(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, N, K,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What `project_rows` returns, for a gate and an up tile that share the tile of x."""
    offs_k = tl.arange(0, BLOCK_K)
    gate = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_squares = tl.zeros((BLOCK_R,), tl.float32)
    gate_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    up_ptrs = gate_ptrs + N.to(tl.int64) * K
    x_ptrs = x_ptr + offs_r[None, :].to(tl.int64) * K + offs_k[:, None]
    norm = load_norm(norm_ptr, offs_k, K)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        w_gate = load_tile(gate_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        w_up = load_tile(up_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        x = load_tile(x_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K, "").to(tl.float32)
        sum_squares += tl.sum(x * x, axis=0)
        next_norm = load_norm(norm_ptr, k + BLOCK_K + offs_k, K)
        w_gate, x_gate = weigh_columns(w_gate, x, norm)
        w_up, x_up = weigh_columns(w_up, x, norm)
        gate = tl.dot(w_gate, x_gate, gate, input_precision="ieee")
        up = tl.dot(w_up, x_up, up, input_precision="ieee")
        norm = next_norm
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return gate, up, sum_squares


@triton.jit
def _gate_and_up_int8(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w_scale_ptr, offs_n, mask_n, offs_r, mask_r, N, K,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What `project_rows_int8` returns, for a gate and an up tile that share the tile of x."""
    offs_k = tl.arange(0, BLOCK_K)
    gate = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_squares = tl.zeros((BLOCK_R,), tl.float32)
    gate_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    up_ptrs = gate_ptrs + N.to(tl.int64) * K
    x_ptrs = x_ptr + offs_r[None, :].to(tl.int64) * K + offs_k[:, None]
    norm = load_norm(norm_ptr, offs_k, K)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        w_gate = load_tile(gate_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        w_up = load_tile(up_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        x = load_tile(x_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K, "").to(tl.float32)
        sum_squares += tl.sum(x * x, axis=0)
        next_norm = load_norm(norm_ptr, k + BLOCK_K + offs_k, K)
        x8, x_scale = quantise_columns(x * norm.to(tl.float32)[:, None])
        gate += tl.dot(w_gate, x8, out_dtype=tl.int32).to(tl.float32) * x_scale[None, :]
        up += tl.dot(w_up, x8, out_dtype=tl.int32).to(tl.float32) * x_scale[None, :]
        norm = next_norm
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    gate *= tl.load(w_scale_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    up *= tl.load(w_scale_ptr + N + offs_n, mask=mask_n, other=0.0)[:, None]
    return gate, up, sum_squares


@triton.jit
def _gate_and_up_planned(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, is_int8, offs_n, mask_n, offs_r, mask_r,
    N, K, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_INT8: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What `project_planned` does, for a gate and an up tile."""
    if not HAS_INT8:
        gate, up, sum_squares = _gate_and_up(
            x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, N, K,
            BLOCK_N, BLOCK_R, BLOCK_K, EVEN_K,
        )  # fmt: skip
    else:
        gate = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        sum_squares = tl.zeros((BLOCK_R,), tl.float32)
        if any_row(runs & ~is_int8):
            gate, up, sum_squares = _gate_and_up(
                x_ptr, norm_ptr, w_ptr, offs_n, mask_n, offs_r, mask_r, N, K,
                BLOCK_N, BLOCK_R, BLOCK_K, EVEN_K,
            )  # fmt: skip
        if any_row(is_int8):
            gate8, up8, sum_squares8 = _gate_and_up_int8(
                x_ptr, norm_ptr, w8_ptr, w8_scale_ptr, offs_n, mask_n, offs_r, is_int8, N, K,
                BLOCK_N, BLOCK_R, BLOCK_K, EVEN_K,
            )  # fmt: skip
            gate = tl.where(is_int8[None, :], gate8, gate)
            up = tl.where(is_int8[None, :], up8, up)
            sum_squares = tl.where(is_int8, sum_squares8, sum_squares)
    return gate, up, sum_squares


@triton.jit(do_not_specialize=["R", "T", "sublayer", "eps"])
def _norm_gated_mlp_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, precisions_ptr, h_ptr,
    stride_p, R, T, N, K, sublayer, eps,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_INT8: tl.constexpr, PDL: tl.constexpr,
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
    gate, up, sum_squares = _gate_and_up_planned(
        x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, precision == 8, offs_n, mask_n,
        offs_r, mask_r, N, K, BLOCK_N, BLOCK_R, BLOCK_K, HAS_INT8, EVEN_K,
    )  # fmt: skip
    allow_next(PDL)
    scale = tl.rsqrt(sum_squares / K + eps)[None, :]
    gate *= scale
    h = gate * tl.sigmoid(gate) * (up * scale)
    h_ptrs = h_ptr + offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


def norm_gated_mlp(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    gate_up: Weight,  # [2*F, C]
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    *,
    launch: MatrixLaunch | None = None,
) -> torch.Tensor:
    """Return h [R, F]; rows of a sequence that skips `sublayer` are undefined."""
    (num_rows, k), n = x.shape, gate_up.shape[0] // 2
    assert gate_up.shape[0] == 2 * n, gate_up.shape
    assert_vectors(x.dtype, k, norm_weight)
    assert_product(x, gate_up, precisions, sublayer)
    h = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    launch = launch or matrix_launch(x.device, "norm_gated_mlp", n, k, x.dtype)
    assert launch.split_k == 1, launch
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    _norm_gated_mlp_kernel[grid](
        *(x, norm_weight, *gate_up.tensors, precisions, h),
        *(precisions.stride(0), num_rows, num_rows // precisions.shape[0], n, k, sublayer, eps),
        **matrix_constants(launch, gate_up),
        **dependent_launch(x.device),
    )
    return h
