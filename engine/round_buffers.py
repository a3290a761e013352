"""What the passes of a round read and write: fixed addresses, so that a captured graph serves all.

The host writes a round's inputs into one arena and copies that over in one go. From then on tokens
stay on the device: a draft step appends to `token_ids`, verification reads it, and the host reads
one result. On a CPU both arenas are the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch

from engine.grammar_state import GrammarState
from engine.params import MAX_END_IDS, Sampling
from kernels.operands import RoundBuffers
from kernels.round.sample import SAMPLE_DTYPES, SampleParams
from models.config import LlamaConfig
from models.plan import MAX_DRAFT

MAX_WIDTH = MAX_DRAFT + 1  # tokens of a sequence in a verify pass
ALIGNMENT = 16  # bytes


class RoundRow(NamedTuple):
    """One sequence's inputs of a round. Without any token it is padding, which nothing runs."""

    token_ids: Sequence[int]  # the newest token, then what is drafted already
    first: int  # position of the newest token
    slot: int = 0  # of the cache
    num_wanted: int = 0  # how far draft steps shall go
    stop_probability: float = 0.0  # a less likely token ends the draft
    sampling: Sampling = Sampling()
    history: Sequence[int] = ()  # all tokens so far, for penalties on them
    num_prompt: int = 0  # of these
    grammar: GrammarState | None = None


def _round_buffers(columns: Iterable[torch.Tensor], slot_precisions: torch.Tensor) -> RoundBuffers:
    token_ids, first, slots, num_drafted, num_wanted, stop_probability, *sampling = columns
    return RoundBuffers(
        token_ids, first, slots, num_drafted, num_wanted, stop_probability,
        SampleParams(*sampling), slot_precisions,
    )  # fmt: skip


# Width and type of each input, in the order of RoundBuffers.
_INPUTS = (
    (MAX_WIDTH, torch.int64),
    *[(1, torch.int32)] * 4,  # first, slots, num_drafted, num_wanted
    (1, torch.float32),
    *((MAX_END_IDS if name == "end_ids" else 1, dtype)
      for name, dtype in zip(SampleParams._fields, SAMPLE_DTYPES, strict=True)),
)  # fmt: skip


@dataclass(frozen=True)
class Staging:
    """A round's inputs as the host writes them, and the arenas that they lie in."""

    columns: tuple[np.ndarray, ...]  # views of `host`, in the order of RoundBuffers
    host: torch.Tensor
    device: torch.Tensor
    copied: torch.cuda.Event | None  # None where host and device are the same memory
    last_position: int  # of the cache: padding is there, as no prompt reaches it

    def fill(self, rows: Sequence[RoundRow], num_rows: int = 0) -> None:
        """Write a round's inputs, padded to `num_rows`, and start the copy to the device.

        Waits for an earlier copy, should it be under way still.
        """
        if self.copied is not None:
            self.copied.synchronize()
        padding = RoundRow((), self.last_position, num_wanted=-1)
        token_ids, *columns = self.columns
        for b, row in enumerate(chain(rows, repeat(padding, num_rows - len(rows)))):
            num_drafted = len(row.token_ids) - 1
            assert row.first + max(row.num_wanted, num_drafted) <= self.last_position, row
            token_ids[b, : num_drafted + 1] = row.token_ids
            counts = (row.first, row.slot, num_drafted, row.num_wanted, row.stop_probability)
            for column, value in zip(columns, (*counts, *row.sampling), strict=True):
                column[b] = value
        if self.copied is not None:
            self.device.copy_(self.host, non_blocking=True)
            self.copied.record()


def make_round_buffers(
    config: LlamaConfig, max_sequences: int, max_positions: int, device: torch.device
) -> tuple[RoundBuffers, Staging]:
    """Buffers for up to `max_sequences` sequences, one to a slot, and their host side."""
    size = sum(_aligned(max_sequences * width * dtype.itemsize) for width, dtype in _INPUTS)
    is_cuda = device.type == "cuda"
    with torch.inference_mode(False):  # a capture changes the arena outside of it
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        arena = torch.zeros(size, dtype=torch.uint8, device=device) if is_cuda else host
    shape = (max_sequences, 2 * config.num_layers + 1)
    precisions = torch.zeros(shape, dtype=torch.uint8, device=device)
    columns = tuple(view.numpy() for view in _views(host, max_sequences))
    copied = torch.cuda.Event() if is_cuda else None
    staging = Staging(columns, host, arena, copied, max_positions - 1)
    return _round_buffers(_views(arena, max_sequences), precisions), staging


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _views(arena: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    """Each input's place in an arena: [B], or [B, width] where a row has more than one."""
    start = 0
    for width, dtype in _INPUTS:
        num_bytes = batch * width * dtype.itemsize
        view = arena[start : start + num_bytes].view(dtype)
        yield view.view(batch, width) if width > 1 else view
        start += _aligned(num_bytes)
