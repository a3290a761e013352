"""Every kernel compiles for the GPUs that we name, fits their shared memory and spills nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import SHARED_LIMITS

SCRIPT = Path(__file__).with_name("compile_kernels.py")
TARGETS = (80, 86, 90, 100)
MATRIX_KERNELS = {
    "_norm_qkv_rope_append_kernel",
    "_linear_residual_kernel",
    "_norm_gated_mlp_kernel",
    "_norm_lm_head_kernel",
}
DEPENDENT_KERNELS = MATRIX_KERNELS | {"_attention_decode_kernel"}  # those of a decode pass
# They read a few token ids.
TINY_KERNELS = {"_accept_kernel", "_draft_rows_kernel", "_verify_rows_kernel"}
KERNELS = DEPENDENT_KERNELS | {
    "_rms_norm_kernel",
    "_norm_qkv_rope_prefill_kernel",
    "_attention_prefill_kernel",
    "_sample_kernel",
    "_accept_kernel",
    "_draft_rows_kernel",
    "_verify_rows_kernel",
    "_keep_drafted_kernel",
    "_keep_states_kernel",
    "_nearest_anchor_kernel",
    "_token_scales_kernel",
    "_pool_states_kernel",
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[int, list[dict]]:
    """What the compiler says about each kernel: the targets compile side by side."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = {}
    for pair in ((80, 90), (86, 100)):  # two compilers at a time
        running = {
            sm: subprocess.Popen(
                [sys.executable, SCRIPT, str(sm)], env=env, stdout=subprocess.PIPE, text=True
            )
            for sm in pair
        }
        for sm, process in running.items():
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, f"sm_{sm}: see standard error"
            result[sm] = [json.loads(line) for line in output.splitlines()]
    return result


@pytest.mark.parametrize("sm", TARGETS)
def test_kernels_compile_and_fit(records, sm):
    assert {record["kernel"] for record in records[sm]} == KERNELS
    for record in records[sm]:
        print(record)
        assert record["shared"] <= SHARED_LIMITS[sm], record
        # The stack is where spilled registers go. float32 has no tensor cores to keep its sums, and
        # spills: it is there for checking results, not for speed.
        assert record["stack"] == 0 or record["dtype"] == "torch.float32", record


@pytest.mark.parametrize("sm", TARGETS)
def test_loads_are_vectorised(records, sm):
    """16 bytes a thread: a weight read in narrower pieces does not reach the memory's speed."""
    for record in records[sm]:
        is_tiny = record["kernel"] in TINY_KERNELS
        assert (is_tiny or record["wide_loads"] > 0) and record["narrow_weights"] == 0, record


@pytest.mark.parametrize("sm", TARGETS)
def test_int8_weights_reach_the_tensor_cores(records, sm):
    """And weights without an 8-bit form compile to nothing of it."""
    assert {record["kernel"] for record in records[sm] if record["int8"]} == MATRIX_KERNELS
    for record in records[sm]:
        assert (record["int8_dots"] > 0) == record["int8"], record


@pytest.mark.parametrize("sm", TARGETS)
def test_noise_takes_exact_logarithms(records, sm):
    """lg2.approx is wrong by 2^-22 near 1, which is where Gumbel noise has its largest values."""
    sampler = [record for record in records[sm] if record["kernel"] == "_sample_kernel"]
    assert sampler and all(record["fast_logarithms"] == 0 for record in sampler)


@pytest.mark.parametrize("sm", TARGETS)
def test_kernels_of_a_decode_pass_wait_before_they_touch_memory(records, sm):
    """Where the next kernel starts early, and only there: launch.py says why that is safe."""
    for record in records[sm]:
        is_dependent = sm >= 90 and record["kernel"] in DEPENDENT_KERNELS
        assert record["is_dependent"] == is_dependent, record
        assert record["waits"] == record["triggers"] == int(is_dependent), record
        assert not is_dependent or record["accesses_before_wait"] == 0, record
