"""Matrices in 8 bits, one scale an output row, for drafts.

    scale_n = max_k |W_nk| / 127        code_nk = round(W_nk / scale_n)
    y_n = scale_n * sum_k x_k code_nk

Only a draft reads them, so their rounding costs acceptance and never a token. On a CPU and in the
references the activations keep their dtype; on CUDA the kernels quantise them (gpu/tiles_int8.py).
"""

from __future__ import annotations

import torch

from kernels.blocks import LEVELS, Blocks
from kernels.weight import INT8, Dense, Int8, Weight

CHUNK_ELEMENTS = 1 << 18


def quantise_into(own: Dense | Blocks, codes: torch.Tensor) -> Int8:
    """The 8-bit form of a matrix [N, K]; its codes are written into `codes` [N, K] int8."""
    num_rows, num_columns = own.shape
    scale = torch.empty(num_rows, dtype=torch.float32, device=codes.device)
    # In pieces that stay in a processor's cache: three times as fast, and no large temporaries.
    step = max(1, CHUNK_ELEMENTS // num_columns)
    for first in range(0, num_rows, step):
        part = slice(first, first + step)
        rows = own.rows(part).float()
        largest = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))
        scale[part] = largest / LEVELS
        # A row of zeros has no scale.
        factor = torch.where(largest > 0, LEVELS / largest, 0.0)
        rounded = (rows * factor[:, None]).round_().clamp_(-LEVELS, LEVELS)
        codes[part] = rounded.to(torch.int8)
    return Int8(codes, scale)


def quantise(weight: Weight) -> Weight:
    """The same matrix with its 8-bit form added: N * K + 4 * N bytes more."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return weight._replace(draft=quantise_into(weight.own, codes))


def row_precisions(precisions: torch.Tensor, sublayer: int, num_rows: int) -> torch.Tensor:
    """The precision of `sublayer` for each of the rows [R] of a pass, from `precisions` [B, P]."""
    return precisions[:, sublayer].repeat_interleave(num_rows // precisions.shape[0])


def planned_linear_ref(
    x: torch.Tensor,  # [R, K]
    weight: Weight,  # [N, K]
    precisions: torch.Tensor,  # [B, P] uint8
    sublayer: int,
) -> torch.Tensor:
    """x @ W^T [R, N], each row with the form of W that its sequence's precision names."""
    y = weight.own.linear(x)
    is_int8 = row_precisions(precisions, sublayer, x.shape[0]) == INT8
    if is_int8.any():
        assert weight.draft is not None, "the weights have no int8 form"
        y = torch.where(is_int8[:, None], weight.draft.linear(x), y)
    return y
