"""The operations of a forward pass, in three implementations.

`Ops` is the only place where implementations are chosen: a record of functions, passed to the
forward pass as a value. `TORCH` is the oracle and runs everywhere.
"""

from __future__ import annotations

from kernels.ops import TORCH, Ops
from kernels.weight import Weight

__all__ = ["TORCH", "Ops", "Weight"]
