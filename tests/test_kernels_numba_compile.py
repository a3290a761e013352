"""How the CPU kernels find their threads and keep their machine code, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USE = """
import threading, torch
from kernels.numba_ops import NUMBA
from kernels.weight import Weight
x, norm, head = torch.randn(2, 32), torch.ones(32), Weight(torch.randn(40, 32))
plan = torch.full((1, 3), 16, dtype=torch.uint8)
def run():
    for _ in range(20):
        NUMBA.norm_lm_head(x, norm, 1e-5, head, plan, 2)
run()
threads = [threading.Thread(target=run) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
import numba
logits = NUMBA.norm_lm_head(x, norm, 1e-5, head, plan, 2)
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
    script = USE + "from kernels.numba_compile import is_compiled; print(is_compiled())"
    done = run(script, XDG_CACHE_HOME=str(blocked))
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["True", "False"], done.stderr


def test_machine_code_is_kept_and_found_again(tmp_path):
    script = USE + "from kernels import numba_matmul; print(numba_matmul.norm_lm_head.stats)"
    first, second = (run(script, XDG_CACHE_HOME=str(tmp_path)).stdout for _ in range(2))
    assert "cache_hits=Counter()" in first and "cache_misses=Counter()" in second
