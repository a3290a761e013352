"""Nearest anchor: kernel and reference against a plain loop in float64, and the rule's edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget, promote

import kernels.route.nearest_anchor as nearest_module
from kernels.route.nearest_anchor import Nearest, nearest_anchor_ref, nearest_anchor_triton

# Numpy, which interprets the kernels on a CPU, warns of what the bad totals are there to test.
BAD_TOTALS = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BOTH = pytest.mark.parametrize("op", [nearest_anchor_triton, nearest_anchor_ref])
Op = Callable[..., torch.Tensor]
SHAPES = [  # N, C
    *((1, 8), (3, 8), (70, 8), (4096, 8)),
    *((5, 1), (5, 64), (5, 100), (5, 576), (5, 8192), (5, 12289), (3, 131072)),
]
UNWRITTEN = 255  # no precision of a sub-layer


def make(
    batch: int,
    num_anchors: int,
    channels: int,
    device: torch.device,
    num_plans: int = 4,
    width: int = 13,
    min_ratio: float = 1.2,
) -> list[Any]:
    """Arguments of the operation: totals of 100 tokens, near an anchor and away from it."""
    anchors = torch.nn.functional.normalize(torch.randn(num_anchors, channels))
    plans = torch.randint(num_plans, (num_anchors,), dtype=torch.int32)
    rows = torch.randint(17, (num_plans, width), dtype=torch.uint8)
    nearest = anchors[torch.randint(num_anchors, (batch,))]
    noise = torch.linspace(0.3, 2.0, batch)[:, None] * torch.randn(batch, channels)
    total = 100 * (nearest + noise / math.sqrt(channels))
    table = torch.full((batch, width), UNWRITTEN, dtype=torch.uint8)
    tensors = [tensor.to(device) for tensor in (total, anchors, plans, rows, table)]
    return [*tensors[:4], num_plans - 1, min_ratio, tensors[4]]


def on_a_line(cosines: list[float], plans: list[int], device: torch.device) -> list[Any]:
    """One sequence along the first axis and anchors at the given cosines, exact in float32."""
    anchors = torch.tensor([[cosine, math.sqrt(1 - cosine**2)] for cosine in cosines])
    rows = torch.arange(12, dtype=torch.uint8).view(4, 3)
    args = make(1, len(cosines), 2, device, width=3)
    args[0] = torch.tensor([[16.0, 0.0]], device=device)
    args[1] = anchors.to(device)
    args[2] = torch.tensor(plans, dtype=torch.int32, device=device)
    args[3] = rows.to(device)
    return args


def columns(record: torch.Tensor) -> Nearest:
    assert record.dtype == torch.float32 and record.is_contiguous()
    return Nearest(*record.unbind(-1))


def with_ratio(args: list[Any], min_ratio: float) -> list[Any]:
    return [*args[:5], min_ratio, args[6]]


def row_loop(
    cosines: list[float], plans: list[int], default_plan: int, min_ratio: float
) -> tuple[int, int, float, float, bool]:
    """One sequence, anchor by anchor: plan, anchor, similarity, other, whether it is chosen."""
    anchor = cosines.index(max(cosines))
    others = [c for c, plan in zip(cosines, plans, strict=True) if plan != plans[anchor]]
    other = max(others, default=-math.inf)
    is_rejected = 1 - other < min_ratio * (1 - cosines[anchor])
    plan = default_plan if is_rejected else plans[anchor]
    return plan, anchor, cosines[anchor], other, not is_rejected


def oracle(args: list[Any]) -> Nearest:
    """The result from cosines in float64."""
    total, anchors, plans, _, default_plan, min_ratio, _ = map(promote, args)
    norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    cosines = (total @ anchors.T / norms).clamp(max=1.0).tolist()
    rows = [row_loop(row, plans.tolist(), default_plan, min_ratio) for row in cosines]
    return Nearest(*torch.tensor(rows, dtype=torch.float64).unbind(-1))


def assert_agree(args: list[Any]) -> None:
    oracles, results = oracle(args), []
    for op in (nearest_anchor_ref, nearest_anchor_triton):
        args[6].fill_(UNWRITTEN)
        results.append(columns(op(*args)))
        for name in ("plan", "anchor", "is_chosen"):
            assert getattr(results[-1], name).tolist() == getattr(oracles, name).tolist(), name
        assert torch.equal(args[6], args[3][results[-1].plan.long()])
    low, out = results
    for name in ("similarity", "other"):
        got, want, high = (getattr(result, name).cpu() for result in (out, low, oracles))
        finite = high.isfinite()
        assert torch.equal(got.isfinite(), finite) and torch.equal(want.isfinite(), finite)
        assert_within_budget(got[finite], want[finite], high[finite], name)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_anchors, channels", SHAPES)
def test_shapes(num_anchors: int, channels: int, batch: int, device: torch.device) -> None:
    if channels == 1:  # all cosines are 1 or -1, and which of them tie is up to rounding
        args = make(batch, num_anchors, channels, device)
        args[0] = 2.0 ** torch.arange(batch, device=device)[:, None]
        args[1] = args[1].sign()
        assert_agree(args)
    else:
        assert_agree(make(batch, num_anchors, channels, device))


@pytest.mark.parametrize("num_plans, width", [(1, 1), (2, 61), (255, 1025)])
def test_plan_tables(num_plans: int, width: int, device: torch.device) -> None:
    assert_agree(make(3, 40, 24, device, num_plans, width))


def test_both_outcomes_are_among_the_random_cases(device: torch.device) -> None:
    """Otherwise the tests above would not see a rule that always rejects, or never."""
    args = make(16, 70, 8, device)
    assert_agree(args)
    is_chosen = columns(nearest_anchor_triton(*args)).is_chosen
    assert is_chosen.any() and not is_chosen.all()


@BOTH
def test_both_sides_of_the_threshold(op: Op, device: torch.device) -> None:
    """Distances 0.5 and 0.75: the ratio is 1.5 exactly, and equal to the threshold it passes."""
    args = on_a_line([0.25, 0.5], [0, 2], device)
    for min_ratio, plan in ((1.4999, 2), (1.5, 2), (1.5001, 3), (1e30, 3), (0.0, 2)):
        assert op(*with_ratio(args, min_ratio)).tolist() == [[plan, 1, 0.5, 0.25, plan == 2]]
        assert args[6].tolist() == [args[3][plan].tolist()]


@BOTH
def test_the_nearest_anchor_of_the_same_plan_is_no_rival(op: Op, device: torch.device) -> None:
    args = on_a_line([0.5, 0.375, -0.5, 0.4375, -0.25], [2, 2, 1, 2, 0], device)
    assert op(*with_ratio(args, 2.0)).tolist() == [[2, 0, 0.5, -0.25, 1]]


@BOTH
def test_a_default_plan_that_is_the_anchors_own_may_be_chosen_or_not(
    op: Op, device: torch.device
) -> None:
    args = on_a_line([0.25, 0.5], [0, 3], device)
    for min_ratio, is_chosen in ((1.5, 1), (1.6, 0)):
        assert op(*with_ratio(args, min_ratio)).tolist() == [[3, 1, 0.5, 0.25, is_chosen]]


@BOTH
def test_a_single_plan_is_never_rejected(op: Op, device: torch.device) -> None:
    for cosines in ([0.0], [-1.0, -0.5], [0.25] * 9):
        args = on_a_line(cosines, [1] * len(cosines), device)
        similarity = max(cosines)
        record = [1, cosines.index(similarity), similarity, -math.inf, 1]
        assert op(*with_ratio(args, 1e30)).tolist() == [record]


@BOTH
def test_a_prompt_on_its_anchor_is_never_rejected(op: Op, device: torch.device) -> None:
    """Also where the same point is an anchor of another plan, and rounding passes a cosine of 1."""
    args = on_a_line([0.5, 1.0, 1.0], [0, 1, 2], device)
    assert op(*with_ratio(args, 1e30)).tolist() == [[1, 1, 1, 1, 1]]
    args = make(40, 40, 64, device, num_plans=2)
    args[0] = args[1] * 1000
    result = columns(op(*with_ratio(args, 1e30)))
    is_on_it = result.similarity == 1
    assert is_on_it.any() and (result.similarity <= 1).all()
    assert torch.equal(result.plan[is_on_it], args[2][is_on_it])


@BOTH
def test_the_first_of_equal_anchors_wins(op: Op, device: torch.device) -> None:
    """Within a block of anchors, between blocks, and when the equals have different plans."""
    cosines = [-0.5] * 30
    for ties, rival in (((6, 7), 0.5), ((3, 4, 29), 0.5), ((29,), -0.5), (range(30), 0.5)):
        row = [0.5 if n in ties else c for n, c in enumerate(cosines)]
        args = on_a_line(row, [n % 3 for n in range(30)], device)
        record = [min(ties) % 3, min(ties), 0.5, rival, 1]
        assert op(*with_ratio(args, 0.5)).tolist() == [record]


def test_equal_anchors_have_equal_cosines(device: torch.device) -> None:
    """Wherever they stand in a block of anchors; channels that no block divides."""
    args = make(3, 40, 1100, device)
    args[1] = args[1][:1].repeat(40, 1)
    result = columns(nearest_anchor_triton(*args))
    assert result.anchor.tolist() == [0, 0, 0] and torch.equal(result.similarity, result.other)


@BOTH
@BAD_TOTALS
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, math.inf, -math.inf, math.nan])
def test_totals_without_a_direction_are_rejected(
    op: Op, value: float, device: torch.device
) -> None:
    """And leave the sequences beside them alone."""
    args = make(3, 9, 40, device)
    want = op(*args)
    args[0][1] = value
    for min_ratio in (0.0, 1.2):
        got = op(*with_ratio(args, min_ratio))
        assert got[1].tolist() == [args[4], 0, 0, 0, 0]
        assert torch.equal(args[6][1], args[3][args[4]])
    assert torch.equal(got[::2], want[::2])
    one_plan = [*args[:2], torch.zeros_like(args[2]), *args[3:]]
    assert op(*one_plan)[1].tolist() == [args[4], 0, 0, -math.inf, 0]


@BOTH
@BAD_TOTALS
def test_one_bad_element_is_enough(op: Op, device: torch.device) -> None:
    for value in (math.nan, math.inf):
        args = make(1, 9, 1500, device)
        args[0][0, 1400] = value
        assert op(*args).tolist() == [[args[4], 0, 0, 0, 0]]


@BOTH
def test_rows_of_other_sequences_stay(op: Op, device: torch.device) -> None:
    """The plan table of a pass is a part of the engine's."""
    args = make(2, 9, 40, device, width=61)
    whole = torch.full((5, 61), UNWRITTEN, dtype=torch.uint8, device=device)
    args[6] = whole[1:3]
    plan = columns(op(*args)).plan
    assert torch.equal(whole[1:3], args[3][plan.long()])
    assert (whole[[0, 3, 4]] == UNWRITTEN).all()


def test_bits_do_not_depend_on_the_batch(device: torch.device) -> None:
    args = make(3, 70, 100, device)
    together = nearest_anchor_triton(*args)
    for b in range(3):
        one = [args[0][b : b + 1], *args[1:6], args[6][b : b + 1]]
        assert torch.equal(nearest_anchor_triton(*one), together[b : b + 1])


def test_counters_are_ready_for_the_next_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program of a sequence resets its counter; two launches on one counter agree."""
    counter = torch.zeros(3, dtype=torch.int32, device=device)
    args = make(3, 30, 40, device)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: counter)
    first = nearest_anchor_triton(*args)
    assert not counter.any()
    table = args[6].clone()
    args[6].fill_(UNWRITTEN)
    second = nearest_anchor_triton(*args)
    assert not counter.any() and torch.equal(args[6], table)
    assert torch.equal(first, second)


def test_every_sequence_has_its_own_counter_and_cosines(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one sequence after the other and would not see them share."""
    counter = torch.tensor([0, -1, 0], dtype=torch.int32, device=device)
    cosines = torch.empty(3, 30, device=device)
    original = torch.empty

    def allocate(*size: int, **options: Any) -> torch.Tensor:
        return cosines if size == (3, 30) else original(*size, **options)

    args = make(3, 30, 40, device)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: counter)
    monkeypatch.setattr(torch, "empty", allocate)
    nearest_anchor_triton(*args)
    assert counter.tolist() == [0, 7, 0]  # eight blocks of anchors, counted from -1
    norms = torch.linalg.vector_norm(args[0], dim=1, keepdim=True)
    torch.testing.assert_close(cosines, args[0] @ args[1].T / norms)
    is_written = (args[6] != UNWRITTEN).all(dim=1)
    assert is_written.tolist() == [True, False, True]


def test_one_launch_with_the_same_tiles_for_any_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append((grid, kwargs))

    monkeypatch.setattr(nearest_module, "_nearest_anchor_kernel", Recorder())
    for batch in (1, 3):
        nearest_anchor_triton(*make(batch, 30, 40, device))
    (one_grid, one), (three_grid, three) = launches
    assert one == three and (one_grid, three_grid) == ((1, 8), (3, 8))


@pytest.mark.gpu
def test_a_captured_launch_follows_its_inputs(device: torch.device) -> None:
    """A capture refuses whatever makes the host wait."""
    args = make(3, 70, 576, device)
    nearest_anchor_triton(*args)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = columns(nearest_anchor_triton(*args))
    for _ in range(3):
        args[0].copy_(torch.randn(3, 576))
        args[6].fill_(UNWRITTEN)
        graph.replay()
        want = columns(nearest_anchor_ref(*args[:6], torch.empty_like(args[6])))
        assert torch.equal(out.plan, want.plan) and torch.equal(out.anchor, want.anchor)
        assert torch.equal(args[6], args[3][want.plan.long()])


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    args = make(2, 9, 40, device)
    total, anchors, plans, rows, _, _, table = args
    for place, wrong in (
        (0, total[:, :39].contiguous()),
        (0, total.double()),
        (0, total.T.contiguous().T),
        (1, anchors.T.contiguous().T),
        (1, anchors.repeat(1, 2)[:, :40]),
        (1, anchors[::2]),
        (1, anchors.half()),
        (1, anchors[:0]),
        (1, anchors.repeat(500, 1)),
        (2, plans.long()),
        (2, plans[:8]),
        (3, rows.int()),
        (3, rows[:, :12].contiguous()),
        (4, -1),
        (4, 4),
        (6, table[:1]),
        (6, table.T.contiguous().T),
    ):
        with pytest.raises(AssertionError):
            nearest_anchor_triton(*args[:place], wrong, *args[place + 1 :])
