"""Matrices in 8 bits, one scale an output row, for drafts.

    scale_n = max_k |W_nk| / 127        int8_nk = round(W_nk / scale_n)
    y_n = scale_n * sum_k x_k int8_nk

Only a draft reads them, so their rounding costs acceptance and never a token. On a CPU and in the
references the activations keep their dtype; on CUDA the kernels quantise them (gpu/tiles_int8.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.weight import Weight

INT8_PRECISION = 8
LEVELS = 127  # symmetric: -128 stays unused
CHUNK_ELEMENTS = 1 << 18


def quantise_into(full: torch.Tensor, int8: torch.Tensor, scale: torch.Tensor) -> None:
    """Write the 8-bit form of full [N, K] into int8 [N, K] and scale [N] float32."""
    # In pieces that stay in a processor's cache: three times as fast, and no large temporaries.
    step = max(1, CHUNK_ELEMENTS // full.shape[1])
    for first in range(0, full.shape[0], step):
        rows = full[first : first + step].float()
        largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
        scale[first : first + step] = largest / LEVELS
        # A row of zeros has no scale.
        factor = torch.where(largest > 0, LEVELS / largest, 0.0)
        rounded = (rows * factor[:, None]).round_().clamp_(-LEVELS, LEVELS)
        int8[first : first + step] = rounded.to(torch.int8)


def quantise(weight: Weight) -> Weight:
    """The same matrix with its 8-bit form added: N * K + 4 * N bytes more."""
    int8 = torch.empty_like(weight.full, dtype=torch.int8)
    scale = torch.empty(weight.full.shape[0], device=weight.full.device)
    quantise_into(weight.full, int8, scale)
    return weight._replace(int8=int8, scale=scale)


def row_precisions(plan: torch.Tensor, sublayer: int, num_rows: int) -> torch.Tensor:
    """The plan's precision of `sublayer` for each of the rows [R] of a pass."""
    return plan[:, sublayer].repeat_interleave(num_rows // plan.shape[0])


def planned_linear_ref(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [N, K]
    plan: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """x @ W^T [R, N], each row with the form of W that its sequence's plan names."""
    y = F.linear(x, weight.full)
    is_int8 = row_precisions(plan, sublayer, x.shape[0]) == INT8_PRECISION
    if is_int8.any():
        assert weight.int8 is not None and weight.scale is not None, "the weights have no int8 form"
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        y8 = F.linear(x, weight.int8.to(x.dtype)).to(acc_dtype) * weight.scale
        y = torch.where(is_int8[:, None], y8.to(y.dtype), y)
    return y
