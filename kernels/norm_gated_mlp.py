"""Fourth launch of a layer: RMSNorm, gate and up projections, SwiGLU (Shazeer 2020).

    h = silu(rms_norm(x) @ W_gate^T) * (rms_norm(x) @ W_up^T)

Shapes: x [R, C], W_gate_up [2*F, C] (gate rows, then up rows) -> h [R, F]. Moves the bytes of
W_gate_up and R * (C + F) elements. The kernel multiplies x by the norm weight in float32 and
rounds to the weights' dtype, adds products and squares in float32 and applies the norm's scale to
the sums; h is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import BLOCK_ROWS, assert_plain, gated_mlp_launch
from kernels.rms_norm import rms_norm_ref
from kernels.triton_tiles import load_tile, rows_that_run, weigh_columns
from kernels.weight import Weight


def norm_gated_mlp_ref(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    gate_up: Weight,  # [2*F, C]
    plan: torch.Tensor,  # [B, 2L] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return h [R, F]; rows of a sequence that skips `sublayer` hold nothing to be used."""
    gate, up = F.linear(rms_norm_ref(x, norm_weight, eps), gate_up.full).chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit(do_not_specialize=["R", "T", "sublayer", "eps"])
def _norm_gated_mlp_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptr,
    plan_ptr,
    h_ptr,
    stride_plan_b,
    R,
    T,
    N,
    K,
    sublayer,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    runs = rows_that_run(plan_ptr, stride_plan_b, sublayer, T, offs_r, mask_r)
    if tl.max(runs.to(tl.int32), axis=0) == 0:
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    gate = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_squares = tl.zeros((BLOCK_R,), tl.float32)
    gate_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    up_ptrs = gate_ptrs + N.to(tl.int64) * K
    x_ptrs = x_ptr + offs_r[None, :].to(tl.int64) * K + offs_k[:, None]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        w_gate = load_tile(gate_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        w_up = load_tile(up_ptrs, mask_n[:, None], mask_k[None, :], EVEN_K, "evict_first")
        x = load_tile(x_ptrs, mask_r[None, :], mask_k[:, None], EVEN_K, "").to(tl.float32)
        sum_squares += tl.sum(x * x, axis=0)
        norm = tl.load(norm_ptr + k + offs_k, mask=mask_k, other=0.0)
        w_gate, x_gate = weigh_columns(w_gate, x, norm)
        w_up, x_up = weigh_columns(w_up, x, norm)
        gate = tl.dot(w_gate, x_gate, gate, input_precision="ieee")
        up = tl.dot(w_up, x_up, up, input_precision="ieee")
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
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
    plan: torch.Tensor,  # [B, 2L] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return h [R, F]; rows of a sequence that skips `sublayer` hold nothing to be used."""
    w = gate_up.full
    num_rows, k = x.shape
    n = w.shape[0] // 2
    assert w.shape == (2 * n, k) and norm_weight.shape == (k,), (w.shape, norm_weight.shape)
    assert_plain(x.dtype, x, w, norm_weight)
    assert_plain(torch.uint8, plan)
    h = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    launch = gated_mlp_launch(n, k, w.dtype)
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    _norm_gated_mlp_kernel[grid](
        x,
        norm_weight,
        w,
        plan,
        h,
        plan.stride(0),
        num_rows,
        num_rows // plan.shape[0],
        n,
        k,
        sublayer,
        eps,
        **launch.constants(k),
    )
    return h
