"""Memory of a tensor that is not needed for now, returned to the system page by page."""

from __future__ import annotations

import ctypes
import mmap
import sys
from itertools import product

import torch

_MADV_DONTNEED = 4
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def give_back(part: torch.Tensor, first: int, end: int) -> None:
    """Free the whole pages of positions first..end - 1 of `part` [..., S, D].

    They read as zeros then, and take memory again once written. Only on a CPU under Linux;
    elsewhere nothing happens.
    """
    if part.device.type != "cpu" or _MADVISE is None:
        return
    *leading, _, _ = part.shape
    row = part.stride(-2) * part.itemsize
    for index in product(*map(range, leading)):
        base = part.data_ptr() + part.itemsize * sum(
            i * stride for i, stride in zip(index, part.stride(), strict=False)
        )
        start = -(-(base + first * row) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (base + end * row) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)
