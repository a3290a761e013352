"""A round's bookkeeping on the device: kernels and references against plain loops."""

from __future__ import annotations

import pytest
import torch
from operands import rows_at

from kernels.round.keep_drafted import keep_drafted, keep_drafted_ref
from kernels.round.keep_states import keep_states, keep_states_ref
from kernels.round.rows import draft_rows, draft_rows_ref, verify_rows, verify_rows_ref

COLUMNS, NUM_PRECISIONS, POSITIONS = 9, 11, 40
CANARY = 777.0


def i32(*values: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def tokens(batch: int, device: torch.device) -> torch.Tensor:
    return torch.randint(2**40, (batch, COLUMNS)).to(device)


@pytest.mark.parametrize("op", [draft_rows, draft_rows_ref])
def test_rows_of_a_draft_step(op, device):
    """Sequences that want more, are done, want nothing, and a row without a sequence."""
    token_ids = tokens(5, device)
    first = i32(10, 0, 7, 39, 31, device=device)
    num_drafted = i32(0, 3, 2, -1, 8, device=device)
    num_wanted = i32(4, 4, 2, -1, 9, device=device)
    slots = i32(2, 0, 4, 0, 1, device=device)
    slot_precisions = torch.randint(1, 255, (6, NUM_PRECISIONS), dtype=torch.uint8).to(device)
    rows, precisions = op(token_ids, first, num_drafted, num_wanted, slots, slot_precisions)
    newest, positions, num_tokens, _, next_position = rows
    assert rows.slots is slots
    drafting = [True, True, False, False, True]
    columns = [0, 3, 2, 0, 8]
    assert newest.tolist() == [[token_ids[b, c].item()] for b, c in enumerate(columns)]
    assert positions.tolist() == [[10], [3], [9], [39], [39]]
    assert next_position.tolist() == [11, 4, 10, 40, 40]
    assert num_tokens.tolist() == [int(d) for d in drafting]
    for b, is_drafting in enumerate(drafting):
        want = slot_precisions[slots[b]] if is_drafting else torch.zeros_like(slot_precisions[0])
        assert torch.equal(precisions[b], want)
    types = [t.dtype for t in (newest, positions, num_tokens, next_position, precisions)]
    assert types == [torch.int64, torch.int32, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("width", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("op", [verify_rows, verify_rows_ref])
def test_rows_of_a_verify_pass(op, width, device):
    token_ids = tokens(4, device)
    first = i32(5, 38, 0, 39, device=device)
    num_drafted = i32(width - 1, 0, 1, -1, device=device)
    slots = i32(3, 1, 0, 2, device=device)
    rows = op(token_ids, first, num_drafted, slots, width, POSITIONS)
    assert rows.slots is slots
    assert torch.equal(rows.token_ids, token_ids[:, :width]) and rows.token_ids.is_contiguous()
    steps = range(width)
    assert rows.positions.tolist() == [[min(f + t, 39) for t in steps] for f in first.tolist()]
    assert rows.num_tokens.tolist() == [width, 1, 2, 0]
    assert rows.next_position.tolist() == [f + t + 1 for f in first.tolist() for t in steps]


def keep_loop(logits, drawn, token_ids, num_drafted, num_wanted, end_ids, stop_probability):
    sure = logits.double().softmax(-1).amax(-1)
    for b in range(len(drawn)):
        if num_drafted[b] < num_wanted[b]:
            num_drafted[b] += 1
            token_ids[b, num_drafted[b]] = drawn[b]
            if drawn[b] in end_ids[b].tolist() or sure[b] < stop_probability[b]:
                num_wanted[b] = num_drafted[b]


@pytest.mark.parametrize("size", [60, 5000])
def test_taking_the_tokens_of_a_draft_step(size, device):
    """End tokens, unsure ones, limits of 0 and 1, and rows that do not draft."""
    batch = 8
    logits = 3 * torch.randn(batch, size).to(device)
    drawn = torch.tensor([5, 6, 7, 8, 5, 9, 5, 5])
    end_ids = torch.full((batch, 4), -1, dtype=torch.int32)
    end_ids[1, 2], end_ids[2, 0], end_ids[6, 1] = 6, 3, 5
    sure = logits.double().softmax(-1).amax(-1).tolist()
    limits = [0.0, 0.0, 0.0, 0.999 * sure[3], 1.001 * sure[4], 1.0, 0.0, 0.5]
    args = [
        token_ids := tokens(batch, device),
        num_drafted := i32(0, 1, 2, 3, 4, 5, 2, -1, device=device),
        num_wanted := i32(5, 5, 5, 5, 6, 8, 2, -1, device=device),
        end_ids.to(device),
        torch.tensor(limits, device=device),
    ]
    want = [arg.clone() for arg in args]
    keep_loop(logits, drawn, *want)
    assert want[2].tolist() == [5, 2, 5, 5, 5, 6, 2, -1]
    assert not torch.equal(token_ids, want[0]) and not torch.equal(num_drafted, want[1])
    assert not torch.equal(num_wanted, want[2])
    for op in (keep_drafted, keep_drafted_ref):
        got = [arg.clone() for arg in args]
        op(logits, drawn.to(device), *got)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), op


def test_a_full_row_is_not_written_beyond_its_end(device):
    token_ids = tokens(2, device)
    before = token_ids.clone()
    num_drafted, num_wanted = i32(8, 0, device=device), i32(9, 1, device=device)
    ends = torch.full((2, 1), -1, dtype=torch.int32, device=device)
    drawn = torch.tensor([1, 2], device=device)
    logits = torch.zeros(2, 8, device=device)
    keep_drafted(logits, drawn, token_ids, num_drafted, num_wanted, ends, logits[:, 0].contiguous())
    before[1, 1] = 2
    assert torch.equal(token_ids, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [60, 2500])
@pytest.mark.parametrize("op", [keep_states, keep_states_ref])
def test_states_are_stored_at_their_positions(op, channels, dtype, device):
    x = torch.randn(6, channels).to(device, dtype)
    positions = torch.tensor([[4, 5, 6], [0, 1, 7]], dtype=torch.int32, device=device)
    slots = i32(3, 1, device=device)
    states = torch.full((4, 8, channels), CANARY, dtype=dtype, device=device)
    want = states.clone()
    for row in range(6):
        want[slots[row // 3], positions.flatten()[row]] = x[row]
    op(x, rows_at(positions, positions[:, 0], slots), states)
    assert torch.equal(states, want)


def test_a_cache_of_more_than_two_billion_states(device):
    """Offsets of 64 bits; untouched memory costs nothing on a CPU."""
    if device.type != "cpu":
        pytest.skip("would take 4 GB of a GPU's memory")
    slots, positions, channels = 2**19 + 1, 16, 256
    states = torch.empty(slots, positions, channels, dtype=torch.float16)
    assert states.numel() > 2**31
    x = torch.randn(1, channels).half()
    position, slot = i32(3, device=device)[:, None], i32(slots - 1, device=device)
    keep_states(x, rows_at(position, slot, slot), states)
    assert torch.equal(states[-1, 3], x[0])
