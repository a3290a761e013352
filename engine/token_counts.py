"""Which tokens the sequences with penalties have so far, slot by slot, in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.round_buffers import RoundRow
from kernels.round.penalties import SeenTokens


class TokenCounts:
    """Keeps the counts up to date between passes, which only read them: drafts are no part of them.

    The tensors are made when a sequence first has penalties.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device):
        self._shape, self._device = (num_slots, vocab_size), device
        self._seen: SeenTokens | None = None
        # The tokens of each slot's sequence, by which it is known, and how many are counted.
        self._histories: list[Sequence[int] | None] = [None] * num_slots
        self._num_counted = [0] * num_slots

    def update(self, rows: Sequence[RoundRow]) -> SeenTokens | None:
        """What a pass over these rows must know: None where no sequence has penalties."""
        penalised = [row for row in rows if row.sampling.is_penalised]
        if penalised and self._seen is None:
            self._seen = SeenTokens(
                in_prompt=torch.zeros(self._shape, dtype=torch.bool, device=self._device),
                in_answer=torch.zeros(self._shape, dtype=torch.int32, device=self._device),
            )
        for row in penalised:
            assert self._seen is not None
            self._count(self._seen.in_prompt[row.slot], self._seen.in_answer[row.slot], row)
        return self._seen if penalised else None

    def _count(self, in_prompt: torch.Tensor, in_answer: torch.Tensor, row: RoundRow) -> None:
        """Count what came since the last round, or all of a sequence that is new to the slot."""
        if self._histories[row.slot] is not row.history:
            in_answer.zero_()
            in_prompt.zero_()
            prompt = torch.tensor(row.history[: row.num_prompt], device=self._device)
            in_prompt[prompt] = True
            self._histories[row.slot], self._num_counted[row.slot] = row.history, row.num_prompt
        new = row.history[self._num_counted[row.slot] :]
        if new:
            token_ids = torch.tensor(new, device=self._device)
            in_answer.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.int32))
        self._num_counted[row.slot] = len(row.history)
