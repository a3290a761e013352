"""The matrix kernels without rotation: linear_residual, norm_gated_mlp, norm_lm_head."""

from __future__ import annotations

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote

from kernels.gpu.launch_table import MatrixLaunch
from kernels.layer.linear_residual import linear_residual, linear_residual_ref
from kernels.layer.norm_gated_mlp import norm_gated_mlp, norm_gated_mlp_ref
from kernels.layer.norm_lm_head import norm_lm_head, norm_lm_head_ref
from kernels.weight import Dense, Weight

EPS = 1e-5
# rows, inner width, outputs
SIZES = [(1, 60, 77), (3, 123, 16), (15, 64, 130), (17, 256, 33)]
SIZE_IDS = [f"R{r}-K{k}-N{n}" for r, k, n in SIZES]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=SIZES, ids=SIZE_IDS)
def size(request):
    return request.param


def full_precisions(batch: int, device: torch.device) -> torch.Tensor:
    return torch.full((batch, 4), 16, dtype=torch.uint8, device=device)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0):
    return (torch.randn(*shape) * scale).to(device=device, dtype=dtype)


def make_weight(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Weight:
    return Weight(Dense(randn(n, k, dtype=dtype, device=device, scale=k**-0.5)))


def test_linear_residual(size, dtype, device, counters):
    rows, k, n = size
    x, residual = (randn(rows, c, dtype=dtype, device=device) for c in (k, n))
    weight, precisions = make_weight(n, k, dtype, device), full_precisions(1, device)
    out, low, high = residual.clone(), residual.clone(), residual.double()
    linear_residual(x, weight, out, precisions, 2, counters)
    linear_residual_ref(x, weight, low, precisions, 2, counters)
    linear_residual_ref(x.double(), promote(weight), high, precisions, 2, counters)
    assert_within_budget(out, low, high, "linear_residual")


@pytest.mark.parametrize("split_k", [2, 3])
@pytest.mark.parametrize("k", [60, 128, 200, 600])
def test_programs_that_share_the_sums_of_a_tile(k, split_k, dtype, device, counters):
    """Parts of K are whole tiles of 64: the last one is short here, or there is none for it."""
    x, residual = (randn(17, c, dtype=dtype, device=device) for c in (k, 77))
    weight, precisions = make_weight(77, k, dtype, device), full_precisions(1, device)
    launch = MatrixLaunch(32, 64, 2, 4, split_k)
    out, low, high = residual.clone(), residual.clone(), residual.double()
    linear_residual(x, weight, out, precisions, 2, counters, launch=launch)
    linear_residual_ref(x, weight, low, precisions, 2, counters)
    linear_residual_ref(x.double(), promote(weight), high, precisions, 2, counters)
    assert_within_budget(out, low, high, "linear_residual")


def test_too_few_counters_are_refused(device):
    x, weight = torch.zeros(17, 60, device=device), make_weight(40, 60, torch.float32, device)
    residual, counters = torch.zeros(17, 40, device=device), torch.zeros(3, dtype=torch.int32)
    launch = MatrixLaunch(32, 64, 2, 4, 2)
    args = (x, weight, residual, full_precisions(1, device), 0, counters.to(device))
    with pytest.raises(AssertionError):  # two tiles of rows, two of outputs
        linear_residual(*args, launch=launch)


def test_massive_activations_stay_finite(dtype, device):
    """Activations of float16 models reach tens of thousands; times a norm weight they overflow."""
    x = randn(3, 64, dtype=dtype, device=device)
    x[:, 5] = 2e4
    norm = torch.full((64,), 4.0, dtype=dtype, device=device)
    weight, precisions = make_weight(32, 64, dtype, device), full_precisions(1, device)
    for kernel, ref, args in (
        (norm_lm_head, norm_lm_head_ref, (x, norm, EPS, weight, precisions, 1)),
        (norm_gated_mlp, norm_gated_mlp_ref, (x, norm, EPS, weight, precisions, 1)),
    ):
        high = ref(*map(promote, args))
        assert_within_budget(kernel(*args), ref(*args), high, kernel.__name__)


def test_norm_gated_mlp(size, dtype, device):
    rows, k, n = size
    x = randn(rows, k, dtype=dtype, device=device, scale=3.0)
    norm = randn(k, dtype=dtype, device=device)
    args = (x, norm, EPS, make_weight(2 * n, k, dtype, device), full_precisions(1, device), 1)
    high = norm_gated_mlp_ref(*map(promote, args))
    assert_within_budget(norm_gated_mlp(*args), norm_gated_mlp_ref(*args), high, "norm_gated_mlp")


def test_norm_lm_head(size, dtype, device):
    rows, k, n = size
    x = randn(rows, k, dtype=dtype, device=device, scale=3.0)
    norm, weight = randn(k, dtype=dtype, device=device), make_weight(n, k, dtype, device)
    args = (x, norm, EPS, weight, full_precisions(1, device), 3)
    out = norm_lm_head(*args)
    assert out.dtype == torch.float32
    assert_within_budget(
        out, norm_lm_head_ref(*args), norm_lm_head_ref(*map(promote, args)), "norm_lm_head"
    )


def test_norm_scale_is_inside_the_square_root(device):
    """A row far below eps: forgetting eps, or adding it outside, changes the result wholly."""
    x = torch.full((2, 60), 1e-4, device=device)
    weight, precisions = make_weight(20, 60, torch.float32, device), full_precisions(1, device)
    args = (x, torch.ones(60, device=device), EPS, weight, precisions, 3)
    torch.testing.assert_close(norm_lm_head(*args), norm_lm_head_ref(*args))


@pytest.mark.parametrize("mixed", [[16, 0, 16, 0], [0, 0, 0, 16]], ids=str)
def test_sequences_that_skip_keep_their_rows(mixed, device, counters):
    """Four sequences of five rows: a tile of 16 rows holds sequences that run and that skip."""
    precisions = full_precisions(4, device)
    precisions[:, 3] = torch.tensor(mixed, dtype=torch.uint8)
    runs = (precisions[:, 3] > 0).repeat_interleave(5)
    x, residual = torch.randn(20, 60, device=device), torch.randn(20, 77, device=device)
    x[~runs] = float("nan")  # what a skipped sequence's inputs may hold
    weight = make_weight(77, 60, torch.float32, device)
    out, low = residual.clone(), residual.clone()
    linear_residual(x, weight, out, precisions, 3, counters)
    linear_residual_ref(x, weight, low, precisions, 3, counters)
    assert torch.equal(out[~runs], residual[~runs])
    torch.testing.assert_close(out[runs], low[runs])
    args = (
        torch.ones(60, device=device),
        EPS,
        make_weight(66, 60, torch.float32, device),
        precisions,
        3,
    )
    for op, ref in ((norm_gated_mlp, norm_gated_mlp_ref), (norm_lm_head, norm_lm_head_ref)):
        torch.testing.assert_close(op(x, *args)[runs], ref(x, *args)[runs])


def outputs_of_rows(x, norm, weights, residual, precisions, counters):
    """All three kernels on the same rows, side by side."""
    total = residual.clone()
    linear_residual(x, weights[0], total, precisions, 1, counters)
    hidden = norm_gated_mlp(x, norm, EPS, weights[1], precisions, 1)
    head = norm_lm_head(x, norm, EPS, weights[0], precisions, 1)
    return torch.cat((total.float(), hidden.float(), head), dim=1)


def test_bits_of_a_row_do_not_depend_on_the_others(dtype, device, dots_in_order, counters):
    k, n = 123, 77
    x, residual = (randn(33, c, dtype=dtype, device=device) for c in (k, n))
    norm = randn(k, dtype=dtype, device=device)
    weights = (make_weight(n, k, dtype, device), make_weight(2 * n, k, dtype, device))
    precisions = full_precisions(1, device)
    whole = outputs_of_rows(x, norm, weights, residual, precisions, counters)
    for rows in (1, 2, 5, 8, 16, 17):
        part = outputs_of_rows(x[:rows], norm, weights, residual[:rows], precisions, counters)
        assert torch.equal(part, whole[:rows]), rows
    order = torch.randperm(33)
    moved = outputs_of_rows(
        x[order].contiguous(), norm, weights, residual[order], precisions, counters
    )
    assert torch.equal(moved, whole[order])


def test_invariance_check_notices_tiles_chosen_from_the_rows(device, counters):
    """The check above can fail: K tiles and parts that depend on the row count change the bits."""
    x, weight = torch.randn(8, 1000, device=device), make_weight(32, 1000, torch.float32, device)
    results = []
    for rows, block_k, split_k in ((1, 32, 1), (8, 64, 1), (8, 32, 2)):
        launch = MatrixLaunch(16, block_k, 2, 4, split_k)
        out = torch.zeros(rows, 32, device=device)
        precisions = full_precisions(1, device)
        linear_residual(x[:rows], weight, out, precisions, 0, counters, launch=launch)
        results.append(out[0])
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["shape", "dtype", "stride"])
def test_launchers_refuse_what_they_cannot_address(name, device, counters):
    x, weight = torch.randn(4, 60, device=device), make_weight(16, 60, torch.float32, device)
    residual = torch.zeros(4, 16, device=device)
    bad = {
        "shape": (x[:, :59].contiguous(), residual),
        "dtype": (x.half(), residual),
        "stride": (x, torch.zeros(16, 4, device=device).t()),
    }[name]
    with pytest.raises(AssertionError):
        linear_residual(bad[0], weight, bad[1], full_precisions(1, device), 0, counters)
