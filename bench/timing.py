"""Clocks and what is made of their times: quantiles, turns, CUDA graphs, the ceilings of a machine.

A decode pass reads every weight once, so a kernel that is timed again and again on one weight finds
it in the L2 cache and looks faster than it ever is in a pass. The calls of a graph therefore take
several sets of operands in turn, together more than twice that cache. Kernels follow each other
without a gap, as in the engine's own graphs. Events enclose so many replays that what the host
adds, some microseconds, is lost in milliseconds.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

import torch

MAX_SETS = 256  # of operands: beyond, a kernel's operands are too small for memory to matter
MIN_CALLS = 32  # in a graph: between two graphs there is a gap
MIN_MILLISECONDS = 10.0  # between two events
WARM_UP_REPLAYS = 3
ANY = TypeVar("ANY")
KEY = TypeVar("KEY")
Run = Callable[[], tuple[Sequence[int], float]]  # -> token ids, tokens per second


class Spread(NamedTuple):
    """Median and the 20% and 80% quantiles of repeated measurements."""

    low: float
    median: float
    high: float

    def __format__(self, spec: str) -> str:
        """median [low, high], each by `spec`."""
        low, middle, high = (format(value, spec or ".2f") for value in self)
        return f"{middle} [{low}, {high}]"

    def times(self, factor: float) -> Spread:
        return Spread(*(factor * value for value in self))


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(ordered[round(0.2 * last)], median(ordered), ordered[round(0.8 * last)])


def rotated(values: Sequence[ANY], turn: int) -> list[ANY]:
    """The values from another one on in each turn: a machine's speed drifts."""
    start = turn % len(values)
    return [*values[start:], *values[:start]]


def take_turns(actions: Mapping[KEY, Callable[[], ANY]], turns: range) -> dict[KEY, list[ANY]]:
    """What each action returned in every turn."""
    found: dict[KEY, list[ANY]] = {name: [] for name in actions}
    for turn in turns:
        for name in rotated(list(actions), turn):
            found[name].append(actions[name]())
    return found


def warm_up(runs: Mapping[str, Run], times: int = 1) -> dict[str, Sequence[int]]:
    """Run each so many times before it is timed; return its tokens."""
    return {name: [run()[0] for _ in range(times)][-1] for name, run in runs.items()}


def alternate(
    runs: Mapping[str, Run], tokens: Mapping[str, Sequence[int]], repeats: int
) -> dict[str, Spread]:
    """Tokens per second of runs that take turns and must make their `tokens` every time."""
    found = take_turns(runs, range(repeats))
    for name, results in found.items():
        assert all(made == tokens[name] for made, _ in results), f"{name} does not repeat itself"
    return {name: spread([rate for _, rate in results]) for name, results in found.items()}


def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_sets(num_bytes: int, l2_bytes: int) -> int:
    """How many sets of `num_bytes` are together larger than twice the L2 cache, at most 256."""
    return min(MAX_SETS, 2 * l2_bytes // num_bytes + 1)


def num_rounds(num_calls: int) -> int:
    """How often a graph of `num_calls` different calls goes through them."""
    return -(-MIN_CALLS // num_calls)


def num_replays(milliseconds: float) -> int:
    """How many replays of a graph that takes so long are timed together."""
    return max(1, round(MIN_MILLISECONDS / max(milliseconds, 1e-3)))


def per_call(milliseconds: Sequence[float], num_calls: int) -> Spread:
    """Microseconds per call, from the times of so many calls together."""
    return spread(milliseconds).times(1e3 / num_calls)


def per_second(amount: float, microseconds: Spread) -> Spread:
    """The rate at which an amount per call was done; the slowest time gives the lowest rate."""
    low, middle, high = (1e6 * amount / value for value in reversed(microseconds))
    return Spread(low, middle, high)


def graph_times(calls: Sequence[Callable[[], object]], repeats: int = 20) -> Spread:
    """Microseconds per call of `calls` in one CUDA graph; `repeats` measurements of many replays.

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
    return per_call(times, replays * rounds * len(calls))


def _milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


class Ceilings(NamedTuple):
    """What a GPU was measured to do.

    copy: bytes per second, read and written together, from device memory to device memory.
    read: bytes per second that a sum reads. operations: of a large bfloat16 product, per second.
    """

    copy: Spread
    read: Spread
    operations: Spread

    def floor(self, num_bytes: int, num_operations: int) -> float:
        """The fewest microseconds that so many bytes and operations can take."""
        bandwidth = max(self.copy.median, self.read.median)
        return 1e6 * max(num_bytes / bandwidth, num_operations / self.operations.median)

    def __str__(self) -> str:
        return (
            f"ceilings: copy {self.copy.times(1e-9):.0f} GB/s read and written, sum "
            f"{self.read.times(1e-9):.0f} GB/s, bfloat16 product "
            f"{self.operations.times(1e-12):.0f} TFLOP/s"
        )


def gpu_ceilings() -> Ceilings:
    found = Ceilings(copy_bandwidth(), read_bandwidth(torch.device("cuda")), matmul_rate())
    torch.cuda.empty_cache()
    return found


def copy_bandwidth(num_bytes: int = 2 << 30) -> Spread:
    """Bytes per second, read and written together, of a copy in a GPU's memory."""
    num_bytes = _fitting(num_bytes)
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return per_second(2 * num_bytes, graph_times([lambda: target.copy_(source)]))


def read_bandwidth(device: torch.device, num_bytes: int = 4 << 30) -> Spread:
    """Bytes per second that a sum over float32 reads; on a CPU all cores together."""
    if device.type == "cuda":
        num_bytes = _fitting(num_bytes)
        data = torch.rand(num_bytes // 4, device=device)
        return per_second(num_bytes, graph_times([data.sum]))
    num_bytes = min(num_bytes, 1 << 29)
    data = torch.ones(num_bytes // 4)
    seconds = timeit.repeat(data.sum, number=1, repeat=8)[1:]  # the first finds cold caches
    return per_second(num_bytes, spread(seconds).times(1e6))


def matmul_rate(size: int = 8192) -> Spread:
    """Operations per second of the library's product of two bfloat16 matrices of `size` rows."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return per_second(2 * size**3, graph_times([lambda: a @ b]))


def _fitting(num_bytes: int) -> int:
    """So many bytes, or a quarter of the memory that is free, in whole megabytes."""
    free, _ = torch.cuda.mem_get_info()
    return min(num_bytes, free // 4) >> 20 << 20
