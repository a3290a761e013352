"""A stand-in for CUDA graphs on a CPU: a pass is recorded once, then only its record is run.

What a graph holds is recorded: the operations on tensors with the very tensors they ran on, and the
kernel launches with their arguments. Python between them runs once. Reading a tensor on the host
while recording fails, as it does in a capture. So a pass whose second run needs a value of that
time's host, or a tensor that is not at its old place, gives wrong results here as it would there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")


class HostReadError(AssertionError):
    """A pass looked at the device's memory while it was recorded."""


class Recording(TorchDispatchMode):
    """The tape of a pass: callables that run its steps again, in place, and their names."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[], None]] = []
        self.kernels: list[str] = []
        self.operations: list[str] = []
        self._is_inside_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside_kernel:  # the interpreter's own bookkeeping
            return func(*args, **kwargs)
        if any(name in str(func) for name in HOST_READS):
            raise HostReadError(str(func))
        out = func(*args, **kwargs)
        self.operations.append(func.overloadpacket.__name__)
        self.tape.append(lambda: self._again(func, args, kwargs, out))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def launch(self, name: str, execute: Callable[[], Any]) -> Any:
        """Run a kernel and put it on the tape."""
        self.kernels.append(name)
        self.tape.append(execute)
        self._is_inside_kernel = True
        try:
            return execute()
        finally:
            self._is_inside_kernel = False


class RecordedRunner:
    """Has the signature of engine.graphs.GraphRunner."""

    def __init__(self, state: torch.Tensor | None = None) -> None:
        self.state = state  # what a trial run must leave as it was; set once there are buffers
        self.num_runs: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[Recording, Any]] = {}

    def recording(self, key: Hashable) -> Recording:
        return self._recorded[key][0]

    def __call__(self, key: Hashable, work: Callable[[], Any]) -> Any:
        if key not in self._recorded:
            assert self.state is not None
            kept = self.state.clone()
            self._recorded[key] = self._record(work)
            self.state.copy_(kept)
        recording, result = self._recorded[key]
        for other, (_, stale) in self._recorded.items():
            if other != key:  # graphs of one pool overwrite what the others have returned
                for tensor in tree_leaves(stale):
                    if isinstance(tensor, torch.Tensor):
                        tensor.fill_(-7)
        for step in recording.tape:
            step()
        self.num_runs[key] = self.num_runs.get(key, 0) + 1
        return result

    def _record(self, work: Callable[[], Any]) -> tuple[Recording, Any]:
        recording, original = Recording(), GridExecutor.__call__

        def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
            name = executor.fn.__name__
            return recording.launch(name, lambda: original(executor, *args, **kwargs))

        GridExecutor.__call__ = call
        try:
            with recording:
                result = work()
        finally:
            GridExecutor.__call__ = original
        return recording, result
