"""One piece of memory for many tensors: a pass of the model reads it from end to end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

ALIGNMENT = 256  # bytes: every tensor starts at a cache line and at what vector loads want
HUGE_PAGE = 2 << 20  # bytes


class Arena:
    """Memory for tensors of so many bytes, undefined until they are written.

    Raises ValueError where there is not so much memory.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        self._memory = _allocate(sum(map(_padded, sizes)), device)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor; those that are taken must be of the sizes asked for, in any order."""
        start, size = self._used, math.prod(shape) * dtype.itemsize
        self._used += _padded(size)
        assert self._used <= self._memory.numel(), (self._used, self._memory.numel())
        return self._memory[start : start + size].view(dtype).view(*shape)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        if device.type != "cpu":
            return torch.empty(num_bytes, device=device, dtype=torch.uint8)
        # numpy asks the system for huge pages where torch does not; reading is a twentieth faster.
        room = torch.from_numpy(np.empty(num_bytes + HUGE_PAGE, dtype=np.uint8))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"the weights need {num_bytes / 1e9:.1f} GB, more memory than {device} has free; "
            "choose a smaller model or a smaller dtype"
        ) from error
    start = -room.data_ptr() % HUGE_PAGE
    return room[start : start + num_bytes]
