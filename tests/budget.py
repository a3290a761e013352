"""The error budget of a kernel: twice the error of plain torch in the same dtype.

Inputs are rounded to the dtype first and then promoted, so that all three results (kernel,
reference, reference in float64) come from the same numbers and no tolerance is picked by hand.
Kernels accumulate in float32 whatever their inputs' dtype, hence the term in float32 roundings:
one each for the order of a sum, a scale, an activation and a product.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from operands import with_tensors

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

T = TypeVar("T")


def promote(value: T) -> Any:
    """The same argument in float64: tensors and records of floats; anything else as it is."""
    return with_tensors(value, lambda t: t.double() if t.is_floating_point() else t)


def assert_within_budget(
    out: torch.Tensor, low: torch.Tensor, high: torch.Tensor, name: str = ""
) -> None:
    """err(kernel) <= 2 * err(reference) + four float32 roundings of the largest value."""
    assert out.shape == low.shape == high.shape, (out.shape, low.shape, high.shape)
    assert out.dtype == low.dtype, (out.dtype, low.dtype)
    assert not out.isnan().any(), f"{name}: NaN in the kernel's result"
    if out.numel() == 0:
        return
    error = (out.double() - high).abs().max().item()
    reference = (low.double() - high).abs().max().item()
    budget = 2 * reference + 4 * torch.finfo(torch.float32).eps * high.abs().max().item()
    print(f"{name} error {error:.3g}, reference {reference:.3g}, {error / budget:.2f} of budget")
    assert error <= budget, (name, error, reference, budget)
