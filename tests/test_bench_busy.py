"""The benchmark of a busy machine: its neighbours run when they shall, and only then."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.busy import Neighbours, beside, stopped

COUNTING = """
import sys
path, count = sys.argv[1], 0
print("ready", flush=True)
while True:
    count += 1
    if count % 1000 == 0:
        open(path, "w").write(str(count))
"""


def state(neighbours: Neighbours) -> str:
    """What the kernel says of the first process: T is stopped."""
    status = Path(f"/proc/{neighbours[0].pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0]


def wait_for(neighbours: Neighbours, states: str) -> None:
    deadline = time.monotonic() + 30
    while state(neighbours) not in states:
        assert time.monotonic() < deadline, state(neighbours)
        time.sleep(0.01)


def test_neighbours_run_only_in_their_turn(tmp_path):
    with stopped(COUNTING, 1, str(tmp_path / "count")) as neighbours:
        wait_for(neighbours, "T")

        def run():
            wait_for(neighbours, "RSD")
            return [1], 2.0

        assert beside(neighbours, run) == ([1], 2.0)
        wait_for(neighbours, "T")
        process = neighbours[0]
    assert process.poll() is not None


def test_a_neighbour_that_does_not_start_is_said():
    with (
        pytest.raises(RuntimeError, match="did not start"),
        stopped("raise SystemExit", 1),
    ):
        raise AssertionError("it did start")
