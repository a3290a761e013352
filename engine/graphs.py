"""Passes as CUDA graphs: recorded once, then launched in one call.

A pass of a large model is some hundred launches; the host would be slower than the device. A graph
replays the same kernels with the same arguments, so whatever differs between two runs of a pass
must be in device memory: plan, positions, lengths, tokens, seeds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

# torch allows one capture in a process: it begins by waiting for the device and emptying caches,
# which breaks a capture that is under way elsewhere. Hence the one global of the engine.
_CAPTURING = threading.Lock()


class Captured(NamedTuple):
    """A graph and what its pass returned: tensors in the graph's memory, new after each replay."""

    graph: torch.cuda.CUDAGraph
    result: Any


class GraphRunner:
    """Runs passes through graphs, which share one memory pool.

    What a pass returned is valid until the next run of any pass. `state` is what a pass changes and
    the next one depends on; a trial run before the capture must leave it as it was.
    """

    def __init__(self, state: torch.Tensor):
        self._state = state
        self._captured: dict[Hashable, Captured] = {}
        self._pool: Any = None

    def __call__(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """Run `work`, which must be the same pass whenever `key` is the same."""
        if key not in self._captured:
            self._captured[key] = self._capture(work)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.result

    def _capture(self, work: Callable[[], Any]) -> Captured:
        # Not in inference mode: torch would make its own tensors of the first capture in it, and
        # no capture outside of it could use them.
        with _CAPTURING, torch.inference_mode(False), torch.no_grad():
            # Kernels are compiled by running them, which a capture does not allow. On the stream of
            # all passes, as they share counters; what is written to the cache is written again.
            kept = self._state.clone()
            try:
                work()
            finally:
                self._state.copy_(kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
            self._pool = self._pool or graph.pool()
        return Captured(graph, result)


def run_eagerly(key: Hashable, work: Callable[[], Any]) -> Any:
    """The eager twin of a GraphRunner: the same signature, the same bits."""
    return work()
