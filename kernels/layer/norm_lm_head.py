"""Last launch of a pass: final RMSNorm and language-model head.

    logits = rms_norm(x) @ W^T

No plan skips the head: its column of the precisions, the last one, is 8 or 16. It is 0 in rows that
a draft step has no use for, whose logits are left as they were.
Shapes: x [R, C], W [V, C] -> logits [R, V] in float32 whatever the weights' dtype. Moves the bytes
of W, R*C elements in and 4*R*V bytes out. The kernel's sums stay in float32 to the end; the
reference rounds its logits to the weights' dtype first. Rows planned at 8: gpu/tiles_int8.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_product, assert_vectors
from kernels.gpu.launch import BLOCK_ROWS, dependent_launch, matrix_constants, matrix_launch
from kernels.gpu.launch_table import MatrixLaunch
from kernels.gpu.tiles import allow_next, any_row, load_precisions, wait_for_previous
from kernels.gpu.tiles_int8 import project_planned
from kernels.layer.planned_linear import planned_linear_ref
from kernels.layer.rms_norm import rms_norm_ref
from kernels.weight import Weight


def norm_lm_head_ref(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    lm_head: Weight,  # [V, C]
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """Return logits [R, V], float32 (float64 for float64 input)."""
    logits = planned_linear_ref(rms_norm_ref(x, norm_weight, eps), lm_head, precisions, sublayer)
    return logits.to(torch.promote_types(x.dtype, torch.float32))


@triton.jit(do_not_specialize=["R", "T", "sublayer", "eps"])
def _norm_lm_head_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, precisions_ptr, logits_ptr,
    stride_p, R, T, N, K, sublayer, eps,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_INT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    precision = load_precisions(precisions_ptr, stride_p, sublayer, T, offs_r, mask_r)
    runs = precision != 0
    if not any_row(runs):
        return
    acc, sum_squares = project_planned(  # [BLOCK_N, BLOCK_R], [BLOCK_R]
        x_ptr, norm_ptr, w_ptr, w8_ptr, w8_scale_ptr, runs, precision == 8, offs_n, mask_n,
        offs_r, mask_r, K, 0, K, BLOCK_N, BLOCK_R, BLOCK_K, True, HAS_INT8, EVEN_K,
    )  # fmt: skip
    allow_next(PDL)
    logits = acc * tl.rsqrt(sum_squares / K + eps)[None, :]
    logits_ptrs = logits_ptr + offs_r[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(logits_ptrs, logits, mask=mask_n[:, None] & runs[None, :])


def norm_lm_head(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    lm_head: Weight,  # [V, C]
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    *,
    launch: MatrixLaunch | None = None,
) -> torch.Tensor:
    """Return logits [R, V], float32."""
    (num_rows, k), n = x.shape, lm_head.shape[0]
    assert_vectors(x.dtype, k, norm_weight)
    assert_product(x, lm_head, precisions, sublayer)
    logits = torch.empty(num_rows, n, dtype=torch.float32, device=x.device)
    launch = launch or matrix_launch(x.device, "norm_lm_head", n, k, x.dtype)
    assert launch.split_k == 1, launch
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(n, launch.block_n))
    _norm_lm_head_kernel[grid](
        *(x, norm_weight, *lm_head.tensors, precisions, logits),
        *(precisions.stride(0), num_rows, num_rows // precisions.shape[0], n, k, sublayer, eps),
        **matrix_constants(launch, lm_head),
        **dependent_launch(x.device),
    )
    return logits
