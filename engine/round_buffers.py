"""What the passes of a round read and write: fixed addresses, so that a captured graph serves all.

The host writes a round's inputs into one arena and copies that over in one go. From then on tokens
stay on the device: a draft step appends to `token_ids`, verification reads it, and the host reads
one result. On a CPU both arenas are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from models.config import LlamaConfig
from models.plan import MAX_DRAFT

MAX_WIDTH = MAX_DRAFT + 1  # tokens of a sequence in a verify pass
MAX_END_IDS = 128  # end-of-sequence and stop tokens of a request


@dataclass(frozen=True)
class RoundBuffers:
    """One row a sequence, those that draft most first; W = MAX_WIDTH, E = MAX_END_IDS.

    num_drafted is -1 in a row without a sequence. num_wanted is how far draft steps shall go.
    slot_precisions is no input of a round: a slot's row is written when its sequence changes its
    plan, by the router on the device or by the host.
    """

    token_ids: torch.Tensor  # [B, W] int64: the newest token, then the draft
    seed: torch.Tensor  # [B] int64
    first: torch.Tensor  # [B] int32: position of the newest token
    slots: torch.Tensor  # [B] int32: cache slot
    num_drafted: torch.Tensor  # [B] int32
    num_wanted: torch.Tensor  # [B] int32
    min_position: torch.Tensor  # [B] int32: first position where an end token may be drawn
    top_k: torch.Tensor  # [B] int32
    end_ids: torch.Tensor  # [B, E] int32, -1 is none
    temperature: torch.Tensor  # [B] float32
    top_p: torch.Tensor  # [B] float32
    min_p: torch.Tensor  # [B] float32
    stop_probability: torch.Tensor  # [B] float32
    slot_precisions: torch.Tensor  # [slots, 2L + 1] uint8

    def rows(self, batch: int) -> RoundBuffers:
        """The first `batch` rows: views at the same addresses."""
        inputs = {field.name: getattr(self, field.name)[:batch] for field in fields(self)}
        return RoundBuffers(**inputs | {"slot_precisions": self.slot_precisions})


_INT64, _INT32, _FLOAT32 = torch.int64, torch.int32, torch.float32
# Columns and type of each input, the widest elements first, so that all are aligned.
_INPUTS: dict[str, tuple[int, torch.dtype]] = {
    "token_ids": (MAX_WIDTH, _INT64), "seed": (1, _INT64), "first": (1, _INT32),
    "slots": (1, _INT32), "num_drafted": (1, _INT32), "num_wanted": (1, _INT32),
    "min_position": (1, _INT32), "top_k": (1, _INT32), "end_ids": (MAX_END_IDS, _INT32),
    "temperature": (1, _FLOAT32), "top_p": (1, _FLOAT32), "min_p": (1, _FLOAT32),
    "stop_probability": (1, _FLOAT32),
}  # fmt: skip


@dataclass(frozen=True)
class Staging:
    """A round's inputs as the host writes them, and the arenas that they lie in."""

    inputs: dict[str, np.ndarray]  # views of `host` by the names of RoundBuffers
    host: torch.Tensor
    device: torch.Tensor
    copied: torch.cuda.Event | None  # None where host and device are the same memory

    def begin(self) -> dict[str, np.ndarray]:
        """The inputs, to be written: waits for an earlier copy, should it be under way still."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.inputs

    def copy_over(self) -> None:
        """Start the copy to the device."""
        if self.copied is not None:
            self.device.copy_(self.host, non_blocking=True)
            self.copied.record()


def make_round_buffers(
    config: LlamaConfig, max_sequences: int, device: torch.device
) -> tuple[RoundBuffers, Staging]:
    """Buffers for up to `max_sequences` sequences, one to a slot, and their host side."""
    size = max_sequences * sum(n * dtype.itemsize for n, dtype in _INPUTS.values())
    is_cuda = device.type == "cuda"
    with torch.inference_mode(False):  # a capture changes the arena outside of it
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        arena = torch.zeros(size, dtype=torch.uint8, device=device) if is_cuda else host
    shape = (max_sequences, 2 * config.num_layers + 1)
    precisions = torch.zeros(shape, dtype=torch.uint8, device=device)
    staged = {name: view.numpy() for name, view in _views(host, max_sequences).items()}
    buffers = RoundBuffers(**_views(arena, max_sequences), slot_precisions=precisions)
    return buffers, Staging(staged, host, arena, torch.cuda.Event() if is_cuda else None)


def _views(arena: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """Each input's place in an arena: [B], or [B, columns] where it has more than one."""
    views, start = {}, 0
    for name, (columns, dtype) in _INPUTS.items():
        num_bytes = batch * columns * dtype.itemsize
        view = arena[start : start + num_bytes].view(dtype)
        views[name] = view.view(batch, columns) if columns > 1 else view
        start += num_bytes
    return views
