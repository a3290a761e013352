"""Rows at precision 8 in the four matrix kernels: int8 weights times int8 activations.

The oracle is each operation's reference in float64, with the kernels' own projection: activations
quantised in the same float32 steps (`linear_int8_activations_ref`), everything after that exact.
Quantised values are therefore equal, and only float32 sums and one rounding to the dtype remain.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from budget import DTYPES, assert_within_budget, promote
from operands import qkv_layer, rows_at

from kernels.gpu import launch
from kernels.gpu.tiles_int8 import linear_int8_activations_ref
from kernels.layer import linear_residual, norm_gated_mlp, norm_lm_head, norm_qkv_rope
from kernels.layer.planned_linear import quantise
from kernels.operands import LayerCache, RotaryTable
from kernels.weight import Dense, Weight

SUBLAYER, EPS = 2, 1e-5
HEADS, KV_HEADS, HEAD_DIM = 3, 1, 16
N = (HEADS + 2 * KV_HEADS) * HEAD_DIM  # output rows of every weight
MODULES: dict[str, ModuleType] = {
    "linear_residual": linear_residual,
    "norm_gated_mlp": norm_gated_mlp,
    "norm_lm_head": norm_lm_head,
    "norm_qkv_rope_append": norm_qkv_rope,
}
# sequences, rows of each, inner width: less than a tile of K, not whole tiles, whole tiles
SIZES = [(1, 1, 60), (3, 1, 123), (1, 17, 256), (2, 5, 600)]


class Case(NamedTuple):
    """Operands of one pass over B sequences of as many rows each."""

    x: torch.Tensor  # [B, T, K]
    positions: torch.Tensor  # [B, T]
    residual: torch.Tensor  # [B, T, N]
    norm: torch.Tensor  # [K]
    weight: Weight  # [N, K]
    bias: torch.Tensor  # [N]
    angles: torch.Tensor  # [S, D/2]

    def of(self, sequences: slice | torch.Tensor) -> Case:
        parts = (field[sequences].contiguous() for field in self[:3])
        return Case(*parts, *self[3:])


def make(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    batch, width, k = size

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    first = torch.randint(0, 20, (batch, 1))
    return Case(
        randn(batch, width, k) * 3,
        (first + torch.arange(width)).to(device, torch.int32),
        randn(batch, width, N),
        randn(k),
        quantise(Weight(Dense(randn(N, k) * k**-0.5))),
        randn(N),
        (torch.rand(40, HEAD_DIM // 2) * 6).to(device),
    )


def table(column: list[int] | int, case: Case) -> torch.Tensor:
    """[B, 5]: these precisions in the column that is looked at and 16 beside it."""
    precisions = torch.full((case.x.shape[0], 5), 16, dtype=torch.uint8)
    precisions[:, SUBLAYER] = torch.as_tensor(column, dtype=torch.uint8)
    return precisions.to(case.x.device)


def run(
    name: str, operation: Callable[..., torch.Tensor | None], case: Case, precisions: torch.Tensor
):
    """The operation's results for each row [R, ...]: of QKV, what it returns and what it caches."""
    x, (batch, width) = case.x.flatten(0, 1), case.positions.shape
    if name == "linear_residual":
        residual = case.residual.flatten(0, 1).clone()
        counters = torch.zeros(64, dtype=torch.int32, device=x.device)
        operation(x, case.weight, residual, precisions, SUBLAYER, counters)
        return residual
    if name != "norm_qkv_rope_append":
        return operation(x, case.norm, EPS, case.weight, precisions, SUBLAYER)
    slots = torch.arange(batch, dtype=torch.int32, device=x.device)
    num_tokens = torch.full_like(slots, width)
    caches = LayerCache(*(x.new_zeros(batch, KV_HEADS, 40, HEAD_DIM) for _ in "kv"))
    angles = case.angles.float()
    q = operation(
        *(x, qkv_layer(case.norm, case.weight, case.bias), EPS),
        *(RotaryTable(angles.cos(), angles.sin()), rows_at(case.positions, num_tokens, slots)),
        *(caches, precisions, SUBLAYER),
    )
    rows = (slots.repeat_interleave(width).long(), slice(None), case.positions.flatten().long())
    return torch.cat((q, *(cache[rows] for cache in caches)), dim=1).flatten(1)


def run_kernel(name: str, case: Case, precisions: torch.Tensor) -> torch.Tensor:
    return run(name, getattr(MODULES[name], name), case, precisions)


def run_ref(name: str, case: Case, precisions: torch.Tensor) -> torch.Tensor:
    return run(name, getattr(MODULES[name], f"{name}_ref"), case, precisions)


def group_width(name: str, case: Case) -> int:
    """Activations that share a scale: the kernel's BLOCK_K."""
    k, dtype = case.x.shape[-1], case.x.dtype
    if name == "norm_qkv_rope_append":
        return launch.qkv_launch(case.x.device, HEAD_DIM, N, k, dtype, False).block_k
    outputs = N // 2 if name == "norm_gated_mlp" else N
    return launch.matrix_launch(case.x.device, name, outputs, k, dtype).block_k


def run_oracle(name: str, case: Case) -> torch.Tensor:
    """Every row at 8, in float64 but for the activations."""
    x, group = case.x.flatten(0, 1), group_width(name, case)
    if name == "linear_residual":
        y = linear_int8_activations_ref(x.float(), case.weight, group)
    else:
        y = linear_int8_activations_ref(x.float() * case.norm.float(), case.weight, group)
        y *= torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    promoted = Case(*(promote(field) for field in case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES[name], "planned_linear_ref", lambda *_: y)
        return run_ref(name, promoted, table(8, case))


def check(name: str, case: Case) -> None:
    out, high = run_kernel(name, case, table(8, case)), run_oracle(name, case)
    assert_within_budget(out, high.to(out.dtype), high, name)


@pytest.fixture(params=MODULES)
def name(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-T{}-K{}".format(*size))
def test_against_quantised_activations(name, size, dtype, device):
    check(name, make(size, dtype, device))


def test_near_the_reference(name, dtype, device):
    """Quantising activations may cost a draft little: within 2.6 degrees of 8-bit weights alone."""
    case = make((2, 5, 600), dtype, device)
    precisions = table(8, case)
    out, ref = run_kernel(name, case, precisions).double(), run_ref(name, case, precisions).double()
    similarity = torch.cosine_similarity(out, ref, dim=1)
    assert similarity.min() > 0.999, similarity


@pytest.mark.filterwarnings("error")  # the interpreter warns of a division by zero
def test_zeros_specks_and_massive_activations(name, dtype, device):
    """A tile of zeros has no scale; float16 models have activations of tens of thousands."""
    case = make((1, 6, 300), dtype, device)
    case.norm.fill_(4.0)
    case.x[0, 0] = 0
    case.x[0, 1, :256] = 0
    case.x[0, 2, 5] = 2e4
    case.x[0, 3] = 6e-8 * torch.randint(0, 3, (300,), device=device)
    case.x[0, 4] = -2e4
    for form in case.weight.tensors:
        form[3] = 0
    assert run_kernel(name, case, table(8, case)).isfinite().all()
    check(name, case)


@pytest.mark.parametrize("column", [[16, 0, 8, 16, 8], [0, 8, 0, 8, 8], [8, 16, 16, 0, 0]])
def test_mixed_precisions_in_a_tile(name, column, dtype, device):
    """A row has the bits that it has where all rows share its precision, whatever skips."""
    case = make((5, 3, 123), dtype, device)
    precisions = table(column, case)
    expected = {p: run_kernel(name, case, table(p, case)).view(5, 3, -1) for p in (8, 16)}
    skips = precisions[:, SUBLAYER] == 0
    case.x[skips] = float("nan")
    out = run_kernel(name, case, precisions).view(5, 3, -1)
    for i, precision in enumerate(column):
        if precision:
            assert torch.equal(out[i], expected[precision][i]), (i, precision)
    if name == "linear_residual":
        assert torch.equal(out[skips], case.residual[skips])


def test_bits_of_a_row_do_not_depend_on_the_others(name, dtype, device, dots_in_order):
    case = make((33, 1, 123), dtype, device)
    whole = run_kernel(name, case, table(8, case))
    for num_rows in (1, 2, 5, 8, 16, 17):
        part = case.of(slice(num_rows))
        assert torch.equal(run_kernel(name, part, table(8, part)), whole[:num_rows]), num_rows
    order = torch.randperm(33)
    moved = case.of(order)
    assert torch.equal(run_kernel(name, moved, table(8, moved)), whole[order])


def test_an_int8_form_changes_no_full_row(name, dtype, device):
    """Full rows have the same bits with and without it, and without it a row at 8 is full."""
    case = make((2, 5, 123), dtype, device)
    bare = case._replace(weight=Weight(case.weight.own))
    full = run_kernel(name, bare, table(16, bare))
    assert torch.equal(run_kernel(name, case, table(16, case)), full)
    assert torch.equal(run_kernel(name, bare, table(8, bare)), full)


@pytest.mark.parametrize("flaw", ["shape", "dtype", "stride"])
def test_launchers_refuse_an_int8_form_that_does_not_fit(name, flaw, device):
    case = make((1, 1, 64), torch.float32, device)
    weight = case.weight
    bad = {
        "shape": weight.draft._replace(scale=weight.draft.scale[1:].clone()),
        "dtype": weight.draft._replace(codes=weight.draft.codes.float()),
        "stride": weight.draft._replace(codes=weight.draft.codes.t().contiguous().t()),
    }[flaw]
    with pytest.raises(AssertionError):
        run_kernel(name, case._replace(weight=weight._replace(draft=bad)), table(8, case))
