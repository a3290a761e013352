"""One kernel on one shape: its operands, what it must give, and the least that it can cost.

A kernel is right when its relative error ||out - ref|| / ||ref|| against the reference in float64
is at most twice that of the reference in the kernel's own dtype, plus four float32 roundings: no
tolerance is picked by hand. A kernel that rounds activations to 8 bits may add twice the error
which that rounding makes of them. What is not a number of the model (tokens, positions, plans) must
be equal. Memory that a launcher takes uninitialised reads as NaN, so that nothing is left unwritten
unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.timing import ANY, num_sets
from kernels.blocks import LEVELS
from kernels.operands import Rows
from models.config import LlamaConfig

ROUNDINGS = 4 * torch.finfo(torch.float32).eps
Expected = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Setting:
    """What the operands of all cases of one model share.

    l2_bytes: of the GPU, to know how many sets of operands its cache cannot hold; 0 where nothing
    is timed and one set will do. first: position of the first row of a matrix kernel.
    """

    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device
    l2_bytes: int = 0
    num_positions: int = 4096
    first: int = 256
    contexts: tuple[int, ...] = (256, 4096, 32768)
    prompts: tuple[int, ...] = (512, 4096)

    def randn(
        self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return torch.randn(*sizes, dtype=dtype or self.dtype, device=self.device) * scale

    def full(self, sizes: Sequence[int], value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(sizes), value, dtype=dtype, device=self.device)

    def copies(self, operand: ANY, num_bytes: int) -> list[ANY]:
        """The same in memory of its own as often as timing a call that reads so much needs it."""
        count = num_sets(num_bytes, self.l2_bytes)
        return [operand, *(changed(operand, torch.clone) for _ in range(1, count))]

    def rows(self, num_rows: int, first: int) -> Rows:
        """So many tokens of one sequence, from position `first` on."""
        positions = torch.arange(first, first + num_rows, dtype=torch.int32, device=self.device)
        tokens = self.full([1, num_rows], 0, torch.int64)
        counts = (self.full([1], count, torch.int32) for count in (num_rows, 0))
        return Rows(tokens, positions[None], *counts)

    def precisions(self, precision: int, batch: int = 1) -> torch.Tensor:
        """[B, 2L + 1]: everything in that precision."""
        return self.full([batch, 2 * self.config.num_layers + 1], precision, torch.uint8)


@dataclass(frozen=True)
class Case:
    """A kernel and its reference take the arguments of a set; the sets differ in memory only.

    written: indices of arguments that a call changes; they belong to its results.
    activations: what the kernel rounds to 8 bits, [R, K] in groups of `group`; None if it does not.
    num_factors: how many products of them the kernel multiplies with each other.
    library: the same work (of a matrix kernel its product) by the library, for every set.
    expected: what `check` compares with, where it is known.
    """

    operation: str
    rows: int
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    sets: Sequence[tuple[Any, ...]]
    num_bytes: int
    detail: str = ""
    num_operations: int = 0
    written: tuple[int, ...] = ()
    is_exact: bool = False
    activations: torch.Tensor | None = None
    group: int = 0
    num_factors: int = 1
    library: Sequence[Callable[[], object]] = ()
    expected: Expected | None = None

    def __str__(self) -> str:
        return f"{self.operation} {self.detail}".strip()


class Check(NamedTuple):
    """The relative error of a case's worst result, and what it may be."""

    error: float
    budget: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.budget  # false for NaN


def expected(case: Case) -> Expected:
    """The reference's results on the first set, in the kernel's own dtype and in float64."""
    args = case.sets[0]
    low = results(case, case.reference, args)
    if case.is_exact:
        return low, low
    exact = changed(args, lambda arg: arg.double() if arg.is_floating_point() else arg)
    return low, results(case, case.reference, exact)


def check(case: Case) -> Check:
    """Run the kernel on the first set and compare all its results with the reference's."""
    against = case.expected or expected(case)
    with poisoned_memory():
        out = results(case, case.kernel, case.sets[0])
    rounding = 0.0
    if case.activations is not None:
        rounding = case.num_factors * activation_error(case.activations, case.group)
    checks = [_compare(*parts, rounding) for parts in zip(out, *against, strict=True)]
    wrong = [found for found in checks if not found.is_right]
    return max(wrong or checks, key=lambda found: found.error)


def results(case: Case, function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """All that a call returns and changes; its arguments stay as they are."""
    copied = [changed(a, torch.clone) if i in case.written else a for i, a in enumerate(args)]
    return list(_tensors([function(*copied), *(copied[i] for i in case.written)]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


def _compare(out: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rounding: float) -> Check:
    assert out.shape == low.shape and out.dtype == low.dtype, (out.shape, out.dtype, low.dtype)
    if low is high or not out.is_floating_point():
        return Check((out != low).double().mean().item(), 0.0)
    budget = 2 * (relative_error(low, high) + rounding) + ROUNDINGS
    return Check(relative_error(out, high), budget)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact||."""
    difference = torch.linalg.vector_norm(value.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


def activation_error(x: torch.Tensor, group: int) -> float:
    """The relative error of x [R, K] in 8 bits, one scale per group: see gpu/tiles_int8.py."""
    groups = F.pad(x.double(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = groups.abs().amax(2, keepdim=True) / LEVELS
    rounded = torch.where(scale > 0, groups / scale, 0.0).round() * scale
    return relative_error(rounded, groups)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same argument with every tensor changed, also those in records; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let `torch.empty` fill what it returns: NaN, or the largest whole number."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
