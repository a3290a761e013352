"""The CPU kernels where their machine code cannot be kept, in a process of its own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba import types
from numba.core.bytecode import FunctionIdentity

from kernels.cpu.attention import _make_weighted_sum
from kernels.cpu.compile import callback, device, kernel

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
logits = NUMBA.norm_lm_head(x, norm, 1e-5, head, precisions, 2)
print(logits.isfinite().all().item())
"""


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | {"TRITON_INTERPRET": "1"} | environment,
    )  # fmt: skip


def test_kernels_run_where_nothing_can_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where the cache folder would have to be")
    script = USE + "from kernels.cpu.compile import is_compiled; print(is_compiled())"
    done = run(script, XDG_CACHE_HOME=str(blocked))
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["True", "False"], done.stderr
    assert "is not kept" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_functions_that_differ_in_a_parameter_have_names_of_their_own(monkeypatch):
    """However numba counts: kernels that two processes compiled are linked by these names."""

    def name_of(element):
        monkeypatch.setattr(FunctionIdentity, "_unique_ids", itertools.count(1000))
        function = _make_weighted_sum(element)
        signature = (types.int64,) * 9
        function.compile(signature)
        return function.overloads[signature].fndesc.mangled_name

    names = [name_of(element) for element in ("float32", "float16")]
    assert names[0] == name_of("float32") and len(set(names)) == 2


def test_a_function_of_a_maker_must_say_what_it_was_made_for():
    def made(x):
        return x

    for decorate in (device, kernel):
        with pytest.raises(AssertionError, match="<locals>"):
            decorate(made)
    callback("one", made, 1)
    assert made.__qualname__.endswith("made(one)")
