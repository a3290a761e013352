"""16-bit weights on a CPU: the bits of the float32 matrix of the same values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operands import qkv_layer, rows_at
from test_kernels_cpu import COUNTERS, Case
from test_kernels_extents import layers_operands

from kernels.cpu.table import layer_table
from kernels.layer.planned_linear import quantise
from kernels.operands import RotaryTable
from kernels.ops import TORCH
from kernels.ops_cpu import NUMBA
from kernels.weight import FLOATS, Dense, LayerWeights, Weight

ROOT = Path(__file__).resolve().parent.parent
HALVES = [torch.bfloat16, torch.float16]
# Rows of a decode step or a verify pass, then of prompts, which take other tiles.
ROWS = [*range(1, 17), 17, 21, 40]


def outputs(case: Case, change, draft: bool = False) -> dict[str, torch.Tensor]:
    """Every operation that reads a matrix, with `change` applied to each of them."""

    def weight(matrix: torch.Tensor) -> Weight:
        made = Weight(Dense(change(matrix)))
        return quantise(made) if draft else made

    k, v = case.cache.clone()
    q = case.append(NUMBA, case.x, qkv_layer(case.norm, weight(case.qkv), case.bias), k, v)
    residual = case.x.clone()
    NUMBA.linear_residual(
        case.q.flatten(1), weight(case.attn_out), residual, case.precisions, 2, COUNTERS
    )
    args = case.x, case.norm, 1e-5
    h = NUMBA.norm_gated_mlp(*args, weight(case.gate_up), case.precisions, 3)
    logits = NUMBA.norm_lm_head(*args, weight(case.head), case.precisions, 3)
    return {"q": q, "k": k, "v": v, "x": residual, "h": h, "logits": logits}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ["aligned", "odd", "group3-D64", "group8-D96"])
def test_the_bits_are_those_of_the_widened_matrix(shape, dtype):
    for rows in ROWS:
        case = Case(shape, batch=1, width=rows)
        got = outputs(case, lambda matrix: matrix.to(dtype))
        assert_equal(got, outputs(case, lambda matrix: matrix.to(dtype).float()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("precisions", [(8, 8), (16, 8, 0), (0, 16, 16)], ids=str)
def test_mixed_precisions_and_drafts_too(precisions, dtype):
    """The 8-bit form of a 16-bit matrix has the codes and scales of the float32 matrix."""
    case = Case("odd", batch=len(precisions), width=3, start=3)
    case.precisions[:] = torch.tensor(precisions, dtype=torch.uint8)[:, None]
    case.precisions[:, 3] = torch.tensor([p or 16 for p in precisions], dtype=torch.uint8)
    ran = torch.tensor(precisions).repeat_interleave(3) > 0
    got = outputs(case, lambda matrix: matrix.to(dtype), draft=True)
    expected = outputs(case, lambda matrix: matrix.to(dtype).float(), draft=True)
    for name in ("q", "h"):
        got[name], expected[name] = got[name][ran], expected[name][ran]
    assert_equal(got, expected)
    codes, scale = quantise(Weight(Dense(case.qkv.to(dtype)))).draft
    wide_codes, wide_scale = quantise(Weight(Dense(case.qkv.to(dtype).float()))).draft
    assert torch.equal(codes, wide_codes) and torch.equal(scale, wide_scale)


def all_values(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def products(values: torch.Tensor, num_k: int, rows: int) -> torch.Tensor:
    """1 * value for each value, in the first of num_k columns: [rows, number of values]."""
    matrix = torch.zeros(len(values), num_k, dtype=values.dtype)
    matrix[:, 0] = values
    out = torch.zeros(rows, len(values))
    precisions = torch.full((1, 3), 16, dtype=torch.uint8)
    NUMBA.linear_residual(
        torch.ones(rows, num_k), Weight(Dense(matrix)), out, precisions, 0, COUNTERS
    )
    return out


@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("num_k", [1, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_widened_exactly(dtype, num_k, rows):
    values = all_values(dtype)
    assert torch.equal(products(values, num_k, rows), values.float().expand(rows, -1))


PORTABLE = """
import torch
from test_kernels_cpu_half import HALVES, all_values, products
for dtype in HALVES:
    values = all_values(dtype)
    for rows, num_k in ((1, 16), (3, 17), (20, 16)):
        expected = values.float().expand(rows, -1)
        assert torch.equal(products(values, num_k, rows), expected), (dtype, rows, num_k)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names processors of x86")
@pytest.mark.parametrize(
    ("name", "features"),
    [("haswell", "+avx2,+fma,+f16c,+avx,+bmi,+bmi2"), ("x86-64", "+sse2")],
    ids=["AVX2", "no F16C"],
)
def test_other_processors_widen_exactly(name, features):
    if os.uname().machine != "x86_64":
        pytest.skip("names processors of x86")
    environment = {
        "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PORTABLE], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def mixed(layer: LayerWeights, turn: int) -> LayerWeights:
    """The layer with each of its matrices in another type."""
    changed = {}
    for i, name in enumerate(("qkv", "attn_out", "gate_up", "down")):
        values = getattr(layer, name).own.values
        changed[name] = Weight(Dense(values.to(FLOATS[(i + turn) % 3])))
    return layer._replace(**changed)


def widened(layer: LayerWeights) -> LayerWeights:
    return LayerWeights(*(
        Weight(Dense(field.own.values.float())) if isinstance(field, Weight) else field
        for field in layer
    ))  # fmt: skip


def test_one_model_may_mix_types():
    operands = layers_operands()
    layers = [mixed(layer, turn) for turn, layer in enumerate(operands["layers"])]
    streams = []
    for some in (layers, [widened(layer) for layer in layers]):
        torch.manual_seed(0)
        given = layers_operands() | {"layers": some, "table": layer_table(some)}
        names = "x layers table eps cos sin positions num_tokens slots k_cache v_cache precisions"
        x, _, table, eps, cos, sin, positions, num_tokens, slots, k, v, precisions = (
            given[name] for name in names.split()
        )
        rows = rows_at(positions, num_tokens, slots)
        NUMBA.run_layers(x, some, table, eps, RotaryTable(cos, sin), rows, k, v, precisions)
        streams.append((x, k, v))
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_reference_widens_as_well(dtype):
    case = Case("odd", batch=2, width=3)
    head = Weight(Dense(case.head.to(dtype)))
    wide = Weight(Dense(case.head.to(dtype).float()))
    got, expected = (
        TORCH.norm_lm_head(case.x, case.norm, 1e-5, weight, case.precisions, 3)
        for weight in (head, wide)
    )
    assert torch.equal(got, expected)


def test_float64_matrices_are_refused():
    case = Case("odd", batch=1, width=1)
    with pytest.raises(AssertionError):
        outputs(case, lambda matrix: matrix.double())
