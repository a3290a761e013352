"""Accepting a draft: kernel and reference against a plain loop, to the last token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.accept import accept, accept_ref

Tensors = tuple[torch.Tensor, ...]  # target, draft, num_drafted
BOTH = pytest.mark.parametrize("op", [accept, accept_ref])


def accept_loop(target: list[int], draft: list[int], num_drafted: int) -> list[int]:
    """One sequence, token by token."""
    n = 0
    while n < num_drafted and draft[n] == target[n]:
        n += 1
    return [n, target[n], *target[: n + 1], *[-1] * (len(target) - n - 1)]


def tensors(
    target: list[list[int]], draft: list[list[int]], num_drafted: list[int], device: torch.device
) -> Tensors:
    # The shape of an empty draft cannot be read off its lists.
    batch, width = len(target), len(target[0])
    return (
        torch.tensor(target, device=device),
        torch.tensor(draft, dtype=torch.int64, device=device).view(batch, width - 1),
        torch.tensor(num_drafted, dtype=torch.int32, device=device),
    )


def random_round(batch: int, width: int) -> Tensors:
    """Targets of two tokens; of the drafted ones about one in eight differs, none in padding."""
    target = torch.randint(2, (batch, width))
    num_drafted = torch.randint(0, width, (batch,), dtype=torch.int32)
    is_wrong = torch.rand(batch, width - 1) < 1 / 8
    is_wrong &= torch.arange(width - 1) < num_drafted[:, None]
    return target, target[:, :-1] ^ is_wrong, num_drafted


def assert_agree(args: Tensors, device: torch.device) -> None:
    args = tuple(arg.contiguous().to(device) for arg in args)
    want = [accept_loop(*row) for row in zip(*(arg.tolist() for arg in args), strict=True)]
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
    assert_agree((target, draft, num_drafted), device)
    result = accept(target.to(device), draft.to(device), num_drafted.to(device))
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
        [3, 8, 5, 6, 7, 8],
        [1, 6, 5, 6, -1, -1],
        [1, 6, 5, 6, -1, -1],
        [0, 5, 5, -1, -1, -1],
    ]


@BOTH
def test_without_a_draft_the_only_token_is_the_next_input(
    op: Callable[..., torch.Tensor], device: torch.device
) -> None:
    args = tensors([[5], [6]], [[], []], [0, 0], device)
    assert op(*args).tolist() == [[0, 5, 5], [0, 6, 6]]


@BOTH
def test_tokens_wider_than_32_bits(op: Callable[..., torch.Tensor], device: torch.device) -> None:
    """Equal in their low halves only."""
    args = tensors([[2**40 + 1, 2**40 + 2]], [[1]], [1], device)
    assert op(*args).tolist() == [[0, 2**40 + 1, 2**40 + 1, -1]]


@BOTH
def test_a_count_beyond_the_draft_stays_inside_it(
    op: Callable[..., torch.Tensor], device: torch.device
) -> None:
    """The sequences lie one after the other: reading on would accept a token of the next."""
    args = tensors([[5, 6, 7, 8], [8, 8, 8, 8]], [[5, 6, 7], [8, 8, 8]], [4, 9], device)
    assert op(*args).tolist() == [[3, 8, 5, 6, 7, 8], [3, 8, 8, 8, 8, 8]]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    target, draft, num_drafted = (arg.to(device) for arg in random_round(3, 5))
    for wrong in (
        (target, draft[:, :3].contiguous(), num_drafted),
        (target, draft[:2], num_drafted),
        (target, draft, num_drafted[:2]),
        (target.int(), draft, num_drafted),
        (target, draft.int(), num_drafted),
        (target, draft, num_drafted.long()),
        (target.T.contiguous().T, draft, num_drafted),
        (target[:, :0], target[:, :0], num_drafted),
    ):
        with pytest.raises(AssertionError):
            accept(*wrong)
