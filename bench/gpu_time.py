"""Timing on a GPU: replays of a CUDA graph between events, over operands that no cache holds.

A decode pass reads every weight once, so a kernel that is timed again and again on one weight finds
it in the L2 cache and looks faster than it ever is in a pass. The calls of a graph therefore take
several sets of operands in turn, together more than twice that cache. Kernels follow each other
without a gap, as in the engine's own graphs. Events enclose so many replays that what the host
adds, some microseconds, is lost in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.harness import Spread, spread

MAX_SETS = 256  # of operands: beyond, a kernel's operands are too small for memory to matter
MIN_CALLS = 32  # in a graph: between two graphs there is a gap
MIN_MILLISECONDS = 10.0  # between two events
WARM_UP_REPLAYS = 3


def cache_bytes(device: torch.device | None = None) -> int:
    """Of the L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_sets(num_bytes: int, l2_bytes: int | None = None) -> int:
    """How many sets of `num_bytes` are together larger than twice the L2 cache, at most 256."""
    l2_bytes = cache_bytes() if l2_bytes is None else l2_bytes
    return min(MAX_SETS, 2 * l2_bytes // num_bytes + 1)


def num_rounds(num_calls: int) -> int:
    """How often a graph of `num_calls` different calls goes through them."""
    return -(-MIN_CALLS // num_calls)


def num_replays(milliseconds: float) -> int:
    """How many replays of a graph that takes so long are timed together."""
    return max(1, round(MIN_MILLISECONDS / max(milliseconds, 1e-3)))


def a_call(milliseconds: Sequence[float], num_calls: int) -> Spread:
    """Microseconds a call, from the times of so many calls together."""
    return spread([1e3 * value / num_calls for value in milliseconds])


def per_second(amount: float, microseconds: Spread) -> Spread:
    """The rate at which an amount a call was done; the slowest time gives the lowest rate."""
    low, middle, high = (1e6 * amount / value for value in reversed(microseconds))
    return Spread(low, middle, high)


def graph_times(calls: Sequence[Callable[[], object]], repeats: int = 20) -> Spread:
    """Microseconds a call of `calls` in one CUDA graph; `repeats` measurements of many replays.

    The calls are the same work on different sets of operands (`num_sets`). They are run once before
    the capture, which compiles what is not compiled yet.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = num_rounds(len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(WARM_UP_REPLAYS):
        graph.replay()
    replays = num_replays(_milliseconds(graph, 1))
    _milliseconds(graph, replays)
    times = [_milliseconds(graph, replays) for _ in range(repeats)]
    return a_call(times, replays * rounds * len(calls))


def _milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _fitting(num_bytes: int) -> int:
    """So many bytes, or a quarter of the memory that is free, in whole megabytes."""
    free, _ = torch.cuda.mem_get_info()
    return min(num_bytes, free // 4) >> 20 << 20


def copy_bandwidth(num_bytes: int = 2 << 30) -> Spread:
    """Bytes a second, read and written together, of a copy from device memory to device memory."""
    num_bytes = _fitting(num_bytes)
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return per_second(2 * num_bytes, graph_times([lambda: target.copy_(source)]))


def read_bandwidth(num_bytes: int = 4 << 30) -> Spread:
    """Bytes a second that a sum reads from device memory."""
    num_bytes = _fitting(num_bytes)
    data = torch.rand(num_bytes // 4, device="cuda")
    return per_second(num_bytes, graph_times([data.sum]))


def matmul_rate(size: int = 8192) -> Spread:
    """Operations a second of the library's product of two bfloat16 matrices of `size` rows."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return per_second(2 * size**3, graph_times([lambda: a @ b]))
