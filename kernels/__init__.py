"""The operations of a forward pass, in three implementations.

`Ops` is the only place where implementations are chosen: a record of functions, passed to the
forward pass as a value. `TORCH` is the oracle and runs everywhere.
"""

from __future__ import annotations

from kernels.cpu.spinning import load_torch

load_torch()

from kernels.ops import TORCH, Ops  # noqa: E402 - they import torch themselves
from kernels.weight import Weight  # noqa: E402

__all__ = ["TORCH", "Ops", "Weight"]
