"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter.

The interpreter is right in float32 and float16 only (its bfloat16 dots are garbage), so bfloat16
kernel tests need a GPU. The switch has to be set before the first kernel is defined.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a script's job in the background has it. Children would inherit that, but no handler: they
    # get the default, and this process goes on ignoring it.
    signal.signal(signal.SIGINT, lambda number, frame: None)

POISONED_PACKAGES = ("kernels", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def counters(device: torch.device) -> Iterator[torch.Tensor]:
    """Counters of kernels whose programs share a sum: every launch must leave them zero."""
    tensor = torch.zeros(1 << 10, dtype=torch.int32, device=device)
    yield tensor
    assert not tensor.any()


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(42)
    np.random.seed(42)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what uninitialised memory may hold at its worst."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        package = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return poison(tensor) if package in POISONED_PACKAGES else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that `kernels` and `engine` take without initialising it reads as NaN.

    Not in tests marked `gpu`: each fill is a launch between two kernels, which then never follow
    each other as they do in use, and overlap.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """a @ b, one column of `a` after the other: an element's bits do not depend on its place."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype or a.dtype)
    for k in range(a.shape[1]):
        total += np.multiply(a[:, k : k + 1], b[k : k + 1], dtype=total.dtype)
    return total


@pytest.fixture
def dots_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's dot treat all columns of a tile alike, as a tensor core does.

    It is numpy's product, and some kernels of OpenBLAS round the last columns differently.
    """
    monkeypatch.setattr(np, "matmul", product_in_order)
