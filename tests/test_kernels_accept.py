"""Accepting a draft: kernel and reference against a plain loop, to the last token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.round.accept import accept, accept_ref

Tensors = tuple[torch.Tensor, ...]  # target, token_ids, num_drafted
NEWEST = 3  # column 0 of token_ids, which is no draft
BOTH = pytest.mark.parametrize("op", [accept, accept_ref])


def accept_loop(target: list[int], draft: list[int], num_drafted: int) -> list[int]:
    """One sequence, token by token."""
    n = 0
    while n < num_drafted and draft[n] == target[n]:
        n += 1
    return [n, num_drafted, *target[: n + 1], *[-1] * (len(target) - n - 1)]


def with_newest(draft: torch.Tensor) -> torch.Tensor:
    """Drafts as the buffers hold them: after the newest token, in rows of more columns."""
    batch = draft.shape[0]
    newest, more = torch.full((batch, 1), NEWEST), torch.full((batch, 2), 1)
    return torch.cat((newest, draft, more), dim=1)


def tensors(
    target: list[list[int]], draft: list[list[int]], num_drafted: list[int], device: torch.device
) -> Tensors:
    # The shape of an empty draft cannot be read off its lists.
    batch, width = len(target), len(target[0])
    return (
        torch.tensor(target, device=device),
        with_newest(torch.tensor(draft, dtype=torch.int64).view(batch, width - 1)).to(device),
        torch.tensor(num_drafted, dtype=torch.int32, device=device),
    )


def random_round(batch: int, width: int) -> Tensors:
    """Targets of two tokens; of the drafted ones about one in eight differs, none in padding."""
    target = torch.randint(2, (batch, width))
    num_drafted = torch.randint(0, width, (batch,), dtype=torch.int32)
    is_wrong = torch.rand(batch, width - 1) < 1 / 8
    is_wrong &= torch.arange(width - 1) < num_drafted[:, None]
    return target, with_newest(target[:, :-1] ^ is_wrong), num_drafted


def assert_agree(args: Tensors, device: torch.device) -> None:
    args = tuple(arg.contiguous().to(device) for arg in args)
    rows = zip(*(arg.tolist() for arg in args), strict=True)
    want = [accept_loop(target, ids[1:], num_drafted) for target, ids, num_drafted in rows]
    assert accept_ref(*args).tolist() == want
    result = accept(*args)
    assert result.dtype == torch.int64 and result.tolist() == want


@pytest.mark.parametrize("width", [1, 2, 5, 8, 16, 17])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_random_rounds(batch: int, width: int, device: torch.device) -> None:
    """Padding always equals the target: counting it would be seen."""
    for _ in range(20):
        assert_agree(random_round(batch, width), device)


@pytest.mark.parametrize("width", [1, 2, 5, 8, 16, 17])
def test_every_number_drafted_and_accepted(width: int, device: torch.device) -> None:
    """Each count of drafted tokens with the first mistake at each place, or nowhere."""
    pairs = [(g, n) for g in range(width) for n in range(g + 1)]
    target = torch.arange(100, 100 + width).repeat(len(pairs), 1)
    draft = target[:, :-1].clone()
    for row, (g, n) in enumerate(pairs):
        if n < g:
            draft[row, n] = 7
    num_drafted = torch.tensor([g for g, _ in pairs], dtype=torch.int32)
    token_ids = with_newest(draft)
    assert_agree((target, token_ids, num_drafted), device)
    result = accept(target.to(device), token_ids.to(device), num_drafted.to(device))
    assert result[:, 0].tolist() == [n for _, n in pairs]


@BOTH
def test_a_round_by_hand(op: Callable[..., torch.Tensor], device: torch.device) -> None:
    args = tensors(
        [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]],
        [[5, 6, 7], [5, 9, 7], [5, 6, 7], [9, 6, 7]],
        [3, 3, 1, 3],
        device,
    )
    assert op(*args).tolist() == [
        [3, 3, 5, 6, 7, 8],
        [1, 3, 5, 6, -1, -1],
        [1, 1, 5, 6, -1, -1],
        [0, 3, 5, -1, -1, -1],
    ]


@BOTH
def test_without_a_draft_there_is_one_token(
    op: Callable[..., torch.Tensor], device: torch.device
) -> None:
    args = tensors([[5], [6]], [[], []], [0, 0], device)
    assert op(*args).tolist() == [[0, 0, 5], [0, 0, 6]]


@BOTH
def test_a_row_without_a_sequence_accepts_nothing(
    op: Callable[..., torch.Tensor], device: torch.device
) -> None:
    args = tensors([[5, 6], [7, 8]], [[5], [7]], [1, -1], device)
    assert op(*args).tolist() == [[1, 1, 5, 6], [0, -1, 7, -1]]


@BOTH
def test_tokens_wider_than_32_bits(op: Callable[..., torch.Tensor], device: torch.device) -> None:
    """Equal in their low halves only."""
    args = tensors([[2**40 + 1, 2**40 + 2]], [[1]], [1], device)
    assert op(*args).tolist() == [[0, 1, 2**40 + 1, -1]]


@BOTH
def test_a_count_beyond_the_draft_stays_inside_it(
    op: Callable[..., torch.Tensor], device: torch.device
) -> None:
    """The sequences lie one after the other: reading on would accept a token of the next."""
    args = tensors([[5, 6, 7, 8], [8, 8, 8, 8]], [[5, 6, 7], [8, 8, 8]], [4, 9], device)
    assert op(*args).tolist() == [[3, 4, 5, 6, 7, 8], [3, 9, 8, 8, 8, 8]]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    target, token_ids, num_drafted = (arg.to(device) for arg in random_round(3, 5))
    for wrong in (
        (target, token_ids[:, :4].contiguous(), num_drafted),
        (target, token_ids[:2], num_drafted),
        (target, token_ids, num_drafted[:2]),
        (target.int(), token_ids, num_drafted),
        (target, token_ids.int(), num_drafted),
        (target, token_ids, num_drafted.long()),
        (target.T.contiguous().T, token_ids, num_drafted),
        (target[:, :0], target[:, :0], num_drafted),
    ):
        with pytest.raises(AssertionError):
            accept(*wrong)
