"""Which tokens may follow where a sequence has a grammar, row by row of a round, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.grammar_state import GrammarState, mask_bytes
from engine.round_buffers import MAX_WIDTH, RoundRow
from kernels.operands import RoundBuffers
from kernels.round.allow import TokenMasks, bias_of_bytes

ALL = 0xFF  # where there is no grammar, and where nothing depends on what is drawn


class GrammarMasks:
    """Writes the masks of a round before its passes, and those of drafts as they grow.

    The tensors are made when a sequence first has a grammar. Each pass finds them where they were.
    """

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self._shape = (MAX_WIDTH, max_sequences, mask_bytes(vocab_size))
        self._device = device
        self._masks: TokenMasks | None = None
        self._host: np.ndarray | None = None  # on a CPU the same memory as the masks
        self._grammars: list[tuple[int, GrammarState]] = []  # with their rows of the round

    @property
    def is_used(self) -> bool:
        """Whether any of the staged rows has a grammar."""
        return bool(self._grammars)

    def stage(self, rows: Sequence[RoundRow]) -> TokenMasks | None:
        """What a pass over these rows must know: None where no sequence has a grammar."""
        self._grammars = [(b, row.grammar) for b, row in enumerate(rows) if row.grammar is not None]
        if not self._grammars:
            return None
        if self._masks is None:
            self._make()
        assert self._host is not None
        width = 1 + max(max(row.num_wanted, len(row.token_ids) - 1) for row in rows)
        self._host[:width, : len(rows)] = ALL
        for b, grammar in self._grammars:
            drafted = rows[b].token_ids[1:]
            for i in range(len(drafted) + 1):
                self._write(i, b, grammar.mask(drafted[:i]))
        self._copy(0, width)
        return self._masks

    def follow(self, buffers: RoundBuffers) -> None:
        """After a draft step: write what may follow. A draft after which nothing may ends there."""
        num_drafted, token_ids = buffers.num_drafted.tolist(), buffers.token_ids.tolist()
        for b, grammar in self._grammars:
            mask = grammar.mask(token_ids[b][1 : num_drafted[b] + 1])
            self._write(num_drafted[b], b, mask)
            if mask is None:
                buffers.num_wanted[b] = num_drafted[b]
        columns = [num_drafted[b] for b, _ in self._grammars]
        self._copy(min(columns), max(columns) + 1)

    def _write(self, column: int, b: int, mask: np.ndarray | None) -> None:
        assert self._host is not None
        self._host[column, b] = ALL if mask is None else mask

    def _copy(self, start: int, end: int) -> None:
        """To the device, at once: nothing is under way when the host has read what was drafted."""
        assert self._masks is not None and self._host is not None
        if self._device.type != "cpu":
            self._masks.bits[start:end].copy_(torch.from_numpy(self._host[start:end]))

    def _make(self) -> None:
        with torch.inference_mode(False):  # a capture may change them outside of it
            bits = torch.full(self._shape, ALL, dtype=torch.uint8, device=self._device)
            self._masks = TokenMasks(bits, bias_of_bytes(self._device))
            is_host = self._device.type == "cpu"
            self._host = bits.numpy() if is_host else np.full(self._shape, ALL, np.uint8)
