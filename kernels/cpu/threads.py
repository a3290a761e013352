"""The engine's own threads on a CPU: a pool of them does the blocks of every kernel.

A thread spins between two kernels of a pass, and is asleep in Python between two answers. Bits do
not depend on the number of threads: a block is computed whole by one of them.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from kernels.cpu.parallel import FAILED, NUM_WORDS, RUNNING, STOPPED, work

LINE_WORDS = 8  # words of a cache line
CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The cores that this process may use: its affinity, and the quota of its container."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota, period, limit = -1, 1, cgroup / "cpu.max"
    # The first version of control groups has two files, and -1 where the second says "max".
    first = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    with suppress(OSError, ValueError):
        texts = limit.read_text().split() if limit.exists() else [f.read_text() for f in first]
        quota, period = map(int, texts)
    return max(1, min(cores, math.ceil(quota / period))) if quota > 0 else cores


class ThreadPool:
    """Threads for kernels, started by the first launch; the launching thread is one of them.

    Launches of several threads may overlap: each does its own blocks, and the pool's threads help
    one of them. In a child process after a fork the pool starts threads of its own.
    """

    def __init__(self, num_threads: int | None = None):
        """num_threads: with the one that launches; None is all cores that may be used."""
        self.num_threads = usable_cores() if num_threads is None else num_threads
        assert self.num_threads > 0, self.num_threads
        room = np.zeros(NUM_WORDS + LINE_WORDS, np.int64)
        first = -room.ctypes.data // 8 % LINE_WORDS
        self.words = room[first : first + NUM_WORDS]
        self._address = self.words.ctypes.data
        self._threads: list[threading.Thread] = []
        self._finalizer: weakref.finalize[..., ThreadPool] | None = None
        self._reset()
        _POOLS.add(self)

    def launch(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """kernel(address of the pool, *args).

        Raises MemoryError where a block had no memory, in all launches under way; what a product
        allocates for itself, a megabyte at most, is not looked at.
        """
        with self._changed:
            self.words[RUNNING] += 1
        try:
            with self._changed:
                if not self._threads and self.num_threads > 1:
                    self._start()
                self._changed.notify_all()
            return kernel(self._address, *args)
        finally:
            with self._changed:
                self.words[RUNNING] -= 1
                has_failed = self.words[FAILED] != 0
                if not self.words[RUNNING]:
                    self.words[FAILED] = 0
            if has_failed:
                raise MemoryError("a kernel found no memory for what it computes")

    def close(self) -> None:
        """End the threads, and wait for that. A launch after this starts new ones."""
        with self._changed:
            end, self._threads, self._finalizer = self._finalizer, [], None
        if end is not None:
            end()

    def _reset(self) -> None:
        """No threads, and no job under way."""
        if self._finalizer is not None:  # of the threads of a parent process
            self._finalizer.detach()
        self.words[:] = 0
        self._changed = threading.Condition()
        self._threads, self._finalizer = [], None
        self._generation = 0  # of threads

    def _start(self) -> None:
        work.compile((types.int64, types.int64))  # once, not in every thread
        self._generation += 1
        threads: list[threading.Thread] = []
        args = (self.words, self._changed, self._generation)
        # Also where nobody closes the pool: when it is garbage, and when Python exits.
        self._threads, self._finalizer = threads, weakref.finalize(self, _end, *args, threads)
        for i in range(1, self.num_threads):
            thread = threading.Thread(target=_serve, args=args, name=f"knn-ssd-{i}", daemon=True)
            thread.start()
            threads.append(thread)


_POOLS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _serve(words: np.ndarray, changed: threading.Condition, generation: int) -> None:
    """The life of a thread: work while there are launches, sleep while there are none."""
    while words[STOPPED] < generation:
        work(words.ctypes.data, generation)
        with changed:
            changed.wait_for(lambda: words[STOPPED] >= generation or words[RUNNING])


def _end(
    words: np.ndarray,
    changed: threading.Condition,
    generation: int,
    threads: Sequence[threading.Thread],
) -> None:
    with changed:
        words[STOPPED] = max(words[STOPPED], generation)
        changed.notify_all()
    if threading.current_thread() not in threads:  # as where one of them collects garbage
        for thread in threads:
            thread.join()


def _after_fork() -> None:
    for pool in _POOLS:
        pool._reset()


os.register_at_fork(after_in_child=_after_fork)
SHARED = ThreadPool()  # of what has no engine: loading, single operations
