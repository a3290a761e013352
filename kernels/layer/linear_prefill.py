"""The other matrices of prefill: the library's GEMM, and nothing read back to the host.

The laws and the shapes are linear_residual_ref, norm_gated_mlp_ref and norm_lm_head_ref, and so is
the rounding. Of the precisions only 0 (skip) counts, and on the device: what
norm_qkv_rope_prefill.py says of 8 holds here too. A value for skipped rows comes as an argument of
a launch, by masked_fill: as a tensor that torch.where makes of a number it would be copied, and a
copy waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.layer.rms_norm import rms_norm
from kernels.weight import Weight


def linear_residual_prefill(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [C, K]
    residual: torch.Tensor,  # [R, C], updated in place
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
    counters: torch.Tensor,  # [n] int32, not needed
) -> None:
    """Add x @ W^T to the rows of the sequences that run `sublayer`."""
    y = weight.own.linear(x)
    skips = precisions[:, sublayer, None, None] == 0
    y.view(precisions.shape[0], -1, y.shape[1]).masked_fill_(skips, 0.0)  # [B, T, C]
    residual += y


def norm_gated_mlp_prefill(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    gate_up: Weight,  # [2*F, C]
    precisions: torch.Tensor,  # [B, P] uint8, not needed
    sublayer: int,
) -> torch.Tensor:
    """Return h [R, F]; rows of a sequence that skips `sublayer` are undefined."""
    gate, up = gate_up.own.linear(rms_norm(x, norm_weight, eps)).chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_lm_head_prefill(
    x: torch.Tensor,  # [R, C]
    norm_weight: torch.Tensor,  # [C]
    eps: float,
    lm_head: Weight,  # [V, C]
    precisions: torch.Tensor,  # [B, P] uint8, not needed
    sublayer: int,
) -> torch.Tensor:
    """Return logits [R, V] in float32."""
    return lm_head.own.linear(rms_norm(x, norm_weight, eps)).float()
