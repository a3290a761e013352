"""A matrix operand of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """The stored forms of one matrix [N, K]; a plan's precision (16 = `full`) names the form.

    A record and not a bare tensor, so that a further form adds a field and no argument.
    """

    full: torch.Tensor  # [N, K], row-major, in the model's dtype
