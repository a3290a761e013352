"""Only the tokens that a grammar allows: on the logits of a pass, after penalties, before sampling.

    l_v = -inf    where bit v of the row's mask is 0

One torch function for all backends but the CPU's own; nothing is read on the host, so a captured
graph may hold it. A mask of ones leaves a row's bits as they are, but for the sign of a zero.
Shapes: logits [R, V] float32, R = B*T rows -> [R, V] float32. Moves about 13*R*V bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenMasks(NamedTuple):
    """Which tokens may follow the newest one of B sequences, and each token of its draft."""

    bits: torch.Tensor  # [W, B, bytes] uint8: after so many drafted tokens; lowest token first
    bias: torch.Tensor  # [256, 8] float32: what a byte of bits adds to the logits of its tokens


def bias_of_bytes(device: torch.device) -> torch.Tensor:
    """0 for a bit that is set, -inf for one that is not: [256, 8] float32."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return torch.where(bits % 2 == 1, 0.0, float("-inf"))


def place_of(masks: TokenMasks, num_before: torch.Tensor) -> torch.Tensor:
    """Which of the W*B masks each row [R] has. Of padding, which is anywhere, some mask."""
    width, batch, _ = masks.bits.shape
    sequence = torch.arange(num_before.shape[0], device=num_before.device)[:, None]
    return (num_before.clamp(0, width - 1) * batch + sequence).flatten()


def allow_ref(
    logits: torch.Tensor,  # [R, V] float32
    masks: TokenMasks,
    num_before: torch.Tensor,  # [B, T] int32: drafted tokens before each row
) -> torch.Tensor:
    """Return the logits [R, V], -inf where the mask of the row's sequence says no."""
    num_bytes = masks.bits.shape[2]
    bits = masks.bits.view(-1, num_bytes).index_select(0, place_of(masks, num_before))
    bias = masks.bias.index_select(0, bits.flatten().int())
    return logits + bias.view(len(logits), -1)[:, : logits.shape[1]]
