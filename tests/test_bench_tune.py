"""bench.tune: what is tried, what is discarded, and what is made of times that are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import kernel_cases, ops, timing, tune
from bench.candidates import (
    DTYPE,
    Problem,
    Times,
    Trial,
    choose,
    nearest,
    paste_rows,
    present,
    rank,
    shape_classes,
)
from bench.cases import Setting
from bench.kernel_cases import ShapeClass
from bench.shapes import SHAPES
from bench.timing import Spread
from kernels.gpu.launch import matrix_launch, qkv_launch
from kernels.gpu.launch_table import (
    CAPABILITIES,
    DECODE,
    MATRIX,
    PREFILL,
    DecodeLaunch,
    MatrixLaunch,
    PrefillLaunch,
    fit,
)
from kernels.weight import Weight

ROOT = Path(__file__).resolve().parent.parent
A, B, C = (MatrixLaunch(block_n, 128, 4, 4) for block_n in (16, 32, 64))
CLASSES = [
    *(ShapeClass(*key) for key in MATRIX[90]),
    *(ShapeClass("attention_decode", name) for name in DECODE[90]),
    *(ShapeClass("attention_prefill", name) for name in PREFILL[90]),
]
# Two classes of a model, compiled ahead or launched on tensors that are somewhere; prints whether
# triton's cache had each kernel.
COMPILES = """
import json, sys
import torch
from triton import knobs
from bench import tune
from bench.candidates import DTYPE, case_groups, present, shape_classes, with_launch
from bench.cases import Setting
from bench.compile import compiling_only
from bench.shapes import SHAPES

hits, small = [], {"small": SHAPES["smollm2-135m"]}
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
for shape_class, problems in shape_classes(small, ["attention_decode", "norm_gated_mlp"]).items():
    launch = present(80, shape_class)
    if sys.argv[1] == "ahead":
        tune.compile_ahead(86, 80, problems, launch)
        continue
    base = Setting(small["small"], DTYPE, torch.device("cpu"), contexts=(256,))
    with compiling_only(80, 86):
        for group in case_groups(problems[0], base):
            for case in group:
                with_launch(case, launch).kernel(*case.sets[0])
print(json.dumps(hits))
"""


def at(microseconds: float) -> Spread:
    return Spread(microseconds * 0.9, microseconds, microseconds * 1.1)


def trial(launch, *problems) -> Trial:
    return Trial(launch, tuple(Times(*(at(value) for value in times)) for times in problems))


def test_one_row_counts_most_and_then_eight_rows_and_int8():
    slow, fast = trial(A, (10.0, 10.1, 5.0)), trial(B, (9.0, 10.0, 5.0))
    assert [t.launch for t in rank([slow, fast])] == [B, A]
    same = [trial(A, (10.0, 10.2, 5.0)), trial(B, (10.0, 10.1, 5.0)), trial(C, (10.0, 10.1, 4.0))]
    assert [t.launch for t in rank(same)] == [C, B, A]
    assert trial(A, (10.0, 11.0, 5.0)).score == pytest.approx(11.6)
    assert trial(A, (10.0,)).score == pytest.approx(10.0)


def test_a_per_cent_of_every_problem_counts_the_same():
    small, large = trial(A, (1.0,), (200.0,)), trial(B, (2.0,), (150.0,))
    assert small.score == pytest.approx(200**0.5) and rank([large, small])[0] is small


def test_what_is_slow_with_eight_rows_goes_to_the_end():
    steep = trial(A, (5.0, 5.0), (5.0, 5.8))
    assert steep.is_steep and not trial(B, (5.0, 5.7)).is_steep
    assert rank([steep, trial(B, (9.0, 9.0))])[0].launch == B


def test_what_was_refused_has_no_rank():
    assert rank([Trial(A, refusal="does not compile"), trial(B, (1.0,))]) == [trial(B, (1.0,))]
    assert rank([Trial(A, refusal="wrong")]) == []


def test_the_present_choice_stays_unless_another_is_clearly_better():
    close = rank([trial(A, (10.0,)), trial(B, (9.95,))])
    assert close[0].launch == B and choose(close, A).launch == A
    clear = rank([trial(A, (10.0,)), trial(B, (9.8,))])
    assert choose(clear, A).launch == B
    assert choose(clear, C).launch == B  # the present choice cannot run
    steep = rank([trial(A, (10.0, 12.0)), trial(B, (11.0, 11.0))])
    assert choose(steep, A).launch == B


def test_rows_to_paste():
    chosen = [
        (ShapeClass("linear_residual", "large, deep"), MatrixLaunch(64, 128, 4, 4, 2)),
        (ShapeClass("attention_decode", "heads to 128"), DecodeLaunch(64, 256, 3, 4)),
        (ShapeClass("norm_lm_head", "vocabulary"), MatrixLaunch(128, 128, 4, 8)),
        (ShapeClass("attention_prefill", "heads to 64"), PrefillLaunch(128, 64, 3, 8)),
    ]
    assert paste_rows(chosen, 90, "bench.tune on one GPU") == [
        'TUNED = "bench.tune on one GPU"',
        "# MATRIX_90",
        '    ("linear_residual", "large, deep"): Row(MatrixLaunch(64, 128, 4, 4, 2), TUNED),',
        '    ("norm_lm_head", "vocabulary"): Row(MatrixLaunch(128, 128, 4, 8), TUNED),',
        "# DECODE_90",
        '    "heads to 128": Row(DecodeLaunch(64, 256, 3, 4), TUNED),',
        "# PREFILL_90",
        '    "heads to 64": Row(PrefillLaunch(128, 64, 3, 8), TUNED),',
    ]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape_class", CLASSES, ids=" ".join)
def test_candidates_lie_around_the_present_choice(shape_class, capability):
    found = nearest(capability, shape_class, 20)
    assert found[0] == present(capability, shape_class)
    assert 8 <= len(set(found)) == len(found) <= 20
    assert nearest(capability, shape_class, 3) == found[:3]
    for launch in found[1:4]:  # one step or two away
        changed = [a != b for a, b in zip(launch, found[0], strict=True)]
        assert sum(changed) <= 2, launch
    if shape_class.name.startswith("heads to") and not shape_class.operation.startswith(
        "attention"
    ):
        whole = int(shape_class.name.split()[-1])
        assert all(launch.block_n % whole == 0 for launch in found)
    if shape_class.operation in ("norm_qkv_rope_append", "norm_gated_mlp", "norm_lm_head"):
        assert all(launch.split_k == 1 for launch in found)


def test_classes_are_those_by_which_kernels_are_launched():
    device = torch.device("meta")
    problems = [p for found in shape_classes(SHAPES).values() for p in found]
    for problem in problems:
        config, cls = problem.config, problem.shape_class
        setting = Setting(config, DTYPE, device)
        if problem.kind.startswith("attention_"):
            assert cls.name in (DECODE if cls.operation == "attention_decode" else PREFILL)[90]
            continue
        case = next(kernel_cases.matrix_cases(setting, problem.kind, [1], 16))
        (weight,) = (w for arg in case.sets[0] if isinstance(w := getattr(arg, "qkv", arg), Weight))
        n, k = weight.shape
        n //= 2 if cls.operation == "norm_gated_mlp" else 1
        used = matrix_launch(device, cls.operation, n, k, DTYPE) if problem.kind != "qkv" else None
        used = used or qkv_launch(device, config.head_dim, n, k, DTYPE, config.has_qk_norm)
        assert fit(present(90, cls), k, DTYPE) == used, problem
        assert case.operation.split()[0] == cls.operation


def test_the_same_weight_is_tried_once():
    square = shape_classes(SHAPES)[ShapeClass("linear_residual", "large, square")]
    assert [p.model for p in square] == ["llama-2-7b", "llama-2-13b"]  # llama-3-8b's is 7b's
    only = shape_classes({"a": SHAPES["smollm2-135m"]}, ["norm_lm_head"])
    assert list(only) == [ShapeClass("norm_lm_head", "vocabulary")]
    assert [p.kind for p in only[next(iter(only))]] == ["lm_head"]


class Faulty:
    """The gated MLP, whose launch says how it fails."""

    def __init__(self):
        self.right = kernel_cases.TRITON.norm_gated_mlp
        self.calls = 0

    def __call__(self, *args, launch):
        self.calls += 1
        if launch.num_stages == 8:
            raise OutOfResources(300_000, 232_448, "shared memory")
        result = self.right(*args, launch=launch)
        return result * 1.1 if launch.num_stages == 6 and args[0].shape[0] == 8 else result


def test_what_cannot_run_or_is_wrong_is_discarded_and_not_timed(monkeypatch, device, capsys):
    faulty = Faulty()
    broken = replace(kernel_cases.TRITON, norm_gated_mlp=faulty)
    monkeypatch.setattr(kernel_cases, "TRITON", broken)
    timed = []

    def made_up_times(calls, repeats):
        launch = calls[0].keywords["launch"]
        timed.append(launch)
        return at(float(launch.block_n))

    monkeypatch.setattr(timing, "graph_times", made_up_times)
    launches = [
        MatrixLaunch(16, 64, 3, 4),
        MatrixLaunch(16, 64, 8, 4),
        MatrixLaunch(32, 64, 6, 4),
        MatrixLaunch(32, 64, 3, 4),
    ]
    base = Setting(ops.INTERPRETED, torch.float16, device, num_positions=64, first=3)
    problem = Problem("small", "gated_mlp", ops.INTERPRETED)
    trials = tune.try_class([problem, problem], launches, base)
    refusals = [t.refusal for t in trials]
    assert refusals[0] == refusals[3] == ""
    assert "shared memory" in refusals[1] and refusals[2].startswith("wrong: error 1.0e-01")
    assert set(timed) == {launches[0], launches[3]}
    assert [t.times for t in trials[1:3]] == [(), ()]
    assert trials[0].times == (Times(at(16.0), at(16.0), at(16.0)),) * 2
    tune.print_trials(trials, launches[3])
    lines = capsys.readouterr().out.splitlines()
    assert "block_n 16, block_k 64, num_stages 3" in lines[1] and "16.00" in lines[1]
    assert lines[2].startswith("* block_n 32") and "32.00" in lines[2]
    assert "out of resource" in lines[3] and "wrong" in lines[4]


def test_our_own_errors_are_not_taken_for_a_candidates():
    def fail(message):
        raise RuntimeError(message)

    assert tune.refusal_of(lambda: None) == ""
    assert tune.refusal_of(lambda: fail("PassManager::run failed")) == tune.PASS_FAILED
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune.refusal_of(lambda: fail("CUDA error: an illegal memory access was encountered"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would be timed")
def test_without_a_gpu_candidates_are_compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.tune", "--shape", "llama-2-7b"]
    command += ["--operation", "attention_decode", "--limit", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert tune.NO_GPU in done.stdout and done.stdout.count("\n* ") == 2
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["device"], result["timed"]) == ("cpu", False)
    assert [entry["capability"] for entry in result["classes"]] == list(tune.ABSENT_GPUS)
    for entry in result["classes"]:
        assert len(entry["candidates"]) == 2
        for row in entry["candidates"]:
            assert row["registers"] > 0 and row["shared"] > 0 and row["refusal"] == ""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """The key of triton's cache is the same for another process and for tensors on a device."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    found = []
    for what in ("ahead", "launch"):
        command = [sys.executable, "-c", COMPILES, what]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=env, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert len(found[0]) == len(found[1]) >= 3
    assert not any(found[0]) and all(found[1])


class CutOff(Exception):
    pass


def test_a_run_that_is_cut_off_has_printed_what_it_had(monkeypatch, capsys):
    classes = shape_classes(
        {"small": SHAPES["smollm2-135m"]}, ["attention_decode", "linear_residual"]
    )
    first, second, _ = classes
    done = []

    def try_two(problems, launches, base):
        if len(done) == 2:
            raise CutOff
        done.append(launches[1])
        if len(done) == 2:
            return [Trial(launch, refusal="does not compile") for launch in launches]
        return [trial(launches[0], (9.0,)), trial(launches[1], (7.0,))]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(tune, "try_class", try_two)
    base = Setting(SHAPES["smollm2-135m"], DTYPE, torch.device("cpu"))
    with pytest.raises(CutOff):
        tune.tune(classes, 2, [90], lambda _, problems, launch: Trial(launch), base)
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.endswith(", TUNED),"))
    assert row == paste_rows([(first, done[0])], 90, "")[-1]
    assert lines[lines.index(row) - 2].startswith('TUNED = "bench.tune on one A GPU, ')
    parts = [json.loads(line)["part"] for line in lines if line.startswith('{"part"')]
    assert [(part["operation"], part["name"]) for part in parts] == [first, second]
    assert parts[0]["candidates"][0]["times"][0][0] == list(at(7.0))
    assert all(found["refusal"] for found in parts[1]["candidates"])


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="needs the interpreter")
def test_the_interpreter_cannot_tune(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.parse([])
    assert stopped.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_class_is_tuned_on_a_gpu(device):
    config = SHAPES["smollm2-135m"]
    base = Setting(config, DTYPE, device, timing.cache_bytes(device), num_positions=512)
    problem = Problem("smollm2-135m", "attn_out", config)
    launches = nearest(90, problem.shape_class, 2)
    trials = tune.try_class([problem], launches, base)
    assert all(t.refusal == "" and t.score > 0 for t in trials)
