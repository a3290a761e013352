"""How the CPU kernels find their threads and keep their machine code, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import threading, torch
from kernels.ops_cpu import NUMBA
from kernels.weight import Dense, Weight
x, norm, head = torch.randn(2, 32), torch.ones(32), Weight(Dense(torch.randn(40, 32)))
precisions = torch.full((1, 3), 16, dtype=torch.uint8)
def run():
    for _ in range(20):
        NUMBA.norm_lm_head(x, norm, 1e-5, head, precisions, 2)
run()
threads = [threading.Thread(target=run) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
import numba
logits = NUMBA.norm_lm_head(x, norm, 1e-5, head, precisions, 2)
print(numba.threading_layer(), logits.isfinite().all().item())
"""


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
    )  # fmt: skip


def test_threads_take_turns_where_no_threadsafe_layer_can_be_loaded():
    absent = "import sys; sys.modules['numba.np.ufunc.omppool'] = None\n"
    absent += "sys.modules['numba.np.ufunc.tbbpool'] = None\n"
    done = run(absent + USE)
    assert done.returncode == 0 and done.stdout.split() == ["workqueue", "True"], done.stderr


def test_kernels_run_where_nothing_can_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where the cache folder would have to be")
    script = USE + "from kernels.cpu.compile import is_compiled; print(is_compiled())"
    done = run(script, XDG_CACHE_HOME=str(blocked))
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["True", "False"], done.stderr
    assert "is not kept" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def spin_counts(script, **environment):
    """What each libgomp says of waiting threads as it is loaded; and what is left for children."""
    script += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = run(script, OMP_DISPLAY_ENV="verbose", **environment)
    assert done.returncode == 0, done.stderr
    counts = [line.split("'")[1] for line in done.stderr.splitlines() if "SPINCOUNT" in line]
    return counts, done.stdout.strip()


@pytest.mark.parametrize("script", ["import kernels", "from engine import LLM", "import bench"])
def test_waiting_threads_spin_for_a_bounded_time(script, monkeypatch):
    """torch's libgomp is loaded first, and numba's threads wait in it."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    counts, left = spin_counts(script)
    assert counts[0] == "1000" and left == "None"
    counts, left = spin_counts(script, GOMP_SPINCOUNT="77")
    assert counts[0] == "77" and left == "77"
    assert spin_counts(script, OMP_WAIT_POLICY="passive")[0][0] == "0"


def test_kernels_run_on_the_libgomp_that_was_told_so():
    """On another one they would fight with torch's own threads for the cores."""
    done = run("import kernels.cpu.compile", LD_DEBUG="bindings")
    lines = [line for line in done.stderr.splitlines() if "`GOMP_parallel'" in line]
    bound = [line for line in lines if "omppool" in line.partition(" to ")[0]]
    assert bound and all("/torch/" in line.partition(" to ")[2] for line in bound), bound
