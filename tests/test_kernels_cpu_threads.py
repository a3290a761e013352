"""The CPU's thread pool: the same bits whoever does a block, and threads that come and go."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from test_kernels_cpu import Case
from tiny import family_config, tiny_llama

from kernels.cpu.compile import device, kernel
from kernels.cpu.parallel import DELAY, over_blocks
from kernels.cpu.scalars import addresses_at
from kernels.cpu.threads import SHARED, ThreadPool, usable_cores
from kernels.operands import Rows
from kernels.ops_cpu import numba_ops
from models.llama import Llama, forward, full_precisions, logits

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    with closing(ThreadPool(2)) as opened:
        yield opened


def pool_threads() -> set[threading.Thread]:
    """Of all pools but the shared one, also of engines that other tests left to the collector."""
    threads = set(threading.enumerate()) - set(SHARED._threads)
    return {thread for thread in threads if thread.name.startswith("knn-ssd-")}


@pytest.fixture
def new_threads() -> Callable[[], set[threading.Thread]]:
    """Those of pools that have started since this test began, when it is called."""
    others = pool_threads()
    return lambda: pool_threads() - others


def pass_bits(model: Llama, pool: ThreadPool, widths: Sequence[int]) -> list[torch.Tensor]:
    """Logits and cache of passes of these widths after each other, two sequences in each."""
    config, ops, start, found = model.config, numba_ops(pool), 0, []
    shape = (config.num_layers, 2, config.num_kv_heads, config.max_positions, config.head_dim)
    k, v = torch.zeros(shape), torch.zeros(shape)
    precisions = full_precisions(config, 2, model.device)
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        ids = torch.randint(3, config.vocab_size, (2, width), generator=generator)
        positions = torch.arange(start, start + width, dtype=torch.int32).repeat(2, 1)
        counts = torch.full((2,), width, dtype=torch.int32)
        rows = Rows(ids, positions, counts, torch.tensor([1, 0], dtype=torch.int32))
        found.append(logits(model, forward(model, rows, k, v, precisions, ops), precisions, ops))
        start += width
    return [*found, k, v]


@pytest.mark.parametrize("num_threads", [2, 3, 4])
@pytest.mark.parametrize("shape", ["odd", "group3-D64"])
def test_an_operation_has_the_same_bits_for_any_number_of_threads(shape, num_threads, new_threads):
    with closing(ThreadPool(1)) as alone, closing(ThreadPool(num_threads)) as pool:
        for width in (1, 2, 5, 16, 23):
            case = Case(shape, batch=2, width=width, start=3)
            want, found = (case.all_outputs(numba_ops(p)) for p in (alone, pool))
            for name, value in want.items():
                assert torch.equal(found[name], value), (name, width)
    assert not new_threads()


def test_a_thread_that_is_late_changes_no_bit(pool):
    """As the system may set a thread aside at any time; the same for both threads here."""
    model = tiny_llama(family_config("smollm2-group3"))
    widths = (24, 1, 2, 5, 9)
    with closing(ThreadPool(1)) as alone:
        want = pass_bits(model, alone, widths)
    started = time.monotonic()
    for seed in range(20):
        pool.words[DELAY] = random.Random(seed).randrange(1, 200)  # microseconds
        assert all(map(torch.equal, pass_bits(model, pool, widths), want)), seed
    assert time.monotonic() - started < 120


def test_passes_of_four_threads_at_once(pool):
    model, widths = tiny_llama(family_config("llama2")), (7, 1, 1, 3)
    want, wrong = pass_bits(model, pool, widths), []

    def run() -> None:
        for _ in range(250 // len(widths) + 1):
            if not all(map(torch.equal, pass_bits(model, pool, widths), want)):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_pools_work_beside_each_other(pool, new_threads):
    model = tiny_llama(family_config("llama2"))
    with closing(ThreadPool(3)) as other:
        runs = [partial(pass_bits, model, p, (5, 1, 1)) for p in (pool, other)]
        want = runs[0]()
        threads = [threading.Thread(target=run) for run in runs * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run(), want, strict=True))
        assert len(new_threads()) == 3


@device
def _count(block, counts, divisor):
    """Adds 1 to a block's count; fails where the divisor is 0."""
    addresses_at(counts, block + 1)[block] += 1
    if divisor == 0:
        raise ValueError


@kernel
def _count_all(pool, num_blocks, counts, divisor):
    over_blocks(pool, num_blocks, _count, (counts, divisor))


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_every_block_is_done_once(num_threads):
    with closing(ThreadPool(num_threads)) as pool:
        for num_blocks in (0, 1, 2, 3, 17, 1000):
            counts = torch.zeros(num_blocks + 1, dtype=torch.int64)
            for _ in range(200):
                pool.launch(_count_all, num_blocks, counts.data_ptr(), 1)
            assert counts.tolist() == [200] * num_blocks + [0]


def test_a_block_that_fails_fails_the_launch_and_not_the_next(pool):
    counts = torch.zeros(8, dtype=torch.int64)
    for num_blocks in (1, 8):  # on the launching thread alone, and on any
        with pytest.raises(MemoryError, match="a kernel found no memory"):
            pool.launch(_count_all, num_blocks, counts.data_ptr(), 0)
    pool.launch(_count_all, 8, counts.data_ptr(), 1)
    assert counts.tolist() == [3] + [2] * 7


def test_threads_start_with_the_first_launch_and_end_with_the_pool(pool, new_threads):
    model = tiny_llama(family_config("llama2"))
    assert not new_threads()
    want = pass_bits(model, pool, (3, 1))
    assert len(new_threads()) == 1
    pool.close()
    pool.close()
    assert not new_threads()
    assert all(map(torch.equal, pass_bits(model, pool, (3, 1)), want))  # it starts again
    assert len(new_threads()) == 1
    dropped = ThreadPool(3)
    pass_bits(model, dropped, (3,))
    assert len(new_threads()) == 3
    del dropped
    gc.collect()
    assert len(new_threads()) == 1


def test_threads_sleep_between_launches(pool):
    pass_bits(tiny_llama(family_config("llama2")), pool, (3, 1))
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.2  # a thread that waits awake takes a second


def test_a_child_process_has_threads_of_its_own(pool, new_threads):
    model = tiny_llama(family_config("llama2"))
    want = pass_bits(model, pool, (3, 1))
    child = os.fork()
    if child == 0:
        same = all(map(torch.equal, pass_bits(model, pool, (3, 1)), want))
        os._exit(0 if same and len(new_threads()) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(map(torch.equal, pass_bits(model, pool, (3, 1)), want))


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise SystemExit(3)", "os._exit(3)"])
def test_python_exits_during_a_pass(ending):
    """While a daemon thread launches for ever; the pool's own threads hold nothing up."""
    script = f"""
import os, sys, threading, time
import numpy as np
sys.path.insert(0, "tests")
from kernels.cpu.threads import ThreadPool
from test_kernels_cpu_threads import _count_all
counts, pool = np.zeros(10**6, np.int64), ThreadPool(2)
def run():
    while True:
        pool.launch(_count_all, len(counts), counts.ctypes.data, 1)
threading.Thread(target=run, daemon=True).start()
while counts[-1] < 2: time.sleep(0.01)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 3 and not done.stderr, done.stderr


@pytest.mark.parametrize(
    "limit, cores",
    [("max 100000", CORES), ("150000 100000", min(CORES, 2)), ("100000 100000", 1),
     ("20000 100000", 1), ("6400000 100000", CORES), ("nonsense", CORES), ("", CORES)],
)  # fmt: skip
def test_the_quota_of_a_container_is_respected(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(limit)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("quota, cores", [("-1", CORES), ("100000", 1), ("150000", min(CORES, 2))])
def test_the_quota_of_the_first_control_groups_is_respected(tmp_path, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cores(tmp_path) == cores


def test_affinity_is_respected():
    script = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    script += "from kernels.cpu.threads import usable_cores; print(usable_cores())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_a_thread_that_cannot_start_leaves_a_pool_that_can_be_used(monkeypatch, new_threads):
    counts, start, started = torch.zeros(64, dtype=torch.int64), threading.Thread.start, []

    def only_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with closing(ThreadPool(3)) as pool:
        monkeypatch.setattr(threading.Thread, "start", only_one)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.launch(_count_all, 64, counts.data_ptr(), 1)
        monkeypatch.undo()
        pool.launch(_count_all, 64, counts.data_ptr(), 1)
        assert counts.tolist() == [1] * 64
    assert not new_threads() and not started[0].is_alive()


def test_a_pool_is_closed_while_others_launch(pool, new_threads):
    counts, stop, launches = torch.zeros(64, dtype=torch.int64), threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            pool.launch(_count_all, 64, counts.data_ptr(), 1)
            launches.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(50):
        pool.close()
    stop.set()
    thread.join()
    assert counts.tolist() == [len(launches)] * 64
    pool.close()
    assert not new_threads()
