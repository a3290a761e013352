"""The contract of round/allow.py in numpy: torch would start threads of its own beside the pool's,
and on a machine that is busy they wait for each other longer than a pass takes.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.round.allow import TokenMasks, place_of


def allow(logits: torch.Tensor, masks: TokenMasks, num_before: torch.Tensor) -> torch.Tensor:
    """Return the logits [R, V], -inf where the mask of the row's sequence says no."""
    num_bytes = masks.bits.shape[2]
    bits = masks.bits.numpy().reshape(-1, num_bytes)[place_of(masks, num_before).numpy()]
    bias = np.take(masks.bias.numpy(), bits.ravel(), axis=0).reshape(len(logits), -1)
    return torch.from_numpy(logits.numpy() + bias[:, : logits.shape[1]])
