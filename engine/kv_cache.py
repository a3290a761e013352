"""The key/value cache, and which request uses which of its slots."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

import torch

from engine.prefix import common_prefix
from engine.sequence import RunningSequence
from models.llama import Llama


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer, and what the last layer made; allocated once.

    How many positions of a slot are valid is the engine's knowledge, an argument to every pass:
    rejecting tokens is not moving that length. `states` are valid where keys and values are: the
    router pools them over a prompt, however much of it an earlier request has left here.
    """

    k: torch.Tensor  # [L, slots, H_kv, S, D]
    v: torch.Tensor  # [L, slots, H_kv, S, D]
    states: torch.Tensor  # [slots, S, C]: the residual stream after the last layer


def make_kv_cache(model: Llama, num_slots: int, max_length: int) -> KVCache:
    """Allocate a cache for `num_slots` sequences of up to `max_length` tokens."""
    config, device = model.config, model.device
    shape = (config.num_layers, num_slots, config.num_kv_heads, max_length, config.head_dim)
    # On a CPU untouched pages of an empty tensor take no memory, so a long context costs nothing.
    k, v = (torch.empty(shape, device=device, dtype=model.kv_dtype) for _ in range(2))
    size = (num_slots, max_length, config.hidden_size)
    return KVCache(k, v, torch.empty(size, device=device, dtype=model.dtype))


class SlotPool:
    """Lends cache slots to requests, and remembers which tokens each slot still holds.

    A new prompt gets the free slot that shares the longest prefix with it, so a conversation's
    next turn finds its past; among equals the one unused for longest. Safe to share by threads.
    `release` takes no lock: the garbage collector may call it, closing a stream that nobody holds
    any more, while this thread is in the middle of `acquire`.
    """

    def __init__(self, num_slots: int):
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = {slot: [] for slot in range(num_slots)}  # oldest first
        self._released: deque[RunningSequence] = deque()  # whose slots `acquire` takes back

    def acquire(self, sequence: RunningSequence) -> bool:
        """Lend `sequence` a slot; False when all are in use.

        At least the prompt's last token is left to compute, for its logits.
        """
        prompt = sequence.token_ids
        with self._lock:
            self._take_back()
            if not self._free:
                return False
            shared = {slot: common_prefix(held, prompt) for slot, held in self._free.items()}
            slot = max(shared, key=lambda candidate: shared[candidate])
            sequence.num_reused = min(shared[slot], len(prompt) - 1)
            sequence.slot = slot
            del self._free[slot]
            return True

    def release(self, sequence: RunningSequence) -> None:
        """Give back the slot of `sequence`, if it has one, with the tokens that the slot holds."""
        self._released.append(sequence)

    def _take_back(self) -> None:
        while self._released:
            sequence = self._released.popleft()
            if sequence.slot >= 0:
                self._free.pop(sequence.slot, None)  # there, had an interrupt struck in acquire
                self._free[sequence.slot] = sequence.token_ids[: sequence.num_cached]
                sequence.slot = -1
