"""The launch table: every shape has a row, a row's source is honest, and nothing sees the rows."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton

from kernels.gpu import launch, launch_table
from kernels.gpu.launch_table import DECODE, MATRIX, MEASURED, PREFILL, MatrixLaunch, fit

META = torch.device("meta")
SIZES = (64, 576, 1536, 2048, 4096, 13824)


def test_measured_shapes_have_rows_of_their_own():
    """The projections of Llama-2-7B and what was fastest for them in measurements of prototypes."""
    bf16 = torch.bfloat16
    assert launch.qkv_launch(META, 128, 12288, 4096, bf16, False) == (128, 128, 4, 8, 1)
    for operation, n, k, expected in (
        ("linear_residual", 4096, 4096, (64, 256, 4, 4, 1)),
        ("linear_residual", 4096, 11008, (64, 128, 4, 4, 2)),
        ("norm_gated_mlp", 11008, 4096, (64, 128, 4, 4, 1)),
    ):
        assert launch.matrix_launch(META, operation, n, k, bf16) == expected
        row = MATRIX[90][operation, launch_table.matrix_class(operation, n, k)]
        assert row.source == MEASURED
    assert sum(row.source == MEASURED for row in MATRIX[90].values()) == 4


@pytest.mark.parametrize("table", [MATRIX, DECODE, PREFILL])
def test_only_what_was_measured_is_said_to_be(table):
    assert set(table) == {80, 86, 90, 100, 120}
    for capability in set(table) - {90}:
        assert table[capability].keys() == table[90].keys()
        assert all(row.source != MEASURED for row in table[capability].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", launch_table.CAPABILITIES)
def test_every_shape_has_a_row(capability, dtype, monkeypatch):
    """And programs share the sums of a tile exactly where K is longer than N."""
    monkeypatch.setattr(launch, "capability_of", lambda _: capability)
    for head_dim in (8, 64, 96, 128, 256):
        for n in SIZES:
            assert launch.qkv_launch(META, head_dim, n, 4096, dtype, False).split_k == 1
        qkv = launch.qkv_launch(META, head_dim, 4096, 4096, dtype, True)
        assert qkv.block_n % triton.next_power_of_2(head_dim) == 0 and qkv.split_k == 1
        launch.decode_launch(META, head_dim, dtype), launch.prefill_launch(META, head_dim, dtype)
    for operation in ("linear_residual", "norm_gated_mlp", "norm_lm_head"):
        for n in SIZES:
            for k in SIZES:
                row = launch.matrix_launch(META, operation, n, k, dtype)
                assert row.split_k == (2 if operation == "linear_residual" and k > n else 1)


def test_parameters_are_chosen_without_the_number_of_rows():
    """What a launch function may look at: the device, the weight's shape or the head, the dtype."""
    allowed = {"device", "operation", "head_dim", "has_norm", "n", "k", "dtype"}
    for function in (
        *(launch.qkv_launch, launch.matrix_launch),
        *(launch.decode_launch, launch.prefill_launch),
    ):
        assert set(inspect.signature(function).parameters) <= allowed, function


def test_tiles_fill_k_where_they_can():
    tile = MatrixLaunch(64, 256, 4, 4)
    blocks = {4096: 256, 896: 128, 576: 64, 123: 64, 4032: 256}  # the last leaves 64 of 4,096 idle
    assert {k: fit(tile, k, torch.float16).block_k for k in blocks} == blocks
    assert fit(tile, 4096, torch.float32).block_k == 128  # as many bytes


@pytest.mark.parametrize(
    "device, entry",
    [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((9, 0), 90), ((10, 3), 100), ((12, 0), 120)],
)
def test_a_gpu_has_the_entry_next_below(device, entry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    find = launch.capability_of.__wrapped__
    assert find(torch.device("cuda", 0)) == entry
    assert find(torch.device("cpu")) == find(META) == 90


def test_a_gpu_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"got a GPU of compute capability 7\.5, expected 8\.0"):
        launch.capability_of.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize(
    "capability, is_interpreted, expected",
    [(80, False, False), (90, False, True), (100, False, True), (90, True, False)],
)
def test_kernels_overlap_from_hopper_on(capability, is_interpreted, expected, monkeypatch):
    monkeypatch.setattr(launch, "capability_of", lambda _: capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", is_interpreted)
    assert launch.dependent_launch(META) == {"PDL": expected, "launch_pdl": expected}
