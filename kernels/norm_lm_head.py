"""Last launch of a pass: final RMSNorm and language-model head.

    logits = rms_norm(x) @ W^T

Shapes: x [R, C], W [V, C] -> logits [R, V] in float32 whatever the weights' dtype. Moves the bytes
of W, R*C elements in and 4*R*V bytes out. The kernel's sums stay in float32 to the end; the
reference rounds its logits to the weights' dtype first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.launch import BLOCK_ROWS, assert_plain, lm_head_launch
from kernels.rms_norm import rms_norm_ref
from kernels.triton_tiles import project_rows
from kernels.weight import Weight


def norm_lm_head_ref(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    lm_head: Weight,  # [V, C]
) -> torch.Tensor:
    """Return logits [R, V], float32 (float64 for float64 input)."""
    logits = F.linear(rms_norm_ref(x, norm_weight, eps), lm_head.full)
    return logits.to(torch.promote_types(x.dtype, torch.float32))


@triton.jit(do_not_specialize=["R", "eps"])
def _norm_lm_head_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptr,
    logits_ptr,
    R,
    N,
    K,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc, sum_squares = project_rows(  # [BLOCK_N, BLOCK_R], [BLOCK_R]
        x_ptr,
        norm_ptr,
        w_ptr,
        offs_n,
        mask_n,
        offs_r,
        mask_r,
        K,
        BLOCK_N,
        BLOCK_R,
        BLOCK_K,
        True,
        EVEN_K,
    )
    logits = acc * tl.rsqrt(sum_squares / K + eps)[None, :]
    logits_ptrs = logits_ptr + offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(logits_ptrs, logits, mask=mask_n[:, None] & mask_r[None, :])


def norm_lm_head(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    lm_head: Weight,  # [V, C]
) -> torch.Tensor:
    """Return logits [R, V], float32."""
    w = lm_head.full
    num_rows, k = x.shape
    n = w.shape[0]
    assert w.shape == (n, k) and norm_weight.shape == (k,), (w.shape, norm_weight.shape)
    assert_plain(x.dtype, x, w, norm_weight)
    logits = torch.empty(num_rows, n, dtype=torch.float32, device=x.device)
    launch = lm_head_launch(k, w.dtype)
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    _norm_lm_head_kernel[grid](
        x,
        norm_weight,
        w,
        logits,
        num_rows,
        n,
        k,
        eps,
        **launch.constants(k),
    )
    return logits
