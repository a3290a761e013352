"""The key/value cache, and which request uses which of its slots."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.config import LlamaConfig


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer, allocated once.

    How many positions of a slot are valid is the engine's knowledge, an argument to every pass:
    rejecting tokens is not moving that length.
    """

    k: torch.Tensor  # [L, slots, H_kv, S, D]
    v: torch.Tensor  # [L, slots, H_kv, S, D]


def make_kv_cache(
    config: LlamaConfig, num_slots: int, max_length: int, device: torch.device, dtype: torch.dtype
) -> KVCache:
    """Allocate a cache for `num_slots` sequences of up to `max_length` tokens."""
    shape = (config.num_layers, num_slots, config.num_kv_heads, max_length, config.head_dim)
    # On a CPU untouched pages of an empty tensor take no memory, so a long context costs nothing.
    return KVCache(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))


class Lease(NamedTuple):
    """A slot lent to a request; its first `reused` positions hold the prompt's first tokens."""

    slot: int
    reused: int


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class SlotPool:
    """Lends cache slots to requests, and remembers which tokens each slot still holds.

    A new prompt gets the free slot that shares the longest prefix with it, so a conversation's
    next turn finds its past; among equals the one unused for longest. Safe to share by threads.
    """

    def __init__(self, num_slots: int):
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {slot: [] for slot in range(num_slots)}  # oldest first

    def acquire(self, prompt: Sequence[int]) -> Lease | None:
        """Lend a slot, or return None when all are in use.

        At least the prompt's last token is left to compute, for its logits.
        """
        with self._lock:
            if not self._free:
                return None
            shared = {slot: _common_prefix(held, prompt) for slot, held in self._free.items()}
            slot = max(shared, key=lambda candidate: shared[candidate])
            del self._free[slot]
            return Lease(slot, min(shared[slot], len(prompt) - 1))

    def release(self, slot: int, token_ids: Sequence[int]) -> None:
        """Take a slot back; `token_ids` are those whose keys and values it holds."""
        with self._lock:
            assert slot not in self._free, slot
            self._free[slot] = list(token_ids)
