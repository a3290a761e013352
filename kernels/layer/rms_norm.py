"""RMSNorm over the last axis:  y = x / sqrt(mean(x^2) + eps) * w   (Zhang & Sennrich 2019).

In a decode pass every projection that follows a norm computes it itself (one launch instead of
two). In prefill the projection is the library's, and the norm a launch of its own.

Shapes: x [R, C], w [C] -> y [R, C], a row to a program. Statistics in float32; the normalised row
is rounded to its dtype before the product with w, as the reference does. Moves 2*R*C + C elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import assert_plain


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., C], weight [C] -> [..., C]; statistics in at least float32, product in x.dtype."""
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    acc = acc * torch.rsqrt(acc.pow(2).mean(-1, keepdim=True) + eps)
    return acc.to(x.dtype) * weight


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, y_ptr, C, eps, BLOCK_C: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x = tl.load(x_ptr + row * C + offs_c, mask=mask_c, other=0.0)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, axis=0) / C + eps)
    normed = (x32 * scale).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + offs_c, (normed * weight).to(x.dtype), mask=mask_c)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [R, C], weight [C] -> [R, C]."""
    num_rows, channels = x.shape
    assert weight.shape == (channels,), (weight.shape, channels)
    assert_plain(x.dtype, x, weight)
    y = torch.empty_like(x)
    block_c = triton.next_power_of_2(channels)
    _rms_norm_kernel[(num_rows,)](
        *(x, weight, y, channels, eps), BLOCK_C=block_c, num_warps=4 if block_c <= 2048 else 8
    )
    return y
