"""RMSNorm over the last axis:  y = x / sqrt(mean(x^2) + eps) * w   (Zhang & Sennrich 2019).

Every projection that follows a norm computes it itself (one launch instead of two), so this file
holds only the formula that those operations share.
"""

from __future__ import annotations

import torch


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., C], weight [C] -> [..., C]; statistics in at least float32, product in x.dtype."""
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    acc = acc * torch.rsqrt(acc.pow(2).mean(-1, keepdim=True) + eps)
    return acc.to(x.dtype) * weight
